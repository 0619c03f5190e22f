"""The kernels behind ``triton.py``, and how their programs divide the work.

A program takes one query, one tile of heads and one share of the query's slots. With one share it writes the result (``SPLIT`` false);
with several, each writes its unnormalised sum of values, its peak and its total, and ``combine_kernel`` adds the shares up.

Scores are in base 2 inside: ``scale2`` is the softmax scale times log2(e). ``num_slots`` bounds every read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from thresher.cache.device import wait_for_inputs


@triton.jit
def _program(tiles, shares):
    """This program's query, tile of heads and share; shares of one tile are neighbours, then the tiles of one query."""
    pid = tl.program_id(0)
    return (pid // shares // tiles).to(tl.int64), pid // shares % tiles, pid % shares


@triton.jit
def _load_slots(row_ptr, start, topk, num_slots, TILE: tl.constexpr):
    """A tile of slots, 0 where there is none, and which are there: whatever is outside 0..num_slots - 1 is none."""
    offset = start + tl.arange(0, TILE)
    slot = tl.load(row_ptr + offset, mask=offset < topk, other=-1)
    valid = (slot >= 0) & (slot < num_slots)
    return tl.where(valid, slot, 0), valid


@triton.jit
def _softmax_step(scores, peak):
    """One tile of base-2 scores ``[heads, slots]``: probabilities, the factor for what was summed before, and the new peak."""
    new = tl.maximum(peak, tl.max(scores, 1))
    # Where no slot was seen yet the peak is -inf; subtracting 0 then gives probabilities of 0, not NaN.
    base = tl.where(new == float("-inf"), 0.0, new)
    return tl.exp2(scores - base[:, None]), tl.exp2(peak - base), new


@triton.jit
def _log_sum(peak, total):
    """Natural log of ``total`` times two to the ``peak``; -inf where nothing was summed."""
    return tl.where(total == 0, float("-inf"), (peak + tl.log2(total)) * 0.6931471805599453)


@triton.jit
def _store_sums(lse_ptr, total_ptr, row, peak, total, here, SPLIT: tl.constexpr):
    """The lse, or a share's peak and total; returns what its accumulators are multiplied by before they are stored, ``[heads, 1]``."""
    if SPLIT:
        tl.store(lse_ptr + row, peak, mask=here)
        tl.store(total_ptr + row, total, mask=here)
        norm = tl.full([row.shape[0], 1], 1.0, tl.float32)
    else:
        tl.store(lse_ptr + row, _log_sum(peak, total), mask=here)
        norm = tl.where(total == 0, 0.0, 1.0 / total)[:, None]
    return norm


@triton.jit
def _latent_group(ptr, scale_ptr, valid, FP8: tl.constexpr, INTERPRET: tl.constexpr):
    """128 of the latent's values for a tile of slots, as bf16; in FP8 they have one scale."""
    x = tl.load(ptr[:, None] + tl.arange(0, 128)[None, :], mask=valid[:, None], other=0.0)
    if FP8:
        x = x.to(tl.float32) * tl.load(scale_ptr, mask=valid, other=0.0)[:, None]
    return x.to(tl.float32) if INTERPRET else x.to(tl.bfloat16)


@triton.jit
def mla_kernel(
    q_ptr,
    latent_ptr,
    scale_ptr,
    rope_ptr,
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
    FP8: tl.constexpr,
    SPLIT: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Every head reads the same rows: 512 dims that are key and value, as four groups, and 64 of RoPE. ``scale2`` holds log2(e)."""
    query, tile, share = _program(tl.cdiv(heads, HEADS), shares)
    head = tile * HEADS + tl.arange(0, HEADS)
    here = head < heads
    low = tl.arange(0, 128)
    tail = tl.arange(0, 64)
    q_row = (q_ptr + query * q_stride + head * q_head_stride)[:, None]
    q0 = tl.load(q_row + low[None, :], mask=here[:, None], other=0.0)
    q1 = tl.load(q_row + 128 + low[None, :], mask=here[:, None], other=0.0)
    q2 = tl.load(q_row + 256 + low[None, :], mask=here[:, None], other=0.0)
    q3 = tl.load(q_row + 384 + low[None, :], mask=here[:, None], other=0.0)
    q4 = tl.load(q_row + 512 + tail[None, :], mask=here[:, None], other=0.0)
    if INTERPRET:
        q0, q1, q2, q3, q4 = q0.to(tl.float32), q1.to(tl.float32), q2.to(tl.float32), q3.to(tl.float32), q4.to(tl.float32)

    peak = tl.full([HEADS], float("-inf"), tl.float32)
    # Summed over slots at the end only: until then a thread adds up its own columns.
    totals = tl.zeros([HEADS, TILE], tl.float32)
    acc0 = tl.zeros([HEADS, 128], tl.float32)
    acc1 = tl.zeros([HEADS, 128], tl.float32)
    acc2 = tl.zeros([HEADS, 128], tl.float32)
    acc3 = tl.zeros([HEADS, 128], tl.float32)
    first = share * share_tiles * TILE
    for start in range(first, tl.minimum(first + share_tiles * TILE, topk), TILE):
        slot, valid = _load_slots(slots_ptr + query * slots_stride, start, topk, num_slots, TILE)
        # In units of 16 bytes, so that the compiler sees that wide loads are aligned.
        unit = (slot // page_size).to(tl.int64) * page_units + (slot % page_size).to(tl.int64) * slot_units
        if FP8:
            latent, rope, scales = latent_ptr + unit * 16, rope_ptr + unit * 8 + 264, scale_ptr + unit * 4 + 128
        else:
            latent, rope, scales = latent_ptr + unit * 8, rope_ptr + unit * 8 + 512, scale_ptr
        k0 = _latent_group(latent, scales, valid, FP8, INTERPRET)
        k1 = _latent_group(latent + 128, scales + 1, valid, FP8, INTERPRET)
        k2 = _latent_group(latent + 256, scales + 2, valid, FP8, INTERPRET)
        k3 = _latent_group(latent + 384, scales + 3, valid, FP8, INTERPRET)
        k4 = tl.load(rope[:, None] + tail[None, :], mask=valid[:, None], other=0.0)
        if INTERPRET:
            k4 = k4.to(tl.float32)

        scores = tl.dot(q4, k4.T)
        scores = tl.dot(q0, k0.T, scores)
        scores = tl.dot(q1, k1.T, scores)
        scores = tl.dot(q2, k2.T, scores)
        scores = tl.dot(q3, k3.T, scores)
        scores = tl.where(valid[None, :], scores * scale2, float("-inf"))
        probs, factor, peak = _softmax_step(scores, peak)
        factor = factor[:, None]
        totals = totals * factor + probs
        probs = probs.to(k0.dtype)
        acc0 = tl.dot(probs, k0, acc0 * factor)
        acc1 = tl.dot(probs, k1, acc1 * factor)
        acc2 = tl.dot(probs, k2, acc2 * factor)
        acc3 = tl.dot(probs, k3, acc3 * factor)

    row = (query * shares + share) * heads + head
    norm = _store_sums(lse_ptr, total_ptr, row, peak, tl.sum(totals, 1), here, SPLIT)
    out = (out_ptr + row * 512)[:, None] + low[None, :]
    tl.store(out, acc0 * norm, mask=here[:, None])
    tl.store(out + 128, acc1 * norm, mask=here[:, None])
    tl.store(out + 256, acc2 * norm, mask=here[:, None])
    tl.store(out + 384, acc3 * norm, mask=here[:, None])


@triton.jit
def gqa_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    slots_ptr,
    out_ptr,
    lse_ptr,
    total_ptr,
    scale2,
    num_slots,
    groups,
    group_heads,
    topk,
    shares,
    share_tiles,
    q_stride,
    q_head_stride,
    k_stride,
    k_group_stride,
    v_stride,
    v_group_stride,
    slots_stride,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TYPE: tl.constexpr,
    SPLIT: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile of heads lies within one group. ``scale2`` holds log2(e)."""
    group_tiles = tl.cdiv(group_heads, HEADS)
    query, tile, share = _program(groups * group_tiles, shares)
    group = tile // group_tiles
    inside = tile % group_tiles * HEADS + tl.arange(0, HEADS)
    here = inside < group_heads
    head = group * group_heads + inside
    k_dim = tl.arange(0, BLOCK_K)
    v_dim = tl.arange(0, BLOCK_V)
    q_row = (q_ptr + query * q_stride + head * q_head_stride)[:, None]
    q = tl.load(q_row + k_dim[None, :], mask=here[:, None] & (k_dim < K_DIM)[None, :], other=0.0).to(TYPE)

    peak = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, BLOCK_V], tl.float32)
    first = share * share_tiles * TILE
    for start in range(first, tl.minimum(first + share_tiles * TILE, topk), TILE):
        slot, valid = _load_slots(slots_ptr + query * slots_stride, start, topk, num_slots, TILE)
        k_row = (k_ptr + slot.to(tl.int64) * k_stride + group * k_group_stride)[:, None]
        v_row = (v_ptr + slot.to(tl.int64) * v_stride + group * v_group_stride)[:, None]
        k = tl.load(k_row + k_dim[None, :], mask=valid[:, None] & (k_dim < K_DIM)[None, :], other=0.0).to(TYPE)
        v = tl.load(v_row + v_dim[None, :], mask=valid[:, None] & (v_dim < V_DIM)[None, :], other=0.0).to(TYPE)
        scores = tl.dot(q, k.T, input_precision="ieee")
        scores = tl.where(valid[None, :], scores * scale2, float("-inf"))
        probs, factor, peak = _softmax_step(scores, peak)
        total = total * factor + tl.sum(probs, 1)
        acc = tl.dot(probs.to(TYPE), v, acc * factor[:, None], input_precision="ieee")

    row = (query * shares + share) * groups * group_heads + head
    norm = _store_sums(lse_ptr, total_ptr, row, peak, total, here, SPLIT)
    out = (out_ptr + row * V_DIM)[:, None] + v_dim[None, :]
    tl.store(out, acc * norm, mask=here[:, None] & (v_dim < V_DIM)[None, :])


