# mypy: disable-error-code="no-untyped-def"
"""The Hopper kernel behind ``gluon.py``, and how its warps share the work.

A program takes one query, up to 64 heads and one share of the query's slots, as ``mla_kernel`` does, and stores what that stores. Four
warps fetch FP8 rows and four make bf16 keys of them (``gluon_latents.py``). Of the eight that multiply, four lead: they take scores,
softmax and 128 dims of the values. Four follow with the other 384 dims, beside the next tile's scores. Shared memory holds the queries, two
tiles of keys and one of probabilities: 226 of the 227 KiB there are, so one program runs on a multiprocessor at a time.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from thresher.cache.device import wait_for_inputs
from thresher.ops.sparse_attend.gluon_latents import convert_latents, load_latents, slots_at


@gluon.jit
def _load_queries(q_ptr, heads, q_head_stride, q_low, q_tail, HALF: gl.constexpr):
    """Half of the program's heads into shared memory, by four warps."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    head = HALF * 32 + gl.arange(0, 32, layout=gl.SliceLayout(1, layout))
    here = (head < heads)[:, None]
    row = q_ptr + (head * q_head_stride)[:, None]
    low = gl.load(row + gl.arange(0, 512, layout=gl.SliceLayout(0, layout))[None, :], mask=here, other=0.0)
    tail = gl.load(row + 512 + gl.arange(0, 64, layout=gl.SliceLayout(0, layout))[None, :], mask=here, other=0.0)
    q_low.slice(HALF * 32, 32).store(low)
    q_tail.slice(HALF * 32, 32).store(tail)
    fence_async_shared()


@gluon.jit
def _store_dims(out_ptr, acc, heads, FIRST: gl.constexpr):
    layout: gl.constexpr = acc.type.layout
    head = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    dim = FIRST + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, layout))
    gl.store(out_ptr + (head * 512)[:, None] + dim[None, :], acc, mask=(head < heads)[:, None])


