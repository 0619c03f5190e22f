# mypy: disable-error-code="no-untyped-def"
"""What Hopper kernels over 33 to 64 heads have in common: four groups of four warps, each with one chunk of 128 (query, head) columns.

More groups with less each keep the tensor cores busier than two groups with two chunks (``gluon_tiles.py``): while one waits for its
product, three add up theirs. A chunk is two queries of 64 heads, padded.

**Columns.** Column ``block * 8 + lane * 2 + query``: lane l of four holds both queries' heads of the classes 2 l and 2 l + 1 modulo 8,
the first in even blocks. It adds each class up in ascending order and its two classes to one another; lanes are then added 2 apart, and
1 apart. That is the order of ``triton.py``: the same bits.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from thresher.ops.index_score.gluon_tiles import COLUMNS, KEYS, along, load_chunk, twice_relu

GROUPS = gl.constexpr(4)
QUERIES = gl.constexpr(2)  # of a chunk
BLOCK = gl.constexpr(8)  # queries of a program


@gluon.jit
def row_and_head(column):
    """Which of a chunk's queries, and which head, a column is."""
    return column % 2, column // 16 * 8 + column % 8 // 2 * 2 + column // 8 % 2


@gluon.jit
def load_queries(
    q, weights, first, num_queries, num_heads, q_row, q_head, w_row, buffer, zero, D: gl.constexpr, ACC: gl.constexpr
):  # fmt: skip
    """The chunk of the queries from ``first`` on into ``buffer``; returns half its weights ``[64, 128]``."""
    LOAD: gl.constexpr = gl.BlockedLayout([1, 16], [512 // D, D // 16], [4, 1], [1, 0])
    row, head = row_and_head(gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, ACC)) ^ 1)
    load_row, load_head = row_and_head(gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, LOAD)))
    w = load_chunk(
        q, weights, first, load_row, load_head, row, head, num_queries, num_heads, q_row, q_head, w_row, buffer, zero, D, LOAD, True
    )
    fence_async_shared()
    return w


@gluon.jit
def _class_sums(dots, weights, sums, BLOCKS: gl.constexpr, FIRST: gl.constexpr):
    """``[64, BLOCKS, 4, 2]`` onto ``[64, 2, 4, 2]``: blocks ascending, each onto the sum of its number modulo 2."""
    if BLOCKS == 2:
        sums = dots * weights if FIRST else gl.fma(dots, weights, sums)
    else:
        low, high = gl.split(gl.permute(gl.reshape(dots, [KEYS, 2, BLOCKS // 2, 4, 2]), (0, 2, 3, 4, 1)))
        low_w, high_w = gl.split(gl.permute(gl.reshape(weights, [KEYS, 2, BLOCKS // 2, 4, 2]), (0, 2, 3, 4, 1)))
        sums = _class_sums(low, low_w, sums, BLOCKS // 2, FIRST)
        sums = _class_sums(high, high_w, sums, BLOCKS // 2, False)
    return sums


@gluon.jit
def _across_four(x, lane):
    """``[64, 4, 2]``, four lanes' sums of two keys and two queries: ``[4, 8, 2, 2]``, the lanes added up, and each of them keeps one."""
    low, high = gl.split(gl.permute(gl.reshape(x, [4, 2, 8, 4, 2]), (0, 2, 3, 4, 1)))
    low0, low1 = gl.split(low)
    high0, high1 = gl.split(high)
    one = gl.inline_asm_elementwise(
        """{
        .reg .pred p, q;
        .reg .b32 s0, k0, s1, k1;
        and.b32 s0, $5, 2;
        setp.ne.s32 p, s0, 0;
        and.b32 s1, $5, 1;
        setp.ne.s32 q, s1, 0;
        selp.b32 s0, $1, $2, p;
        selp.b32 k0, $2, $1, p;
        selp.b32 s1, $3, $4, p;
        selp.b32 k1, $4, $3, p;
        shfl.sync.bfly.b32 s0, s0, 2, 0x1f, 0xffffffff;
        shfl.sync.bfly.b32 s1, s1, 2, 0x1f, 0xffffffff;
        add.rn.f32 k0, k0, s0;
        add.rn.f32 k1, k1, s1;
        selp.b32 s0, k0, k1, q;
        selp.b32 s1, k1, k0, q;
        shfl.sync.bfly.b32 s0, s0, 1, 0x1f, 0xffffffff;
        add.rn.f32 $0, s1, s0;
        }""",
        "=&r,r,r,r,r,r", [low0, low1, high0, high1, lane], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip
    return gl.permute(gl.reshape(one, [4, 8, 2, 2]), (0, 1, 3, 2))


@gluon.jit
def sums_of_heads(dots, weights, lane, zero):
    """A chunk's products to its sums over heads ``[4, 8, 2, 2]``: key ``16 a + 8 c + b`` and query d for the indices a, b, c, d.

    ``lane``: what ``lanes(zero)`` returns. ``zero`` lends its shape.
    """
    dots = twice_relu(dots)
    shape: gl.constexpr = [KEYS, 16, 4, 2]
    sums = _class_sums(gl.reshape(dots, shape), gl.reshape(weights, shape), gl.reshape(zero, shape), 16, True)
    even, odd = gl.split(gl.permute(sums, (0, 2, 3, 1)))
    return _across_four(even + odd, lane)


@gluon.jit
def lanes(zero):
    """The thread's number modulo 4, int32 ``[4, 8, 4]``; ``zero [64, 128]`` is in the layout of products."""
    low, _high = gl.split(gl.permute(gl.sum(gl.reshape(zero, [4, 2, 8, 16, 4, 2]), 3), (0, 2, 3, 4, 1)))
    low, _high = gl.split(low)
    LAYOUT: gl.constexpr = low.type.layout
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    return gl.expand_dims(gl.expand_dims(lane, 0), 1) + gl.zeros([4, 8, 4], gl.int32, LAYOUT)


@gluon.jit
def scales_of(buffer, LAYOUT: gl.constexpr):
    """A tile's scales ``[1, 64]`` from shared memory, ``[4, 8, 2, 1]`` beside sums over heads."""
    return gl.expand_dims(buffer.reshape([4, 2, 8]).permute((0, 2, 1)).load(gl.SliceLayout(3, LAYOUT)), 3)


@gluon.jit
def places(LAYOUT: gl.constexpr):
    """``(key, query)``: where in a tile and which of a chunk's queries the sums over heads are."""
    return along(4, 0, 4, LAYOUT) * 16 + along(8, 1, 4, LAYOUT) + along(2, 2, 4, LAYOUT) * 8, along(QUERIES, 3, 4, LAYOUT)
