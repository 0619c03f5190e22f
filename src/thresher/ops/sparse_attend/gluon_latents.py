# mypy: disable-error-code="no-untyped-def"
"""How FP8 latents become tiles of bf16 keys in shared memory, for ``gluon_kernels.py``: four warps fetch rows, four convert them.

A tile has three places: ``lows`` (dims 0 to 255), ``highs`` (dims 256 to 511) and ``ropes`` (the last 64), each with room for two tiles.
FP8 values of all 512 dims are as large as the keys of 256, so they wait for their conversion where the second half of the keys will be.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

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

# Of a tile's rows in registers, and of its places as int32. Neighbouring rows share a group of lanes and FP8 rows are swizzled by pairs, so
# that 16-byte accesses to either meet no bank twice.
ROWS = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))
FP8 = gl.constexpr(gl.SwizzledSharedLayout(16, 1, 2, [1, 0]))
KEYS = gl.constexpr(gl.NVMMASharedLayout(128, 32))


@gluon.jit
def slots_at(row_ptr, offset, topk, num_slots):
    """Slots at ``offset``, 0 where there is none, and which are there."""
    slot = gl.load(row_ptr + offset, mask=offset < topk, other=-1)
    valid = (slot >= 0) & (slot < num_slots)
    return gl.where(valid, slot, 0), valid


@gluon.jit
def _rows(data_ptr, slot, page_units, slot_units, PAGE: gl.constexpr):
    unit = (slot // PAGE).to(gl.int64) * page_units + (slot % PAGE).to(gl.int64) * slot_units
    return data_ptr + unit * 4


@gluon.jit
def load_latents(
    data_ptr, row_ptr, first, count, topk, num_slots, page_units, slot_units, highs, ropes, landed, empty,
    PAGE: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """Ask for a tile's FP8 rows and rope as soon as its place is free, zeros for absent slots; ``landed`` says that all of it has come."""
    within = gl.arange(0, TILE, layout=gl.SliceLayout(1, ROWS))
    values = gl.arange(0, 128, layout=gl.SliceLayout(0, ROWS))[None, :]
    last = 132 + gl.arange(0, 32, layout=gl.SliceLayout(0, ROWS))[None, :]
    slot, valid = slots_at(row_ptr, first + within, topk, num_slots)
    for i in range(count):
        buffer = i & 1
        row = _rows(data_ptr, slot, page_units, slot_units, PAGE)[:, None]
        here = valid[:, None]
        slot, valid = slots_at(row_ptr, first + (i + 1) * TILE + within, topk, num_slots)
        mbarrier.wait(empty.index(buffer), ((i >> 1) & 1) ^ 1)
        async_copy.async_copy_global_to_shared(highs.index(buffer)._reinterpret(gl.int32, [TILE, 128], FP8), row + values, mask=here)
        async_copy.async_copy_global_to_shared(ropes.index(buffer)._reinterpret(gl.int32, [TILE, 32], KEYS), row + last, mask=here)
        # Each thread's copies add an arrival of their own to the phase, which the one below keeps from ending before all have.
        async_copy.mbarrier_arrive(landed.index(buffer))
        mbarrier.arrive(landed.index(buffer))


@gluon.jit
def _fill(keys, words, scale, PART: gl.constexpr):
    """128 values of every slot of the tile, converted, into their place in ``keys`` (int32, two bf16 each)."""
    low, high = gl.inline_asm_elementwise(EXPAND, "=r,=r,r,r", [words, scale[:, None]], dtype=(gl.int32, gl.int32), is_pure=True, pack=1)
    keys.slice(PART * 64, 64, dim=1).store(gl.join(low, high).reshape([words.shape[0], 64]))


@gluon.jit
def convert_latents(
    data_ptr, row_ptr, first, count, topk, num_slots, page_units, slot_units, lows, highs, landed, half, full,
    PAGE: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """Convert tiles that have landed: ``half`` says that dims 0 to 255 and the rope can be read, ``full`` that all can."""
    within = gl.arange(0, TILE, layout=gl.SliceLayout(1, ROWS))
    slot, valid = slots_at(row_ptr, first + within, topk, num_slots)
    for i in range(count):
        buffer = i & 1
        row = _rows(data_ptr, slot, page_units, slot_units, PAGE)
        scale0 = gl.load(row + 128, mask=valid, other=0)
        scale1 = gl.load(row + 129, mask=valid, other=0)
        scale2 = gl.load(row + 130, mask=valid, other=0)
        scale3 = gl.load(row + 131, mask=valid, other=0)
        slot, valid = slots_at(row_ptr, first + (i + 1) * TILE + within, topk, num_slots)
        low = lows.index(buffer)._reinterpret(gl.int32, [TILE, 128], KEYS)
        high = highs.index(buffer)._reinterpret(gl.int32, [TILE, 128], KEYS)
        words = highs.index(buffer)._reinterpret(gl.int32, [TILE, 128], FP8)
        mbarrier.wait(landed.index(buffer), (i >> 1) & 1)
        _fill(low, words.slice(0, 32, dim=1).load(ROWS), scale0, 0)
        _fill(low, words.slice(32, 32, dim=1).load(ROWS), scale1, 1)
        words2 = words.slice(64, 32, dim=1).load(ROWS)
        words3 = words.slice(96, 32, dim=1).load(ROWS)
        # Products read shared memory through the async proxy. Every thread that converts fences what it stored, and what it saw land: the
        # rope's copies come before this fence by way of ``landed``, and products after it by way of ``half``.
        fence_async_shared()
        mbarrier.arrive(half.index(buffer))
        _fill(high, words2, scale2, 0)
        _fill(high, words3, scale3, 1)
        fence_async_shared()
        mbarrier.arrive(full.index(buffer))
