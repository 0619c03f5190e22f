"""Quantise-and-store on a GPU: RoPE, Hadamard, e4m3 with its scale, and the write into the paged cache, in one launch.

Every step has the bits of its reference: RoPE products and sums are rounded one by one (no fused multiply-add) and the result is rounded
to the input's type, the Hadamard butterflies run in the reference's order, the scale is integer arithmetic. Only the device's own cosine
and sine can differ from another device's, by an ulp.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from thresher.cache.device import INTERPRET, on_device, overlapped, unit_rows
from thresher.cache.latents import ROPE_DIM
from thresher.ops.quantize import triton_step
from thresher.ops.quantize.triton_kernels import keys_kernel, latents_kernel, queries_kernel, rows_kernel
from thresher.ops.quantize.triton_launch import (
    NUM_WARPS,
    SPREAD,
    TILE,
    flat_pages,
    flat_records,
    heads_each,
    inv_freq,
    rotation,
    rows_each,
    warps_of,
)

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
MAX_DIM = 8192


def unsupported(dtype: torch.dtype, head_dim: int, rotate: bool = False) -> str | None:
    """Why these kernels cannot run, or None.

    Args:
        dtype: of the vectors.
        head_dim: of the vectors.
        rotate: whether a Hadamard rotation comes first, as for keys and queries.
    """
    if dtype not in FLOATS:
        return f"x must be bfloat16, float16 or float32 for the Triton kernel, got {dtype}"
    if not 1 <= head_dim <= MAX_DIM:
        return f"head_dim must be in 1..{MAX_DIM} for the Triton kernel, got {head_dim}"
    if rotate and (head_dim < 4 or head_dim & (head_dim - 1)):
        return f"head_dim must be a power of two, at least 4, for the Triton kernel, got {head_dim}"
    return None


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """See ``thresher.ops.quantize.quantize_fp8``; a vector with NaN or infinity becomes NaN under scale 1 instead of an error."""
    dim = x.shape[-1]
    rows = x.reshape(-1, dim).contiguous()
    values = torch.empty(rows.shape, dtype=torch.uint8, device=x.device)
    scales = torch.empty(len(rows), dtype=torch.float32, device=x.device)
    block_d = triton.next_power_of_2(dim)
    per_program = max(1, TILE // block_d)
    if len(rows):
        with on_device(x):
            rows_kernel[(triton.cdiv(len(rows), per_program),)](
                rows, values, scales, len(rows), DIM=dim, BLOCK_D=block_d, ROWS=per_program, INTERPRET=INTERPRET, num_warps=NUM_WARPS
            )
    return values.view(x.shape).view(torch.float8_e4m3fn), scales.view(x.shape[:-1])


def store_index_keys(pages: Tensor, slots: Tensor, x: Tensor, positions: Tensor, theta: float, rotary_dim: int, style: str) -> None:
    """``IndexKeyCache.store(slots, *quantize_fp8(hadamard(apply_rope(x, positions, theta, rotary_dim, style))))`` in one launch.

    Args:
        pages: uint8 ``[P, page_size, 1, D + 4]``, contiguous, ``IndexKeyCache.pages``.
        slots: int64 or int32 ``[T]``, distinct; a token whose slot is outside the cache is left out.
        x: ``[T, D]`` bf16, fp16 or fp32, D a power of two; rows may be strided.
        positions: int64 or int32 ``[T]``.
        theta: base of the RoPE frequencies.
        rotary_dim: how many leading dims rotate; even, at most D, 0 for none.
        style: ``"half"`` or ``"interleaved"``.

    A key with NaN or infinity is stored as NaN under scale 1: a kernel cannot refuse it.
    """
    (num, dim), page_size = x.shape, pages.shape[1]
    flat, scales = flat_pages(pages, dim)
    x = unit_rows(x)
    rows = rows_each(num, dim)
    if not num or not flat.numel():
        return
    with on_device(x):
        keys_kernel[(triton.cdiv(num, rows),)](
            x,
            positions.contiguous(),
            slots.contiguous(),
            inv_freq(theta, rotary_dim, x.device),
            flat,
            scales,
            num,
            pages.shape[0] * page_size,
            x.stride(0),
            PAGE_SIZE=page_size,
            ROWS=rows,
            num_warps=warps_of(rows, dim),
            **rotation(dim, rotary_dim, style),
            **overlapped(x),
        )


def quantize_queries(
    x: Tensor, weights: Tensor, positions: Tensor, theta: float, rotary_dim: int, style: str, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The same front end for queries: values of ``quantize_fp8(hadamard(apply_rope(x, ...)))`` and ``weights * factor * scales``.

    Args:
        x: ``[T, H, D]`` bf16, fp16 or fp32, D a power of two; tokens and heads may be strided.
        weights: ``[T, H]``, any of the same types.
        positions: int64 or int32 ``[T]``.
        theta: base of the RoPE frequencies.
        rotary_dim: how many leading dims rotate; even, at most D, 0 for none.
        style: ``"half"`` or ``"interleaved"``.
        factor: a constant to fold in, e.g. ``(H * D) ** -0.5``; taken in fp32, multiplied before the scale.

    Returns:
        float8_e4m3fn ``[T, H, D]`` and fp32 ``[T, H]``: ``q`` and ``weights`` of an ``IndexQuery``.
    """
    num, heads, dim = x.shape
    x, weights = unit_rows(x), unit_rows(weights)
    values = torch.empty(num, heads, dim, dtype=torch.uint8, device=x.device)
    folded = torch.empty(num, heads, dtype=torch.float32, device=x.device)
    rows = heads_each(num, heads, dim)
    if num and heads:
        with on_device(x):
            queries_kernel[(num, triton.cdiv(heads, rows))](
                x,
                positions.contiguous(),
                weights,
                inv_freq(theta, rotary_dim, x.device),
                values,
                folded,
                x.stride(0),
                x.stride(1),
                weights.stride(0),
                float(factor),
                HEADS=heads,
                ROWS=rows,
                num_warps=warps_of(rows, dim),
                **rotation(dim, rotary_dim, style),
                **overlapped(x),
            )
    return values.view(torch.float8_e4m3fn), folded


