# mypy: disable-error-code="no-untyped-def"
"""What Hopper kernels that score many queries have in common, the columns of those with up to 32 heads among it.

**Columns.** A chunk's column is ``(group of 8 queries * heads + head) * 8 + query``: a thread of the matrix unit then holds all heads of
its queries, in eight classes modulo 8, and adds them up in the order of ``triton.py``: the same bits. A chunk has up to 16 heads, and
``SUB`` groups of 8 queries.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

NO_REQUEST = gl.constexpr(2**31 - 1)
KEYS = gl.constexpr(64)
COLUMNS = gl.constexpr(128)  # of a chunk
LEAST_SCORE = gl.constexpr(-3.4028234663852886e38)  # of a key that is there: -inf stands for one that is not
ABSENT = gl.constexpr(0x7FFFABCD)  # bits of a scale whose page is not there: a NaN that no cache holds


@gluon.jit
def there(score, scale):
    """Scores beside scales that lend themselves to their shape: -inf where there is no page, and only there."""
    least = gl.maximum(score, LEAST_SCORE, propagate_nan=tl.PropagateNan.ALL)
    return gl.where(scale.to(gl.int32, bitcast=True) == ABSENT, float("-inf"), least)


@gluon.jit
def twice_relu(dots):
    """``2 * max(dots, 0)``, NaN where those are: see ``triton_kernels.score_tile``."""
    return dots + gl.abs(dots)


@gluon.jit
def _sums(dots, weights, sums, SUB: gl.constexpr, HB: gl.constexpr, FIRST: gl.constexpr):
    """``[64, SUB, HB, 2, 4]`` to ``[64, SUB, 8, 2, 4]``: heads ascending, each onto the sum of its class modulo 8."""
    if HB == 8:
        sums = dots * weights if FIRST else gl.fma(dots, weights, sums)
    else:
        low, high = gl.split(gl.permute(gl.reshape(dots, [KEYS, SUB, 2, HB // 2, 2, 4]), (0, 1, 3, 4, 5, 2)))
        low_w, high_w = gl.split(gl.permute(gl.reshape(weights, [KEYS, SUB, 2, HB // 2, 2, 4]), (0, 1, 3, 4, 5, 2)))
        sums = _sums(low, low_w, sums, SUB, HB // 2, FIRST)
        sums = _sums(high, high_w, sums, SUB, HB // 2, False)
    return sums


@gluon.jit
def chunk_sums(dots, weights, sums, SUB: gl.constexpr, HB: gl.constexpr, FIRST: gl.constexpr):
    """A chunk's products onto the sums of its groups' heads; ``weights`` as ``load_chunk`` returns them."""
    dots = twice_relu(dots)
    return _sums(gl.reshape(dots, [KEYS, SUB, HB, 2, 4]), gl.reshape(weights, [KEYS, SUB, HB, 2, 4]), sums, SUB, HB, FIRST)


@gluon.jit
def whole_sums(sums, SUB: gl.constexpr):
    """The fixed tree over eight classes that one thread holds, ``[64, SUB, 8, 2, 4]``: ``[64, SUB, 2, 4]``.

    ((0 + 1) + (4 + 5)) + ((2 + 3) + (6 + 7)), as ``triton.py``: there a thread holds classes 2c
    and 2c + 1, and lanes c are added 2 apart, then 1 apart. Heads that are only padding are products of zeros, which change no sum.
    """
    a, b = gl.split(gl.permute(gl.reshape(sums, [KEYS, SUB, 4, 2, 2, 4]), (0, 1, 2, 4, 5, 3)))
    a, b = gl.split(gl.permute(gl.reshape(a + b, [KEYS, SUB, 2, 2, 2, 4]), (0, 1, 3, 4, 5, 2)))
    a, b = gl.split(gl.permute(a + b, (0, 1, 3, 4, 2)))
    return a + b


@gluon.jit
def ring(STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """The barriers of a ring of tiles in shared memory: a slot is full when its bytes are there, and empty when all consumers say so."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=CONSUMERS)
    fence_async_shared()
    return full, empty


@gluon.jit
def scale_ring(TILES: gl.constexpr):
    """Where tiles' scales stand, for a ring of ``TILES`` tiles: turn t's in ``t % (2 * STAGES)``, so that they last a round longer.

    The matrix unit has read a tile when its product is there. Scales are read by loads, which nothing waits for before their first use: a
    slot can be empty and filled again while a load is still under way, and was, in 7 % of one case's launches (docs/lab-log.md). A round
    later all of its consumers have used what they loaded.
    """
    return gl.allocate_shared_memory(gl.float32, [2 * TILES, 1, KEYS], gl.NVMMASharedLayout(0, 32, 2))


