"""Attention over the FP8 latent cache as an operator of PyTorch, for models under ``torch.compile(fullgraph=True)``."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.cache.latents import LATENT_DIM
from thresher.ops.sparse_attend import sparse_attend_mla_fp8


def attend_mla_fp8(q: Tensor, cache_data: Tensor, slots: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``ops.sparse_attend_mla_fp8`` as one operator: out fp32 ``[Q, N, 512]`` and lse fp32 ``[Q, N]``."""
    out, lse = _attend(q, cache_data, slots, scale)
    return out, lse


@torch.library.custom_op("thresher::attend_mla_fp8", mutates_args=())
def _attend(q: Tensor, cache_data: Tensor, slots: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    part = sparse_attend_mla_fp8(q, cache_data, slots, scale)
    return part.out, part.lse


@_attend.register_fake
def _(q: Tensor, cache_data: Tensor, slots: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:2], LATENT_DIM), dtype=torch.float32), q.new_empty(q.shape[:2], dtype=torch.float32)
