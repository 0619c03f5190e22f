"""Sparse attention by gathering, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.cache.latents import LATENT_DIM, decode_records
from thresher.types import PartialAttention


def chunk_elements(device: torch.device) -> int:
    """How many gathered key elements to hold at once: what stays in a CPU's cache, and on other devices a few hundred MiB."""
    return 2**20 if device.type == "cpu" else 2**25


def attend_reference(q: Tensor, k: Tensor, v: Tensor | None, value_dim: int, slots: Tensor, scale: float) -> PartialAttention:
    """``v`` None: the value is the first ``value_dim`` dims of k. Memory beyond the result is bounded by a chunk of gathered rows."""
    num, heads = q.shape[:2]
    used = (slots >= 0).any(0).nonzero()
    width = int(used[-1]) + 1 if len(used) else 0
    if num == 0 or width == 0:
        lse = torch.full((num, heads), -torch.inf, device=q.device)
        return PartialAttention(out=torch.zeros(num, heads, value_dim, device=q.device), lse=lse)
    slots = slots[:, :width].long()
    step = max(1, chunk_elements(q.device) // (width * k.shape[1] * k.shape[2]))
    parts = [_attend(q[row : row + step], k, v, value_dim, slots[row : row + step], scale) for row in range(0, num, step)]
    if len(parts) == 1:
        return PartialAttention(*parts[0])
    outs, lses = zip(*parts, strict=True)
    return PartialAttention(out=torch.cat(outs), lse=torch.cat(lses))


def attend_fp8_reference(q: Tensor, cache_data: Tensor, slots: Tensor, scale: float) -> PartialAttention:
    """Over an FP8 latent cache; only the tokens that some query names are decoded."""
    used = slots[slots >= 0].unique().long()
    page_size = cache_data.shape[1]
    latents = decode_records(cache_data[used // page_size, used % page_size, 0])
    rows = torch.searchsorted(used, slots.long()).masked_fill(slots < 0, -1)
    return attend_reference(q, latents[:, None], None, LATENT_DIM, rows, scale)


def _attend(q: Tensor, k: Tensor, v: Tensor | None, value_dim: int, slots: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    num, heads, dim = q.shape
    groups = k.shape[1]
    absent = slots < 0
    safe = slots.clamp(min=0)
    keys = k[safe].float()
    values = keys[..., :value_dim] if v is None else v[safe].float()
    empty = absent.all(1)
    ragged = bool(absent.any())

    if ragged:
        # Whatever stands in slot 0 must not leak through a weight of 0 (0 * NaN), nor into a gradient.
        keys = keys.masked_fill(absent[:, :, None, None], 0.0)
        values = values.masked_fill(absent[:, :, None, None], 0.0)
    score = q.float().reshape(num, groups, heads // groups, dim) @ keys.permute(0, 2, 3, 1) * scale
    if ragged:
        # An empty row keeps finite scores (and so finite gradients); its value rows are zeros and its lse is overwritten.
        score = score.masked_fill(absent[:, None, None], -torch.inf).masked_fill(empty[:, None, None, None], 0.0)
    lse = torch.logsumexp(score, -1)
    out = torch.exp(score - lse[..., None]) @ values.transpose(1, 2)
    lse = lse.reshape(num, heads)
    if ragged:
        lse = lse.masked_fill(empty[:, None], -torch.inf)
    return out.reshape(num, heads, -1), lse