@gluon.jit
def along(size: gl.constexpr, DIM: gl.constexpr, RANK: gl.constexpr, LAYOUT: gl.constexpr):
    """0, 1, 2 ... along one of ``RANK`` dims, 1 wide in the others."""
    if RANK == 1:
        x = gl.arange(0, size, layout=LAYOUT)
    elif DIM < RANK - 1:
        x = gl.expand_dims(along(size, DIM, RANK - 1, gl.SliceLayout(RANK - 1, LAYOUT)), RANK - 1)
    else:
        x = gl.expand_dims(along(size, DIM - 1, RANK - 1, gl.SliceLayout(0, LAYOUT)), 0)
    return x


@gluon.jit
def sight(row, low, high, owners, lengths, num_queries, num_keys, num_requests, PAGED: gl.constexpr):
    """``(start, end, owner)`` of rows, int32. Rows that are not there have owner ``NO_REQUEST`` and see nothing.

    ``low`` and ``high`` hold starts and ends; when paged, ``high`` holds positions and a row sees its request from the start. A request
    that is not in the table is one more request, of no tokens.
    """
    here = row < num_queries
    limit = num_keys.to(gl.int64)
    if PAGED:
        request = gl.load(owners + row, mask=here, other=0)
        known = here & (request >= 0) & (request < num_requests)
        length = gl.load(lengths + gl.where(known, request, 0), mask=known, other=0)
        held = gl.minimum(gl.maximum(length, 0), limit)
        end = gl.minimum(gl.maximum(gl.load(high + row, mask=here, other=-1), -1), held - 1) + 1
        start = end * 0
        owner = gl.where(here, gl.where(known, request, num_requests), NO_REQUEST).to(gl.int32)
    else:
        start = gl.minimum(gl.maximum(gl.load(low + row, mask=here, other=0), 0), limit)
        end = gl.minimum(gl.maximum(gl.load(high + row, mask=here, other=0), 0), limit)
        owner = gl.where(here, 0, NO_REQUEST)
    return start.to(gl.int32), gl.where(here, end, 0).to(gl.int32), owner


@gluon.jit
def live(start, end, mine, t0, t1):
    """The tiles of ``t0 .. t1 - 1`` that some row of ``mine`` sees."""
    some = mine & (start < end)
    low = gl.min(gl.where(some, start, NO_REQUEST), 0) // KEYS
    high = (gl.max(gl.where(some, end, 0), 0) + KEYS - 1) // KEYS
    begin = gl.minimum(gl.maximum(low, t0), t1)
    return begin, gl.minimum(gl.maximum(high, begin), t1)