def store_latents(
    data: Tensor,
    slots: Tensor,
    latent: Tensor,
    rope: Tensor,
    positions: Tensor | None = None,
    theta: float = 10000.0,
    style: str = "interleaved",
) -> None:
    """``LatentCache.store(slots, latent, rope)`` in one launch; with ``positions`` the 64 RoPE dims are rotated first.

    Args:
        data: uint8 ``[P, page_size, 1, 656]``, contiguous, ``LatentCache.data``.
        slots: int64 or int32 ``[T]``, distinct; a token whose slot is outside the cache is left out.
        latent: ``[T, 512]`` bf16, fp16 or fp32; rows may be strided.
        rope: ``[T, 64]``, likewise.
        positions: int64 or int32 ``[T]``, or None when ``rope`` is rotated already.
        theta: base of the RoPE frequencies.
        style: ``"half"`` or ``"interleaved"`` (MLA's own).
    """
    flat, floats, halves = flat_records(data)
    latent, rope = unit_rows(latent), unit_rows(rope)
    num, rotary = len(slots), 0 if positions is None else ROPE_DIM
    if not num or not flat.numel():
        return
    tokens = min(4, triton.next_power_of_2(triton.cdiv(num, SPREAD)))
    slots = slots.contiguous()
    with on_device(latent):
        latents_kernel[(triton.cdiv(num, tokens), 2)](
            latent,
            rope,
            slots if positions is None else positions.contiguous(),
            slots,
            inv_freq(theta, rotary, latent.device),
            flat,
            floats,
            halves,
            num,
            data.shape[0] * data.shape[1],
            latent.stride(0),
            rope.stride(0),
            ROTARY=rotary,
            INTERLEAVED=style == "interleaved",
            TOKENS=tokens,
            INTERPRET=INTERPRET,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
            **overlapped(latent),
        )


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
    """The three above in one launch: see ``thresher.ops.quantize.store_step``."""
    return triton_step.store_step(pages, data, slots, key, latent, rope, q, weights, positions, theta, rotary_dim, style, factor)