@triton.jit
def add_shares(
    part_ptr, peak_ptr, total_ptr, query, head, heads, shares,
    DIM: tl.constexpr, BLOCK: tl.constexpr, SHARES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Output ``[BLOCK]`` and lse of one query and head: the sum over the shares, ``STEP`` of them loaded at once and added in the order of
    a fixed tree.

    With a warp for 128 dims, a thread has the same dims of every share: its loads are 16 bytes wide, and it adds up what it loaded itself.
    """
    d = tl.arange(0, BLOCK)
    peak = float("-inf")
    total = 0.0
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SHARES, STEP):
        share = start + tl.arange(0, STEP)
        there = share < shares
        at = (query * shares + share) * heads + head
        parts = tl.load((part_ptr + at * DIM)[:, None] + d[None, :], mask=there[:, None] & (d < DIM)[None, :], other=0.0)
        peaks = tl.load(peak_ptr + at, mask=there, other=float("-inf"))
        totals = tl.load(total_ptr + at, mask=there, other=0.0)
        new = tl.maximum(peak, tl.max(peaks, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(peaks - base)
        factor = tl.exp2(peak - base)
        total = total * factor + tl.sum(weights * totals, 0)
        acc = acc * factor + tl.sum(weights[:, None] * parts, 0)
        peak = new
    return acc * tl.where(total == 0, 0.0, 1.0 / total), _log_sum(peak, total)


@triton.jit(do_not_specialize=["shares"])
def combine_kernel(
    part_ptr, peak_ptr, total_ptr, out_ptr, lse_ptr, heads, shares,
    DIM: tl.constexpr, BLOCK: tl.constexpr, SHARES: tl.constexpr, STEP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One query and head of a program."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    wait_for_inputs(OVERLAP)
    values, lse = add_shares(part_ptr, peak_ptr, total_ptr, row // heads, row % heads, heads, shares, DIM, BLOCK, SHARES, STEP)
    tl.store(out_ptr + row * DIM + d, values, mask=d < DIM)
    tl.store(lse_ptr + row, lse)
