"""The kernels behind ``triton.py``: what is read, turned, and written by a program.

``store_keys``, ``store_queries``, ``store_codes`` and ``store_tails`` are what a program of that number does, in a kernel of its own or in
``triton_step.py`` beside the others. Each waits for its inputs itself, behind all that it can do before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from thresher.cache.device import quantize_tile, round_like, round_to_bf16, wait_for_inputs
from thresher.cache.latents import FP8_BYTES, GROUP, LATENT_DIM, ROPE_DIM

# The latent record as constants that a kernel may read.
LATENT, TAIL, SHARE, RECORD = (tl.constexpr(n) for n in (LATENT_DIM, ROPE_DIM, GROUP, FP8_BYTES))
GROUPS = tl.constexpr(LATENT_DIM // GROUP)


@triton.jit
def _load(ptrs, mask):
    """fp32 from any float type; no arithmetic is done in bf16, which the interpreter gets wrong."""
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _find_slots(slots_ptr, token, num_tokens, num_slots, EAGER: tl.constexpr):
    """Of tokens: the slot (int64, 0 where there is none), whether there is one, and whether the token's vector is read.

    If EAGER it is read beside its slot, kept or not: one wait less.
    """
    exists = token < num_tokens
    slot = tl.load(slots_ptr + token, mask=exists, other=-1).to(tl.int64)
    ok = exists & (slot >= 0) & (slot < num_slots)
    wanted = exists if EAGER else ok
    return tl.where(ok, slot, 0), ok, wanted


@triton.jit
def sin_cos(angle):
    """``(tl.sin(angle), tl.cos(angle))``, to the bit.

    From 105615 on both take 2 / pi word by word out of memory, in a loop of their own each, for a single lane too: position 131071 has such
    an angle. Up to 2**32 these are the same words and the same rounding in a straight line; sine and cosine see what is left of the angle.
    """
    bits = angle.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    large = (magnitude >= 0x47CE4780) & (magnitude < 0x4F800000)
    # The mantissa times 2 / pi, of which 64 bits count: two of the quadrant, then the fraction.
    mantissa = ((bits << 8) | -0x80000000).to(tl.uint32, bitcast=True).to(tl.uint64)
    low = (mantissa * 0x3C439041) >> 32
    low = (mantissa * 0xDB629599 + low) >> 32
    low = (mantissa * 0xF534DDC0 + low) >> 32
    low = (mantissa * 0xFC2757D1 + low) >> 32
    low = mantissa * 0x4E441529 + low
    high = mantissa * 0xA2F9836E + (low >> 32)
    shift = ((bits >> 23) & 31).to(tl.uint64)
    turns = (high << shift) | ((low & 0xFFFFFFFF) >> (32 - shift))
    fraction = (turns << 2).to(tl.int64, bitcast=True)
    quadrant = (turns >> 62).to(tl.int32) + (fraction < 0).to(tl.int32)
    rest = (fraction ^ (fraction >> 63)).to(tl.float64) * tl.full([], 0x3BF921FB54442D19, tl.int64).to(tl.float64, bitcast=True)
    rest = rest.to(tl.float32)
    rest = tl.where((fraction < 0) != (bits < 0), -rest, rest)
    quadrant = tl.where(large, tl.where(bits < 0, -quadrant, quadrant), 0)
    rest = tl.where(large, rest, angle)
    sin, cos = tl.sin(rest), tl.cos(rest)
    odd = (quadrant & 1) != 0
    turned_sin, turned_cos = tl.where(odd, cos, sin), tl.where(odd, sin, cos)
    return (
        tl.where((quadrant & 2) != 0, -turned_sin, turned_sin),
        tl.where(((quadrant + 1) & 2) != 0, -turned_cos, turned_cos),
    )


@triton.jit
def _for_dims(x, DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """``[R, D]`` of what each pair has, ``[R, ROTARY / 2]``; past ROTARY it repeats."""
    ROWS: tl.constexpr = x.shape[0]
    if INTERLEAVED:
        dims = tl.broadcast_to(x[:, None, :, None], [ROWS, DIM // ROTARY, ROTARY // 2, 2])
    else:
        dims = tl.broadcast_to(x[:, None, None, :], [ROWS, DIM // ROTARY, 2, ROTARY // 2])
    return tl.reshape(dims, [ROWS, DIM])


@triton.jit
def _load_rotated(
    x_ptr, row_at, ok, positions, freq_ptr, d, DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, INTERPRET: tl.constexpr
):
    """Rows ``[R, D]`` in fp32, the first ROTARY dims rotated. ``row_at``, ``ok`` and ``positions`` are ``[R, 1]`` (or ``[1, 1]``)."""
    ok = ok & (d < DIM)
    x = _load(x_ptr + row_at + d, ok)
    if ROTARY > 0:
        inside = d < ROTARY
        if INTERLEAVED:
            partner, pair, first = d ^ 1, d // 2, d % 2 == 0
        else:
            first = d < ROTARY // 2
            partner, pair = tl.where(first, d + ROTARY // 2, d - ROTARY // 2), d % (ROTARY // 2)
        other = _load(x_ptr + row_at + partner, ok & inside)
        # Once a pair, not once a dim; but rows of one position share what a thread has of either, and there this would undo it.
        if ROTARY & (ROTARY - 1) == 0 and (positions.shape[0] > 1 or ok.shape[0] == 1):
            one = tl.arange(0, ROTARY // 2)[None, :]
            sin, cos = sin_cos(positions.to(tl.float32) * tl.load(freq_ptr + one))
            sin, cos = _for_dims(sin, DIM, ROTARY, INTERLEAVED), _for_dims(cos, DIM, ROTARY, INTERLEAVED)
        else:
            sin, cos = sin_cos(positions.to(tl.float32) * tl.load(freq_ptr + pair, mask=inside, other=0.0))
        turned = other * sin
        rotated = x * cos + tl.where(first, -turned, turned)
        x = tl.where(inside, round_like(rotated, x_ptr, INTERPRET), x)
    return x


@triton.jit
def _butterfly(x, HALF: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr):
    """``(low + high, low - high)`` of dims HALF apart."""
    pairs = tl.reshape(x, [ROWS, DIM // (2 * HALF), 2, HALF])
    bits = pairs.to(tl.int32, bitcast=True)
    # The sum of both bit patterns less one's own is the other's: one exchange between threads instead of two float sums.
    other = (tl.expand_dims(tl.sum(bits, 2), 2) - bits).to(tl.float32, bitcast=True)
    low = (tl.arange(0, 2) == 0)[None, None, :, None]
    return tl.reshape(tl.where(low, pairs + other, other - pairs), [ROWS, DIM])


@triton.jit
def _hadamard(x, FACTOR: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, LOG_DIM: tl.constexpr):
    """Butterflies at distance 1, 2, 4 ..., the reference's order, then times ``DIM**-0.5``."""
    for step in tl.static_range(LOG_DIM):
        x = _butterfly(x, 2**step, ROWS, DIM)
    return x * FACTOR


