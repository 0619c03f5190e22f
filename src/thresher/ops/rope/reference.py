"""RoPE on a CPU or any other device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=64)
def _inv_freq(theta: float, rotary_dim: int, device: torch.device) -> Tensor:
    """fp32 ``[rotary_dim / 2]``, rounded once from fp64. Kept, since a decoder asks for it in every layer of every step."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim
    return (theta**-exponent).float()


def rope_reference(x: Tensor, positions: Tensor, theta: float, rotary_dim: int, interleaved: bool) -> Tensor:
    """A tensor like x ``[T, ..., D]``."""
    if rotary_dim == 0:
        return x
    angle = positions.to(torch.float32)[:, None] * _inv_freq(theta, rotary_dim, x.device)
    angle = angle.view(len(positions), *[1] * (x.dim() - 2), rotary_dim // 2)
    cos, sin = angle.cos(), angle.sin()

    rotated, rest = x[..., :rotary_dim].float(), x[..., rotary_dim:]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
    else:
        a, b = rotated.chunk(2, dim=-1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    out = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((out.to(x.dtype), rest), dim=-1)
