"""Quantise-and-store out of the operations it is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.cache.fp8 import quantize_fp8
from thresher.cache.index_keys import store_keys
from thresher.cache.latents import ROPE_DIM, store_records
from thresher.ops.hadamard import hadamard
from thresher.ops.rope import apply_rope


@torch.no_grad()
def store_keys_reference(pages: Tensor, slots: Tensor, x: Tensor, positions: Tensor, theta: float, rotary_dim: int, style: str) -> None:
    """See ``store_index_keys``. A token that is left out is not looked at: it may be NaN."""
    kept = slots >= 0
    rotated = apply_rope(x[kept], positions[kept], theta, rotary_dim, style)
    store_keys(pages, slots[kept].long(), *quantize_fp8(hadamard(rotated)))


@torch.no_grad()
def queries_reference(
    x: Tensor, weights: Tensor, positions: Tensor, theta: float, rotary_dim: int, style: str, factor: float
) -> tuple[Tensor, Tensor]:
    """See ``quantize_queries``."""
    values, scales = quantize_fp8(hadamard(apply_rope(x, positions, theta, rotary_dim, style)))
    return values, weights.float() * factor * scales


@torch.no_grad()
def store_latents_reference(
    data: Tensor, slots: Tensor, latent: Tensor, rope: Tensor, positions: Tensor | None, theta: float, style: str
) -> None:
    """See ``store_latents``. A token that is left out is not looked at: it may be NaN."""
    kept = slots >= 0
    tail = rope[kept] if positions is None else apply_rope(rope[kept], positions[kept], theta, ROPE_DIM, style)
    store_records(data, slots[kept].long(), latent[kept], tail)


def store_step_reference(
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
    factor: float,
) -> tuple[Tensor, Tensor]:
    """See ``store_step``."""
    made = queries_reference(q, weights, positions, theta, rotary_dim, style, factor)
    store_keys_reference(pages, slots, key, positions, theta, rotary_dim, style)
    store_latents_reference(data, slots, latent, rope, positions, theta, "interleaved")
    return made
