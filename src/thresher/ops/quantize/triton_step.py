# mypy: disable-error-code="no-untyped-def"
"""All that a step of decoding stores, in one launch: programs of four kinds side by side."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thresher.cache.device import on_device, overlapped, unit_rows
from thresher.cache.latents import ROPE_DIM
from thresher.ops.quantize.triton_kernels import GROUPS, TAIL, store_codes, store_keys, store_queries, store_tails
from thresher.ops.quantize.triton_launch import NUM_WARPS, flat_pages, flat_records, heads_each, inv_freq, rotation, warps_of


@triton.jit(do_not_specialize=["num_tokens", "num_slots", "num_records"])
def step_kernel(
    q_ptr, weights_ptr, codes_ptr, folded_ptr, q_stride_t, q_stride_h, weights_stride, factor,
    key_ptr, pages_ptr, scales_ptr, key_stride, num_slots,
    latent_ptr, rope_ptr, bytes_ptr, floats_ptr, halves_ptr, latent_stride, rope_stride, num_records,
    positions_ptr, slots_ptr, freq_ptr, tail_freq_ptr, num_tokens,
    HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, DIM: tl.constexpr, LOG_DIM: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, FACTOR: tl.constexpr, ROWS: tl.constexpr, FEW: tl.constexpr, INTERPRET: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs of queries, which are most, then of keys, of latents' codes, of their tails.

    A step has few tokens: all are read beside their slots, kept or not.
    """
    PARTS: tl.constexpr = (HEADS + ROWS - 1) // ROWS
    program = tl.program_id(0)
    keys = num_tokens * PARTS
    codes = keys + tl.cdiv(num_tokens, FEW)
    tails = codes + tl.cdiv(num_tokens * GROUPS, FEW)
    if program < keys:
        store_queries(
            program // PARTS, program % PARTS, q_ptr, positions_ptr, weights_ptr, freq_ptr, codes_ptr, folded_ptr,
            q_stride_t, q_stride_h, weights_stride, factor,
            HEADS, DIM, LOG_DIM, ROTARY, INTERLEAVED, FACTOR, ROWS, INTERPRET, OVERLAP,
        )  # fmt: skip
    elif program < codes:
        store_keys(
            program - keys, key_ptr, positions_ptr, slots_ptr, freq_ptr, pages_ptr, scales_ptr, num_tokens, num_slots, key_stride,
            PAGE_SIZE, DIM, LOG_DIM, ROTARY, INTERLEAVED, FACTOR, FEW, True, INTERPRET, OVERLAP,
        )  # fmt: skip
    elif program < tails:
        store_codes(
            program - codes, latent_ptr, slots_ptr, bytes_ptr, floats_ptr, num_tokens, num_records, latent_stride,
            FEW, True, INTERPRET, OVERLAP,
        )  # fmt: skip
    else:
        store_tails(
            program - tails, rope_ptr, positions_ptr, slots_ptr, tail_freq_ptr, halves_ptr, num_tokens, num_records, rope_stride,
            TAIL, True, FEW, True, INTERPRET, OVERLAP,
        )  # fmt: skip


def store_step(
    pages: Tensor,
    data: Tensor,
    slots: Tensor,
    key: Tensor,
    latent: Tensor,
    rope: Tensor,
    q: Tensor,
    weights: Tensor,
    positions: Tensor,
    theta: float,
    rotary_dim: int,
    style: str,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """See ``thresher.ops.quantize.store_step``.

    A token whose slot is outside a cache is left out there; what is not finite becomes NaN under scale 1.
    """
    (num, heads, dim), page_size = q.shape, pages.shape[1]
    key, latent, rope, q, weights = (unit_rows(x) for x in (key, latent, rope, q, weights))
    values = torch.empty(num, heads, dim, dtype=torch.uint8, device=q.device)
    folded = torch.empty(num, heads, dtype=torch.float32, device=q.device)
    # Rows of all kinds are about as wide, so as many of them to a program suit the same warps: at batch 1 one row and one warp everywhere,
    # also for each group of a latent. More rows than warps only queries have, which are most.
    rows = heads_each(num, heads, dim)
    few = min(rows, NUM_WARPS)
    others = 2 * triton.cdiv(num, few) + triton.cdiv(num * GROUPS.value, few)
    programs = num * triton.cdiv(heads, rows) + others
    if programs:
        with on_device(q):
            step_kernel[(programs,)](
                q, weights, values, folded, q.stride(0), q.stride(1), weights.stride(0), float(factor),
                key, *flat_pages(pages, dim), key.stride(0), pages.shape[0] * page_size,
                latent, rope, *flat_records(data), latent.stride(0), rope.stride(0), data.shape[0] * data.shape[1],
                positions.contiguous(), slots.contiguous(), inv_freq(theta, rotary_dim, q.device), inv_freq(theta, ROPE_DIM, q.device), num,
                HEADS=heads, PAGE_SIZE=page_size, ROWS=rows, FEW=few, num_warps=warps_of(rows, dim),
                **rotation(dim, rotary_dim, style), **overlapped(q),
            )  # fmt: skip
    return values.view(torch.float8_e4m3fn), folded
