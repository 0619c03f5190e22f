# mypy: disable-error-code="no-untyped-def"
"""The Hopper kernel behind ``gluon.py``, and how its warps share the work.

A program takes one query, up to 64 heads and one share of the query's slots, as ``mla_kernel`` does, and stores what that stores. Four
producer warps load FP8 rows a tile ahead, convert them and store them as bf16 keys into one of two buffers; eight warps multiply the
other. Shared memory holds the queries, two tiles of keys and one of probabilities: 226 of the 227 KiB there are, so one program runs on
a multiprocessor at a time.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

# Four e4m3 values and their scale -> four bf16 values: the fp32 product rounded once, whatever the scale.
EXPAND = gl.constexpr("""
{
    .reg .b16 a, b, h0, h1, h2, h3;
    .reg .b32 x, y;
    .reg .f32 f0, f1, f2, f3, s;
    mov.b32 s, $3;
    mov.b32 {a, b}, $2;
    cvt.rn.f16x2.e4m3x2 x, a;
    cvt.rn.f16x2.e4m3x2 y, b;
    mov.b32 {h0, h1}, x;
    mov.b32 {h2, h3}, y;
    cvt.f32.f16 f0, h0;
    cvt.f32.f16 f1, h1;
    cvt.f32.f16 f2, h2;
    cvt.f32.f16 f3, h3;
    mul.f32 f0, f0, s;
    mul.f32 f1, f1, s;
    mul.f32 f2, f2, s;
    mul.f32 f3, f3, s;
    cvt.rn.bf16x2.f32 $0, f1, f0;
    cvt.rn.bf16x2.f32 $1, f3, f2;
}
""")


@gluon.jit
def _slots(row_ptr, offset, topk, num_slots):
    """Slots at ``offset``, 0 where there is none, and which are there."""
    slot = gl.load(row_ptr + offset, mask=offset < topk, other=-1)
    valid = (slot >= 0) & (slot < num_slots)
    return gl.where(valid, slot, 0), valid


@gluon.jit
def _group(words, scale, valid):
    return gl.load(words, mask=valid[:, None], other=0), gl.load(scale, mask=valid, other=0)


@gluon.jit
def _fill(keys, words, scale, G: gl.constexpr):
    """128 values of every slot of the tile, converted, into their place in ``keys`` (int32, two bf16 each)."""
    low, high = gl.inline_asm_elementwise(EXPAND, "=r,=r,r,r", [words, scale[:, None]], dtype=(gl.int32, gl.int32), is_pure=True, pack=1)
    pairs = gl.join(low, high).reshape([words.shape[0], 64])
    keys.slice(G * 64, 64, dim=1).store(pairs)


@gluon.jit
def _produce(
    data_ptr, row_ptr, first, count, topk, num_slots, page_size, page_units, slot_units, keys, ropes, full, empty,
    TILE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Load a tile of slots a whole tile ahead; convert and store it once its buffer is free."""
    # Neighbouring rows share a group of lanes, so that 16-byte stores into swizzled rows meet no bank twice.
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [WARPS, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    WORDS: gl.constexpr = gl.NVMMASharedLayout(128, 32)
    within = gl.arange(0, TILE, layout=rows)
    column = gl.arange(0, 32, layout=gl.SliceLayout(0, layout))[None, :]
    slot, valid = _slots(row_ptr, first + within, topk, num_slots)
    for i in range(count):
        buffer = i & 1
        unit = (slot // page_size).to(gl.int64) * page_units + (slot % page_size).to(gl.int64) * slot_units
        row = data_ptr + unit * 4
        words = row[:, None] + column
        w0, s0 = _group(words, row + 128, valid)
        w1, s1 = _group(words + 32, row + 129, valid)
        w2, s2 = _group(words + 64, row + 130, valid)
        w3, s3 = _group(words + 96, row + 131, valid)
        rope = gl.load(words + 132, mask=valid[:, None], other=0)
        slot, valid = _slots(row_ptr, first + (i + 1) * TILE + within, topk, num_slots)
        mbarrier.wait(empty.index(buffer), ((i >> 1) & 1) ^ 1)
        key = keys.index(buffer)._reinterpret(gl.int32, [TILE, 256], WORDS)
        _fill(key, w0, s0, 0)
        _fill(key, w1, s1, 1)
        _fill(key, w2, s2, 2)
        _fill(key, w3, s3, 3)
        ropes.index(buffer)._reinterpret(gl.int32, [TILE, 32], WORDS).store(rope)
        fence_async_shared()
        mbarrier.arrive(full.index(buffer))


@gluon.jit
def _consume(
    q_ptr, row_ptr, out_ptr, lse_ptr, total_ptr, row0, head0, heads, scale2, first, count, topk, num_slots, q_head_stride,
    q_low, q_tail, keys, ropes, probs_smem, full, empty, SPLIT: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """Scores, softmax and values. Each warpgroup takes half of a tile's slots for the scores and half of the dims for the values."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, TILE // 2, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16])
    loads: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    q_head = gl.arange(0, 64, layout=gl.SliceLayout(1, loads))
    q_here = (head0 + q_head < heads)[:, None]
    q_row = q_ptr + (q_head * q_head_stride)[:, None]
    q_low.store(gl.load(q_row + gl.arange(0, 512, layout=gl.SliceLayout(0, loads))[None, :], mask=q_here, other=0.0))
    q_tail.store(gl.load(q_row + 512 + gl.arange(0, 64, layout=gl.SliceLayout(0, loads))[None, :], mask=q_here, other=0.0))
    fence_async_shared()
    gl.thread_barrier()

    offset = gl.arange(0, TILE, layout=gl.SliceLayout(0, SCORES))
    peak = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    # Summed over slots at the end only: a thread's own columns until then.
    total = gl.zeros([64, TILE], gl.float32, layout=SCORES)
    acc = gl.zeros([64, 512], gl.float32, layout=VALUES)
    none = gl.zeros([64, TILE], gl.float32, layout=SCORES)
    for i in range(count):
        buffer = i & 1
        _, valid = _slots(row_ptr, first + i * TILE + offset, topk, num_slots)
        key = keys.index(buffer)
        rope = ropes.index(buffer)
        mbarrier.wait(full.index(buffer), (i >> 1) & 1)
        scores = warpgroup_mma(q_tail, rope.permute([1, 0]), none, use_acc=False, is_async=True)
        scores = warpgroup_mma(q_low, key.permute([1, 0]), scores, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        scores = gl.where(valid[None, :], scores * scale2, float("-inf"))
        new = gl.maximum(peak, gl.max(scores, 1))
        base = gl.where(new == float("-inf"), 0.0, new)
        probs = gl.exp2(scores - base[:, None])
        factor = gl.exp2(peak - base)
        peak = new
        total = total * factor[:, None] + probs
        probs_smem.store(probs.to(gl.bfloat16))
        fence_async_shared()
        acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, VALUES))[:, None]
        acc = warpgroup_mma(probs_smem, key, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(buffer))

    total = gl.sum(total, 1)
    head = gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    here = head0 + head < heads
    if SPLIT:
        gl.store(lse_ptr + row0 + head, peak, mask=here)
        gl.store(total_ptr + row0 + head, total, mask=here)
    else:
        lse = gl.where(total == 0, float("-inf"), (peak + gl.log2(total)) * 0.6931471805599453)
        gl.store(lse_ptr + row0 + head, lse, mask=here)
        norm = gl.where(total == 0, 0.0, 1.0 / total)
        acc = acc * gl.convert_layout(norm, gl.SliceLayout(1, VALUES))[:, None]
    head = gl.arange(0, 64, layout=gl.SliceLayout(1, VALUES))
    dim = gl.arange(0, 512, layout=gl.SliceLayout(0, VALUES))
    out = out_ptr + row0 * 512 + (head * 512)[:, None] + dim[None, :]
    gl.store(out, acc, mask=(head0 + head < heads)[:, None])


@gluon.jit(do_not_specialize=["shares", "share_tiles"])
def decode_kernel(
    q_ptr,
    data_ptr,
    slots_ptr,
    out_ptr,
    lse_ptr,
    total_ptr,
    scale2,
    num_slots,
    heads,
    topk,
    shares,
    share_tiles,
    page_size,
    page_units,
    slot_units,
    q_stride,
    q_head_stride,
    slots_stride,
    SPLIT: gl.constexpr,
    TILE: gl.constexpr,
    PRODUCERS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """``data_ptr``: the cache as int32. Strides of pages and slots in units of 16 bytes. ``scale2`` holds log2(e)."""
    head_tiles = gl.cdiv(heads, 64)
    pid = gl.program_id(0)
    share = pid % shares
    head0 = pid // shares % head_tiles * 64
    query = (pid // shares // head_tiles).to(gl.int64)
    first = share * share_tiles * TILE
    count = gl.minimum(share_tiles, gl.cdiv(topk - first, TILE))
    row_ptr = slots_ptr + query * slots_stride
    row0 = (query * shares + share) * heads + head0
    q_ptr += query * q_stride + head0 * q_head_stride

    KEYS: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    q_low = gl.allocate_shared_memory(gl.bfloat16, [64, 512], KEYS)
    q_tail = gl.allocate_shared_memory(gl.bfloat16, [64, 64], KEYS)
    keys = gl.allocate_shared_memory(gl.bfloat16, [2, TILE, 512], KEYS)
    ropes = gl.allocate_shared_memory(gl.bfloat16, [2, TILE, 64], KEYS)
    probs = gl.allocate_shared_memory(gl.bfloat16, [64, TILE], KEYS)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for b in gl.static_range(2):
        mbarrier.init(full.index(b), count=1)
        mbarrier.init(empty.index(b), count=1)
    gl.thread_barrier()

    gl.warp_specialize(
        [
            (_consume, (q_ptr, row_ptr, out_ptr, lse_ptr, total_ptr, row0, head0, heads, scale2, first, count, topk, num_slots,
                        q_head_stride, q_low, q_tail, keys, ropes, probs, full, empty, SPLIT, TILE)),
            (_produce, (data_ptr, row_ptr, first, count, topk, num_slots, page_size, page_units, slot_units, keys, ropes, full, empty,
                        TILE, PRODUCERS)),
        ],
        [PRODUCERS],
        [REGISTERS],
    )  # fmt: skip
