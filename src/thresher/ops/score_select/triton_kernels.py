# mypy: disable-error-code="no-untyped-def"
"""Before ``gluon_kernels.collect_kernel``: ends and a level for each row, and the sample that levels come from."""

from __future__ import annotations

import triton
import triton.language as tl

from thresher.ops.index_score.triton_kernels import LEAST_SCORE
from thresher.ops.select.triton_find import find, normal_guess
from thresher.ops.select.triton_search import LOWEST, key_number

_SIGN = tl.constexpr(0x7FFFFFFF)  # every bit but the sign
_SCRAMBLE = tl.constexpr(-1640531535)  # 2**32 over the golden ratio: its multiples are spread evenly


@triton.jit
def sampled_key(column, stride):
    """The key that a column of the sample is: one of every stride keys, a power of two; which one is drawn, so that it keeps step with no
    pattern in the context."""
    drawn = column * _SCRAMBLE
    drawn = (drawn ^ (drawn >> 15)) * _SCRAMBLE
    return column * stride + ((drawn >> 16) & (stride - 1))


@triton.jit
def prepare_kernel(
    positions, requests, lengths, values, scales, page_table, ends, levels, level_keys, last_seen, sample_values, sample_scales, table,
    num_rows, num_requests, room_tokens, num_pages, stride, columns, page_words, table_row, table_page,
    PAGE: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """What the others ask of rows, and the sample: keys of ``sampled_key``, ``columns`` a request, in pages of its own one after another.

    ``ends``: keys that a row sees, none of a request that is not there. Levels that let all pass but the least score: a row that needs keys
    of that is done again, where those are known from absent ones. ``last_seen``: the last of the sample's
    columns that a row sees. Values of keys come as WORDS of four, int32; a page is ``page_words``, keys before scales. A key that
    its request does not hold, or whose page is not there, has a scale of NaN.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < num_rows
    request = tl.load(requests + at, mask=here, other=-1)
    known = (request >= 0) & (request < num_requests)
    held = tl.minimum(tl.load(lengths + tl.where(known, request, 0), mask=known, other=0), room_tokens)
    end = tl.maximum(tl.minimum(tl.load(positions + at, mask=here, other=-1), held - 1) + 1, 0)
    tl.store(ends + at, end, mask=here)
    tl.store(levels + at, tl.full([BLOCK], LEAST_SCORE, tl.float32), mask=here)
    tl.store(level_keys + at, tl.full([BLOCK], -1, tl.int32), mask=here)
    if SAMPLED:
        column = (end // stride).to(tl.int32)
        tl.store(last_seen + at, column - 1 + (sampled_key(column, stride) < end).to(tl.int32), mask=here)
        owner = (at // columns).to(tl.int64)
        key = sampled_key(at % columns, stride)
        inside = owner < num_requests
        held = tl.minimum(tl.load(lengths + owner, mask=inside, other=0), room_tokens)
        page = tl.load(page_table + owner * table_row + key // PAGE * table_page, mask=key < held, other=-1)
        there = (page >= 0) & (page < num_pages)
        word = tl.arange(0, WORDS)
        start = page.to(tl.int64) * page_words
        copied = tl.load(values + (start + key % PAGE * WORDS)[:, None] + word[None, :], mask=there[:, None], other=0)
        scale = tl.load(scales + start + PAGE * WORDS + key % PAGE, mask=there, other=float("nan"))
        to = (at // PAGE).to(tl.int64) * (PAGE * (WORDS + 1))
        tl.store(sample_values + (to + at % PAGE * WORDS)[:, None] + word[None, :], copied, mask=inside[:, None])
        tl.store(sample_scales + to + PAGE * WORDS + at % PAGE, scale, mask=inside)
        tl.store(table + at // PAGE, at // PAGE, mask=inside & (at % PAGE == 0))


@triton.jit
def level_kernel(
    sample, ends, levels, level_keys, width, stride, want, slack, whole, sample_row, BLOCK: tl.constexpr, WARPS: tl.constexpr
):
    """One row's level: the pair (score, key) that ``want`` to ``want + slack`` of the sample's pairs do not lie below.

    A row of up to ``whole`` keys keeps the one it has: all of it is collected. So does one whose sample has too few scores above that,
    which its lists will not hold.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    score = tl.load(sample + row * sample_row + column, mask=column < width, other=float("-inf"))
    if tl.load(ends + row) <= whole:
        return
    score = tl.where(score == score, score, float("-inf"))
    held = tl.reshape(score, [BLOCK // (128 * WARPS), 32 * WARPS, 4])
    want = want + row.to(tl.int32) * 0
    guess, reach = normal_guess(held, want, width)
    low, count, above = find(held, want, slack, want * 0 + BLOCK, guess, reach)
    if low < LOWEST:
        return
    level = key_number(low)
    if level == LEAST_SCORE:
        return
    level_key = want * 0 + _SIGN
    if count > want + slack:
        # A plateau is cut at a key, so that not all of it passes: a column stands for as many keys as the stride.
        tied = (score == level).to(tl.int32)
        upto = tl.cumsum(tied, axis=0)
        last = tl.max(tl.where((tied > 0) & (upto <= want - above), column, -1), axis=0)
        level_key = (last + 1) * stride - 1
    tl.store(levels + row, level)
    tl.store(level_keys + row, level_key)