@gluon.jit
def find_page(table, tile, num_pages, PAGE: gl.constexpr):
    """A tile's page, 0 where the table names none, and whether it does. Contiguous keys are one page."""
    if PAGE > 0:
        page = gl.load(table + tile // (PAGE // KEYS))
        valid = (page >= 0) & (page < num_pages)
        page = gl.where(valid, page, 0)
    else:
        page, valid = tile * 0, tile >= 0
    return page, valid


@gluon.jit
def find_pages(table, tile, stop, num_pages, PAGE: gl.constexpr, TILES: gl.constexpr):
    """The pages of ``TILES`` tiles, and whether the table names them. Tiles from ``stop`` on, which no row sees, are the last one again."""
    page0, valid0 = find_page(table, gl.minimum(tile, stop - 1), num_pages, PAGE)
    page1, valid1 = page0, valid0
    if TILES == 2:
        page1, valid1 = find_page(table, gl.minimum(tile + 1, stop - 1), num_pages, PAGE)
    return page0, page1, valid0, valid1


@gluon.jit
def absent():
    """The scales of a tile whose page is not there, ``[1, 64]`` for one warp to store."""
    bits = gl.full([1, KEYS], ABSENT, gl.int32, gl.BlockedLayout([1, 1], [1, 32], [1, 1], [1, 0]))
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def fetch(
    k_desc, s_desc, page0, page1, valid0, valid1, tile0, tile1, slot, scale_slot, full, buffers, scale_buffers, nowhere,
    D: gl.constexpr, PAGE: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """Ask the copy engine for ``TILES`` tiles and their scales, into an empty slot and ``scale_slot``. A page's that is not there are
    ``ABSENT``."""
    scales: gl.constexpr = KEYS * 4
    if not valid0:
        scale_buffers.index(scale_slot * TILES).store(nowhere)
        fence_async_shared()
    if TILES == 1:
        if valid0:
            mbarrier.expect(full.index(slot), KEYS * D + scales)
        else:
            mbarrier.expect(full.index(slot), KEYS * D)
    else:
        if not valid1:
            scale_buffers.index(scale_slot * 2 + 1).store(nowhere)
            fence_async_shared()
        if valid0 & valid1:
            mbarrier.expect(full.index(slot), 2 * KEYS * D + 2 * scales)
        elif valid0 | valid1:
            mbarrier.expect(full.index(slot), 2 * KEYS * D + scales)
        else:
            mbarrier.expect(full.index(slot), 2 * KEYS * D)
    at0 = tile0 * KEYS % PAGE if PAGE > 0 else tile0 * KEYS
    if valid0:
        tma.async_copy_global_to_shared(s_desc, [page0, PAGE * D // 4 + at0], full.index(slot), scale_buffers.index(scale_slot * TILES))
    tma.async_copy_global_to_shared(k_desc, [page0, at0, 0], full.index(slot), buffers.index(slot * TILES))
    if TILES == 2:
        at1 = tile1 * KEYS % PAGE if PAGE > 0 else tile1 * KEYS
        if valid1:
            tma.async_copy_global_to_shared(s_desc, [page1, PAGE * D // 4 + at1], full.index(slot), scale_buffers.index(scale_slot * 2 + 1))
        tma.async_copy_global_to_shared(k_desc, [page1, at1, 0], full.index(slot), buffers.index(slot * 2 + 1))


@gluon.jit
def multiply(buffers, q, turn, zero, STAGES: gl.constexpr, D: gl.constexpr):
    """Begin the product of one chunk with the tile of this turn."""
    return warpgroup_mma(buffers.index(turn % STAGES).reshape([KEYS, D]), q, zero, use_acc=False, is_async=True)


@gluon.jit
def apart(beside):
    """A row of columns' numbers, from those of the columns beside them: ``beside[c]`` is column ``c ^ 1``'s.

    A thread has columns 2 c and 2 c + 1, and their products and sums in registers of as even and as odd a number, which is a bank each:
    an instruction that multiplies and adds waits where all it reads is in one bank. Loaded as pairs from shared memory, the wrong way
    around, these are in the other bank. Where the compiler chose, up to all of a loop's had to wait: 12 % of its time at 32 heads, 3 % at
    64. It takes 1 us, which short loops do not win back (docs/lab-log.md).
    """
    LAYOUT: gl.constexpr = beside.type.layout
    pairs = gl.allocate_shared_memory(gl.float32, beside.shape, gl.SwizzledSharedLayout(1, 1, 1, [0]), beside)
    odd, even = gl.split(gl.reshape(pairs.load(LAYOUT), [beside.shape[0] // 2, 2]))
    return gl.convert_layout(gl.reshape(gl.join(even, odd), beside.shape), LAYOUT, assert_trivial=True)


@gluon.jit
def load_chunk(
    q, weights, first, load_row, load_head, row, head, num_queries, num_heads, q_row, q_head, w_row, buffer, zero,
    D: gl.constexpr, LOAD: gl.constexpr, APART: gl.constexpr,
):  # fmt: skip
    """A chunk's queries into its buffer; returns half its weights, of as many columns, beside the ``[64, columns]`` of ``zero``, for
    ``twice_relu``. What each column is is given once in either layout; where weights stand ``apart``, what the one beside it is.
    """
    used = (first + load_row < num_queries) & (load_head < num_heads)
    at = (first + load_row).to(gl.int64) * q_row + load_head * q_head
    dim = gl.arange(0, D, layout=gl.SliceLayout(0, LOAD))
    buffer.store(gl.load(q + at[:, None] + dim[None, :], mask=used[:, None], other=0.0))
    used = (first + row < num_queries) & (head < num_heads)
    w = gl.load(weights + (first + row).to(gl.int64) * w_row + head, mask=used, other=0.0) * 0.5
    if APART:
        w = apart(w)
    return gl.broadcast(gl.expand_dims(w, 0), zero)[0]


@gluon.jit
def row_and_head(column, HB: gl.constexpr):
    """Which of the consumer's queries, and which of a chunk's heads, a column is."""
    return column // (8 * HB) * 8 + column % 8, column // 8 % HB


@gluon.jit
def load_queries(
    q, weights, first, num_queries, num_heads, q_row, q_head, w_row, q_buffers, zero,
    HALF: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, HB: gl.constexpr, SUB: gl.constexpr, ACC: gl.constexpr,
    APART: gl.constexpr,
):  # fmt: skip
    """A consumer's queries into its buffers, two chunks with 32 heads, otherwise one; returns the halved weights of both."""
    LOAD: gl.constexpr = gl.BlockedLayout([1, 16], [512 // D, D // 16], [4, 1], [1, 0])
    row, head = row_and_head(gl.arange(0, SUB * HB * 8, layout=gl.SliceLayout(0, ACC)) ^ (1 if APART else 0), HB)
    load_row, load_head = row_and_head(gl.arange(0, SUB * HB * 8, layout=gl.SliceLayout(1, LOAD)), HB)
    w0 = load_chunk(
        q, weights, first, load_row, load_head, row, head, num_queries, num_heads, q_row, q_head, w_row,
        q_buffers.index(HALF * (HEADS // HB)), zero, D, LOAD, APART,
    )  # fmt: skip
    w1 = w0
    if HEADS > HB:
        w1 = load_chunk(
            q, weights, first, load_row, load_head + HB, row, head + HB, num_queries, num_heads, q_row, q_head, w_row,
            q_buffers.index(HALF * 2 + 1), zero, D, LOAD, APART,
        )  # fmt: skip
    fence_async_shared()
    return w0, w1