@triton.jit
def rows_kernel(
    x_ptr, codes_ptr, scales_ptr, num_rows, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, INTERPRET: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)[None, :]
    ok = (row < num_rows)[:, None] & (d < DIM)
    codes, scales = quantize_tile(_load(x_ptr + row[:, None] * DIM + d, ok), INTERPRET)
    tl.store(codes_ptr + row[:, None] * DIM + d, codes, mask=ok)
    tl.store(scales_ptr + row, scales, mask=row < num_rows)


@triton.jit
def store_keys(
    program, x_ptr, positions_ptr, slots_ptr, freq_ptr, pages_ptr, scales_ptr, num_tokens, num_slots, x_stride,
    PAGE_SIZE: tl.constexpr, DIM: tl.constexpr, LOG_DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    FACTOR: tl.constexpr, ROWS: tl.constexpr, EAGER: tl.constexpr, INTERPRET: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Index keys of ROWS tokens."""
    token = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DIM)[None, :]
    wait_for_inputs(OVERLAP)
    slot, ok, wanted = _find_slots(slots_ptr, token, num_tokens, num_slots, EAGER)
    position = tl.load(positions_ptr + token, mask=token < num_tokens, other=0)
    x = _load_rotated(
        x_ptr, token[:, None] * x_stride, wanted[:, None], position[:, None], freq_ptr, d,
        DIM, ROTARY, INTERLEAVED, INTERPRET,
    )  # fmt: skip
    codes, scales = quantize_tile(_hadamard(x, FACTOR, ROWS, DIM, LOG_DIM), INTERPRET)
    page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
    tl.store(pages_ptr + (page * (PAGE_SIZE * (DIM + 4)) + offset * DIM)[:, None] + d, codes, mask=ok[:, None])
    tl.store(scales_ptr + page * (PAGE_SIZE * (DIM + 4) // 4) + PAGE_SIZE * DIM // 4 + offset, scales, mask=ok)


@triton.jit
def store_queries(
    token, part, x_ptr, positions_ptr, weights_ptr, freq_ptr, codes_ptr, folded_ptr, x_stride_t, x_stride_h, weights_stride, factor,
    HEADS: tl.constexpr, DIM: tl.constexpr, LOG_DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    FACTOR: tl.constexpr, ROWS: tl.constexpr, INTERPRET: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Queries and weights of a token's ``part``-th ROWS heads."""
    token = token.to(tl.int64)
    head = part * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DIM)[None, :]
    ok = head < HEADS
    wait_for_inputs(OVERLAP)
    position = tl.load(positions_ptr + token + tl.zeros([1, 1], tl.int32))
    weights = _load(weights_ptr + token * weights_stride + head, ok)
    row_at = token * x_stride_t + head[:, None].to(tl.int64) * x_stride_h
    x = _load_rotated(x_ptr, row_at, ok[:, None], position, freq_ptr, d, DIM, ROTARY, INTERLEAVED, INTERPRET)
    codes, scales = quantize_tile(_hadamard(x, FACTOR, ROWS, DIM, LOG_DIM), INTERPRET)
    tl.store(codes_ptr + (token * HEADS + head[:, None]) * DIM + d, codes, mask=ok[:, None])
    tl.store(folded_ptr + token * HEADS + head, weights * factor * scales, mask=ok)


