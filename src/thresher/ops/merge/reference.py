"""The log-sum-exp merge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thresher.types import PartialAttention


def merge_reference(parts: Sequence[PartialAttention]) -> PartialAttention:
    """The merge; sums one part at a time, in order."""
    peak = parts[0].lse
    for part in parts[1:]:
        peak = torch.maximum(peak, part.lse)
    empty = peak == -torch.inf
    peak = peak.masked_fill(empty, 0.0)

    total = torch.zeros_like(peak)
    for part in parts:
        total = total + torch.exp(part.lse - peak)
    total = total.masked_fill(empty, 1.0)
    lse = (peak + torch.log(total)).masked_fill(empty, -torch.inf)

    out: Tensor = torch.zeros_like(parts[0].out)
    for part in parts:
        # exp(lse_r - peak) / total, not exp(lse_r - lse): a large lse has too few bits left to sum the weights to 1.
        weight = (torch.exp(part.lse - peak) / total)[..., None]
        absent = (part.lse == -torch.inf)[..., None]
        out = out + (weight * part.out).masked_fill(absent, 0.0)
    return PartialAttention(out=out, lse=lse)