@gluon.jit
def _lead(
    q_ptr, row_ptr, out_ptr, lse_ptr, total_ptr, heads, scale2, first, count, topk, num_slots, q_head_stride,
    q_low, q_tail, lows, highs, ropes, probs_smem, factors, half, full, empty, ready, told, used, SPLIT: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """Scores, softmax and values of dims 0 to 127. By four warps, so that a row's maximum is found within one.

    ``told`` says that a tile's probabilities and factors are there, and at last the norms.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    _load_queries(q_ptr, heads, q_head_stride, q_low, q_tail, 0)
    gl.thread_barrier()
    mbarrier.wait(ready, 0)

    offset = gl.arange(0, TILE, layout=gl.SliceLayout(0, SCORES))
    peak = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    # Summed over slots at the end only: a thread's own columns until then.
    total = gl.zeros([64, TILE], gl.float32, layout=SCORES)
    acc = gl.zeros([64, 128], gl.float32, layout=VALUES)
    none = gl.zeros([64, TILE], gl.float32, layout=SCORES)
    for i in range(count):
        buffer = i & 1
        phase = (i >> 1) & 1
        _, valid = slots_at(row_ptr, first + i * TILE + offset, topk, num_slots)
        low = lows.index(buffer)
        mbarrier.wait(half.index(buffer), phase)
        scores = warpgroup_mma(q_tail, ropes.index(buffer).permute([1, 0]), none, use_acc=False, is_async=True)
        scores = warpgroup_mma(q_low.slice(0, 256, dim=1), low.permute([1, 0]), scores, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.wait(full.index(buffer), phase)
        scores = warpgroup_mma(q_low.slice(256, 256, dim=1), highs.index(buffer).permute([1, 0]), scores, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        scores = gl.where(valid[None, :], scores * scale2, float("-inf"))
        new = gl.maximum(peak, gl.max(scores, 1))
        base = gl.where(new == float("-inf"), 0.0, new)
        probs = gl.exp2(scores - base[:, None])
        factor = gl.exp2(peak - base)
        peak = new
        total = total * factor[:, None] + probs
        mbarrier.wait(used, (i & 1) ^ 1)
        probs_smem.store(probs.to(gl.bfloat16))
        factors.store(factor)
        fence_async_shared()
        mbarrier.arrive(told)
        acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, VALUES))[:, None]
        acc = warpgroup_mma(probs_smem, low.slice(0, 128, dim=1), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(buffer))

    # Halves of a tile by themselves first: an order that stays the same, and so do the bits, whichever warps hold which slots.
    total = gl.convert_layout(gl.sum(gl.sum(total.reshape([64, 2, TILE // 2]), 2), 1), gl.SliceLayout(1, SCORES))
    head = gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    if SPLIT:
        gl.store(lse_ptr + head, peak, mask=head < heads)
        gl.store(total_ptr + head, total, mask=head < heads)
    else:
        norm = gl.where(total == 0, 0.0, 1.0 / total)
        mbarrier.wait(used, (count & 1) ^ 1)
        factors.store(norm)
        mbarrier.arrive(told)
        lse = gl.where(total == 0, float("-inf"), (peak + gl.log2(total)) * 0.6931471805599453)
        gl.store(lse_ptr + head, lse, mask=head < heads)
        acc = acc * gl.convert_layout(norm, gl.SliceLayout(1, VALUES))[:, None]
    _store_dims(out_ptr, acc, heads, 0)


@gluon.jit
def _follow(
    q_ptr, out_ptr, heads, count, q_head_stride, q_low, q_tail, lows, highs, probs_smem, factors, empty, ready, told, used,
    SPLIT: gl.constexpr,
):  # fmt: skip
    """Values of dims 128 to 511 of tiles that ``_lead`` has told of. ``used`` says that probabilities and factors have been read."""
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    _load_queries(q_ptr, heads, q_head_stride, q_low, q_tail, 1)
    mbarrier.arrive(ready)

    acc1 = gl.zeros([64, 128], gl.float32, layout=VALUES)
    acc2 = gl.zeros([64, 256], gl.float32, layout=VALUES)
    for i in range(count):
        buffer = i & 1
        mbarrier.wait(told, i & 1)
        factor = factors.load(gl.SliceLayout(1, VALUES))[:, None]
        acc1 = warpgroup_mma(probs_smem, lows.index(buffer).slice(128, 128, dim=1), acc1 * factor, is_async=True)
        acc2 = warpgroup_mma(probs_smem, highs.index(buffer), acc2 * factor, is_async=True)
        acc1, acc2 = warpgroup_mma_wait(0, deps=[acc1, acc2])
        mbarrier.arrive(used)
        mbarrier.arrive(empty.index(buffer))

    if not SPLIT:
        mbarrier.wait(told, count & 1)
        norm = factors.load(gl.SliceLayout(1, VALUES))[:, None]
        acc1 = acc1 * norm
        acc2 = acc2 * norm
    _store_dims(out_ptr, acc1, heads, 128)
    _store_dims(out_ptr, acc2, heads, 256)


@gluon.jit(do_not_specialize=["shares", "share_tiles"])
def decode_kernel(
    q_ptr, data_ptr, slots_ptr, counts_ptr, out_ptr, lse_ptr, total_ptr, scale2, num_slots, heads, topk, shares, share_tiles,
    page_units, slot_units, q_stride, q_head_stride, slots_stride,
    SPLIT: gl.constexpr, PAGE: gl.constexpr, TILE: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """``data_ptr``: the cache as int32, pages of PAGE slots; strides of pages and slots in units of 16 bytes. ``scale2`` holds log2(e).
    ``counts_ptr``: None, or of each query how many columns hold all of its slots: its shares are as many, of those columns alone."""
    head_tiles = gl.cdiv(heads, 64)
    pid = gl.program_id(0)
    share = pid % shares
    head0 = pid // shares % head_tiles * 64
    query = (pid // shares // head_tiles).to(gl.int64)
    row_ptr = slots_ptr + query * slots_stride
    row0 = (query * shares + share) * heads + head0
    q_ptr += query * q_stride + head0 * q_head_stride
    out_ptr += row0 * 512
    lse_ptr += row0
    total_ptr += row0
    heads -= head0

    KEYS: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    q_low = gl.allocate_shared_memory(gl.bfloat16, [64, 512], KEYS)
    q_tail = gl.allocate_shared_memory(gl.bfloat16, [64, 64], KEYS)
    lows = gl.allocate_shared_memory(gl.bfloat16, [2, TILE, 256], KEYS)
    highs = gl.allocate_shared_memory(gl.bfloat16, [2, TILE, 256], KEYS)
    ropes = gl.allocate_shared_memory(gl.bfloat16, [2, TILE, 64], KEYS)
    probs = gl.allocate_shared_memory(gl.bfloat16, [64, TILE], KEYS)
    factors = gl.allocate_shared_memory(gl.float32, [64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    landed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    half = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for b in gl.static_range(2):
        mbarrier.init(landed.index(b), count=1)
        mbarrier.init(half.index(b), count=1)
        mbarrier.init(full.index(b), count=1)
        mbarrier.init(empty.index(b), count=2)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    told = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    used = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    mbarrier.init(told, count=1)
    mbarrier.init(used, count=1)
    wait_for_inputs(True)
    tiles = gl.cdiv(topk, TILE)
    if counts_ptr is not None:
        tiles = gl.minimum(gl.cdiv(gl.load(counts_ptr + query).to(gl.int32), TILE), tiles)
        share_tiles = gl.cdiv(tiles, shares)
    first = share * share_tiles * TILE
    count = gl.maximum(gl.minimum(share_tiles, tiles - share * share_tiles), 0)
    gl.thread_barrier()

    gl.warp_specialize(
        [
            (_lead, (q_ptr, row_ptr, out_ptr, lse_ptr, total_ptr, heads, scale2, first, count, topk, num_slots, q_head_stride,
                     q_low, q_tail, lows, highs, ropes, probs, factors, half, full, empty, ready, told, used, SPLIT, TILE)),
            (_follow, (q_ptr, out_ptr, heads, count, q_head_stride, q_low, q_tail, lows, highs, probs, factors, empty, ready, told, used,
                       SPLIT)),
            (convert_latents, (data_ptr, row_ptr, first, count, topk, num_slots, page_units, slot_units, lows, highs, landed, half, full,
                               PAGE, TILE)),
            (load_latents, (data_ptr, row_ptr, first, count, topk, num_slots, page_units, slot_units, highs, ropes, landed, empty,
                            PAGE, TILE)),
        ],
        [4, 4, 4],
        REGISTERS,
    )  # fmt: skip