@triton.jit
def store_codes(
    program, latent_ptr, slots_ptr, bytes_ptr, floats_ptr, num_tokens, num_slots, latent_stride,
    ROWS: tl.constexpr, EAGER: tl.constexpr, INTERPRET: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Codes and scales of ROWS groups, GROUPS of which are a token."""
    row = program * ROWS + tl.arange(0, ROWS)
    token, group = (row // GROUPS).to(tl.int64), row % GROUPS
    column = group[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
    wait_for_inputs(OVERLAP)
    slot, ok, wanted = _find_slots(slots_ptr, token, num_tokens, num_slots, EAGER)
    codes, scales = quantize_tile(_load(latent_ptr + token[:, None] * latent_stride + column, wanted[:, None]), INTERPRET)
    tl.store(bytes_ptr + slot[:, None] * RECORD + column, codes, mask=ok[:, None])
    tl.store(floats_ptr + slot * (RECORD // 4) + LATENT // 4 + group, scales, mask=ok)


@triton.jit
def store_tails(
    program, rope_ptr, positions_ptr, slots_ptr, freq_ptr, halves_ptr, num_tokens, num_slots, rope_stride,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, EAGER: tl.constexpr, INTERPRET: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """RoPE dims of ROWS tokens."""
    token = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, TAIL)[None, :]
    wait_for_inputs(OVERLAP)
    slot, ok, wanted = _find_slots(slots_ptr, token, num_tokens, num_slots, EAGER)
    position = tl.zeros([ROWS], tl.int64)
    if ROTARY > 0:
        position = tl.load(positions_ptr + token, mask=token < num_tokens, other=0).to(tl.int64)
    x = _load_rotated(
        rope_ptr, token[:, None] * rope_stride, wanted[:, None], position[:, None], freq_ptr, d,
        TAIL, ROTARY, INTERLEAVED, INTERPRET,
    )  # fmt: skip
    tl.store(halves_ptr + slot[:, None] * (RECORD // 2) + (RECORD // 2 - TAIL) + d, round_to_bf16(x, INTERPRET), mask=ok[:, None])


@triton.jit
def keys_kernel(
    x_ptr, positions_ptr, slots_ptr, freq_ptr, pages_ptr, scales_ptr, num_tokens, num_slots, x_stride,
    PAGE_SIZE: tl.constexpr, DIM: tl.constexpr, LOG_DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    FACTOR: tl.constexpr, ROWS: tl.constexpr, INTERPRET: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    store_keys(
        tl.program_id(0), x_ptr, positions_ptr, slots_ptr, freq_ptr, pages_ptr, scales_ptr, num_tokens, num_slots, x_stride,
        PAGE_SIZE, DIM, LOG_DIM, ROTARY, INTERLEAVED, FACTOR, ROWS, ROWS == 1, INTERPRET, OVERLAP,
    )  # fmt: skip


@triton.jit
def queries_kernel(
    x_ptr, positions_ptr, weights_ptr, freq_ptr, codes_ptr, folded_ptr, x_stride_t, x_stride_h, weights_stride, factor,
    HEADS: tl.constexpr, DIM: tl.constexpr, LOG_DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    FACTOR: tl.constexpr, ROWS: tl.constexpr, INTERPRET: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    store_queries(
        tl.program_id(0), tl.program_id(1), x_ptr, positions_ptr, weights_ptr, freq_ptr, codes_ptr, folded_ptr,
        x_stride_t, x_stride_h, weights_stride, factor,
        HEADS, DIM, LOG_DIM, ROTARY, INTERLEAVED, FACTOR, ROWS, INTERPRET, OVERLAP,
    )  # fmt: skip


@triton.jit
def latents_kernel(
    latent_ptr, rope_ptr, positions_ptr, slots_ptr, freq_ptr, bytes_ptr, floats_ptr, halves_ptr,
    num_tokens, num_slots, latent_stride, rope_stride,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, TOKENS: tl.constexpr, INTERPRET: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A record is LATENT codes, one fp32 scale per SHARE of them, TAIL bf16. The tails have programs of their own, beside the others."""
    if tl.program_id(1) == 0:
        store_codes(
            tl.program_id(0), latent_ptr, slots_ptr, bytes_ptr, floats_ptr, num_tokens, num_slots, latent_stride,
            TOKENS * GROUPS, TOKENS == 1, INTERPRET, OVERLAP,
        )  # fmt: skip
    else:
        store_tails(
            tl.program_id(0), rope_ptr, positions_ptr, slots_ptr, freq_ptr, halves_ptr, num_tokens, num_slots, rope_stride,
            ROTARY, INTERLEAVED, TOKENS, TOKENS == 1, INTERPRET, OVERLAP,
        )  # fmt: skip
