# mypy: disable-error-code="no-untyped-def"
"""How scores of a tile become entries of lists: what ``gluon_kernels.py`` does after its products."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from thresher.ops.index_score.gluon_tiles import NO_REQUEST, along, sight

NEVER = gl.constexpr(0x7FC00000)  # NaN: nothing passes it
SPAN = gl.constexpr(60)  # tiles in a row, at most, before it is looked at whether a list is full


@gluon.jit
def first_of_run(begin, run, runs):
    """The first number from ``begin`` on that belongs to the run: run r of R has every R-th from r on."""
    return begin + (run + runs - begin % runs) % runs


@gluon.jit
def halves(x, SUB: gl.constexpr):
    """``[64, SUB, 2, 4]`` to two of ``[4, 8, SUB, 2, 4]``: the first and the last 8 of each warp's 16 keys. A thread holds one of each."""
    return gl.split(gl.permute(gl.reshape(x, [4, 2, 8, SUB, 2, 4]), (0, 2, 3, 4, 5, 1)))


@gluon.jit
def rows_and_places(SUB: gl.constexpr, PLACE: gl.constexpr):
    """Of ``[4, 8, SUB, 2, 4]`` which of a consumer's rows, which key of a tile, the first of two 8 apart, and which of a run's lists."""
    warp, lane = along(4, 0, 5, PLACE), along(8, 1, 5, PLACE)
    row = along(SUB, 2, 5, PLACE) * 8 + along(2, 3, 5, PLACE) * 4 + along(4, 4, 5, PLACE)
    return row, warp * 16 + lane, warp * 8 + lane


@gluon.jit
def read_rows(row, owners, positions, lengths, levels, level_keys, num_queries, num_keys, num_requests):
    """Rows' ends, owners, levels, and the key from which a score equal to the level no longer passes."""
    _start, end, owner = sight(row, positions, positions, owners, lengths, num_queries, num_keys, num_requests, True)
    here = row < num_queries
    level = gl.load(levels + row, mask=here, other=float("inf"))
    tie_end = gl.minimum(gl.load(level_keys + row, mask=here, other=-1), 2**31 - 2) + 1
    return end, owner, level, tie_end


@gluon.jit
def append_quick(score, bar, key, at, lists):
    """Append the scores not below ``bar`` to the threads' lists, as (score bits, key).

    ``at``, bytes from the address ``lists`` on, is where a list goes on; returned as it is then.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .b64 to;
        setp.ge.f32 p, $1, $2;
        cvt.u64.u32 to, $4;
        add.s64 to, to, $5;
        @p st.global.v2.b32 [to], {$3, $1};
        mov.b32 $0, $4;
        @p add.u32 $0, $0, 8;
        }""",
        "=&r,r,r,r,r,l",
        [score, bar, key, at, lists.to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def append_careful(score, key, end, level, tie_end, at, lists, list_start, ROOM: gl.constexpr):
    """The same by the rule itself: a larger score than the level, or the level's own before ``tie_end``, at a key before the row's end.

    Lengths go on counting where ROOM ends.
    """
    keep = ((score > level) | ((score == level) & (key < tie_end))) & (key < end)
    pair = (score.to(gl.int32, bitcast=True).to(gl.int64) << 32) | key.to(gl.int64)
    gl.store(lists + (at >> 3), pair, mask=keep & (at - list_start < ROOM * 8))
    return at + keep.to(gl.int32) * 8


@gluon.jit
def append_two(s0, s1, quick, bar, key, end, level, tie_end, at, lists, list_start, ROOM: gl.constexpr):
    """Append a thread's scores of two keys 8 apart, by the bar alone if ``quick``."""
    if quick:
        at = append_quick(s0, bar, key, at, lists)
        at = append_quick(s1, bar, key + 8, at, lists)
    else:
        at = append_careful(s0, key, end, level, tie_end, at, lists, list_start, ROOM)
        at = append_careful(s1, key + 8, end, level, tie_end, at, lists, list_start, ROOM)
    return at


@gluon.jit
def bar_at(begin, end, level, tie_end, full):
    """What a row's scores must not be below to pass, from key ``begin`` on, as long as it does not end or stop taking ties.

    A score is not below it if and only if it passes. Where a row has ended or a list has overflowed (its row is done again) nothing passes;
    where ties no longer do, it is the number after the level.
    """
    bits = level.to(gl.int32, bitcast=True)
    after = gl.where(level == 0.0, 1, gl.where(bits < 0, bits - 1, bits + 1))
    return gl.where((end <= begin) | full, NEVER, gl.where(tie_end <= begin, after, bits)).to(gl.float32, bitcast=True)


@gluon.jit
def look_ahead(turn, runs, ends, ties, end, level, tie_end, full, SPAN: gl.constexpr, KEYS_OF_TURN: gl.constexpr):
    """``(edge, bar)``: the run's turns from ``turn`` on and before ``edge``, ``SPAN`` at most, may append by the bar alone.

    ``ends``, ``ties``: of all rows at hand, which do not change in such turns; the others of the thread's own.
    """
    begin = turn * KEYS_OF_TURN
    change = gl.minimum(
        gl.where(ends > begin, ends // KEYS_OF_TURN, NO_REQUEST), gl.where(ties > begin, ties // KEYS_OF_TURN, NO_REQUEST)
    )
    return gl.minimum(turn + SPAN * runs, gl.min(change, 0)), bar_at(begin, end, level, tie_end, full)


@gluon.jit
def turns_ahead(turn, last, edge, runs, SPAN: gl.constexpr):
    """``(quick, careful, upto)``: of the run's turns from ``turn`` on and before ``last`` those before ``quick`` are before the edge, those
    from ``careful`` on and before ``upto`` are not; ``SPAN`` in all, at most."""
    upto = gl.minimum(last, turn + SPAN * runs)
    quick = gl.minimum(upto, edge)
    return quick, turn + (quick - turn + runs - 1) // runs * runs, upto
