"""A row's cut in few looks at its scores, all of which a program holds: the search of ``one_program`` and of score_select's kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from thresher.ops.select.triton_search import INF, LOWEST, key_number, number_key

_REACH = tl.constexpr(0.12)  # the first probes' distance from the guess, in standard deviations
_SPREAD = tl.constexpr(1.3)  # a later step's, in those of the sought number's place in its bracket
_FEW = tl.constexpr(32)  # scores in a bracket from which on any progress will do


@triton.jit
def _hits(score, number):
    """How many of each thread's scores are >= a number, as float: a comparison's result is one, and such sums burden other units."""
    return tl.sum(tl.sum((score >= number).to(tl.float32), axis=2), axis=0)


@triton.jit
def _count_three(score, one, two, three):
    """How many scores are >= each of three numbers: a thread's counts are bytes of one word, the block's are halves of two, or words where
    there are more scores than a half can tell."""
    count = _hits(score, one) + _hits(score, two) * 256 + _hits(score, three) * 65536
    count = count.to(tl.int32)
    if score.numel < 32768:
        outer, inner = tl.split(tl.sum(tl.join(count & 0xFF00FF, (count >> 8) & 0xFF), axis=0))
        first, second, third = outer & 0xFFFF, inner, outer >> 16
    else:
        low, middle, high = count & 0xFF, (count >> 8) & 0xFF, count >> 16
        first, second, third = tl.reduce((low, middle, high), 0, _add_three)
    return first, second, third


@triton.jit
def _add_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def normal_guess(score, want, end):
    """(guess, distance) for ``find``: where the ``want``-th best of normal scores would stand, by a quarter of them."""
    GROUPS: tl.constexpr = score.shape[0]
    EVERY: tl.constexpr = min(4, GROUPS)
    part = tl.reshape(score, [GROUPS // EVERY, EVERY, score.shape[1], score.shape[2]])
    seen = (tl.abs(part) < float("inf")) & (tl.arange(0, EVERY)[None, :, None, None] == 0)
    part = tl.where(seen, part, 0.0)
    num = tl.sum(tl.sum(tl.sum(seen.to(tl.float32), axis=3), axis=1), axis=0)
    total = tl.sum(tl.sum(tl.sum(part, axis=3), axis=1), axis=0)
    squares = tl.sum(tl.sum(tl.sum(part * part, axis=3), axis=1), axis=0)
    num, total, squares = tl.reduce((num, total, squares), 0, _add_three)
    num = tl.maximum(num, 1.0)
    mean = total / num
    deviation = tl.sqrt(tl.maximum(squares / num - mean * mean, 0.0))
    share = tl.minimum(tl.maximum(want / tl.minimum(num * EVERY, end), 1e-4), 1 - 1e-4)
    # Tukey's lambda distribution, whose quantiles are eighth roots, is within a few hundredths of the normal one.
    guess = mean + deviation * 5.45 * (tl.sqrt(tl.sqrt(tl.sqrt(1 - share))) - tl.sqrt(tl.sqrt(tl.sqrt(share))))
    return guess, tl.maximum(_REACH * deviation, 1e-5 * tl.abs(guess))


@triton.jit
def find(score, want, slack, end, guess, reach):
    """(low, low_count, over_count): the cut's key, how many scores are >= that number, and how many are >= a greater one.

    ``score`` is ``[groups, threads, neighbours]``, of which a thread holds one for each group and neighbour, up to 128 in all; ``end``
    candidates are in it, and the rest are -inf. Where ``low_count`` is ``want`` to ``want + slack``, what is above or at the cut is the
    answer, and ``over_count`` says nothing; else the cut is tied, and ``over_count`` is what lies above. ``low`` is below LOWEST where
    numbers fall short, or are just as many as wanted. A step counts at three probes, which cost less than three steps: first about a guess,
    any number; then interpolated between the numbers that bracket the cut, so far apart that it likely falls between them. Where that does
    not help, the bracket's keys are quartered, or, every other time, its lowest score is probed, which ends the search in a plateau.
    """
    one, two, three = number_key(guess - reach), number_key(guess), number_key(guess + reach)
    low = end * 0 + (LOWEST - 1)
    over = tl.where(end > want, end * 0 + (INF + 1), LOWEST)
    low_count = end * 0 + score.numel
    over_count = end * 0
    was_open = end * 0 + 1  # whether an end of the bracket is not a number yet
    turn = end * 0
    while (low < over - 1) & (low_count - want > slack):
        one = tl.minimum(tl.maximum(one, low + 1), over - 1)
        two = tl.minimum(tl.maximum(two, one), over - 1)
        three = tl.minimum(tl.maximum(three, two), over - 1)
        size = low_count - over_count
        first, second, third = _count_three(score, key_number(one), key_number(two), key_number(three))
        over = tl.where(first < want, one, tl.where(second < want, two, tl.where(third < want, three, over)))
        over_count = tl.where(first < want, first, tl.where(second < want, second, tl.where(third < want, third, over_count)))
        low = tl.where(third >= want, three, tl.where(second >= want, two, tl.where(first >= want, one, low)))
        low_count = tl.where(third >= want, third, tl.where(second >= want, second, tl.where(first >= want, first, low_count)))
        left = low_count - over_count
        bottom, top = key_number(low), key_number(over)
        is_open = ((low < LOWEST) | (over >= INF)).to(tl.int32)
        progress = (2 * left <= size) | ((left < _FEW) & (left < size))
        if (is_open > 0) & (turn == 0):
            if low < LOWEST:  # a row of too few numbers shows here
                one, two, three = low + 1, number_key(top - 8 * reach), number_key(top - 2 * reach)
            else:
                one, two, three = number_key(bottom + 2 * reach), number_key(bottom + 8 * reach), number_key(bottom + 32 * reach)
        elif (is_open == 0) & ((was_open > 0) | progress):
            part = ((low_count - want).to(tl.float32) + 0.5) / left
            side = _SPREAD * tl.sqrt(part * (1 - part) / (left + 1))
            span = top - bottom
            one = number_key(bottom + span * tl.maximum(part - side, 0.0))
            two = number_key(bottom + span * part)
            three = number_key(bottom + span * tl.minimum(part + side, 1.0))
        else:
            quarter = ((over - low).to(tl.uint32, bitcast=True) >> 2).to(tl.int32, bitcast=True)
            one, two, three = low + quarter, low + 2 * quarter, low + 3 * quarter
            if turn % 2 > 0:
                least = tl.min(tl.min(tl.where(score >= bottom, score, float("inf")), axis=2), axis=0)
                one = number_key(tl.min(least, axis=0))
                two = one + 1
        was_open = is_open
        turn += 1
    return low, low_count, over_count
