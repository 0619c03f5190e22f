"""Candidates that ranks propose to an exact merge, cruel ones among them, and what a rank keeps of them by sorting in Python."""

from __future__ import annotations

import math

import torch
from torch import Tensor

INF, NAN = math.inf, math.nan
CRUEL = torch.tensor([0.0, -0.0, 1.0, 1.0000001, -1.0, NAN, -INF, INF, 1e-45, -1e-45, 3.4028235e38, -3.4028235e38])
KINDS = (
    "normal", "coarse", "zeros of both signs", "all equal", "cruel", "all NaN", "all -inf", "NaN among -inf", "few numbers",
    "better on the last rank",
)  # fmt: skip


def make_scores(kind: str, shape: tuple[int, int, int], gen: torch.Generator) -> Tensor:
    noise, chance = torch.randn(shape, generator=gen), torch.rand(shape, generator=gen)
    match kind:
        case "coarse":
            return noise.round()
        case "zeros of both signs":
            return torch.where(chance < 0.4, 0.0, torch.where(chance < 0.8, -0.0, noise))
        case "all equal":
            return torch.full(shape, -3.5)
        case "cruel":
            return CRUEL[torch.randint(len(CRUEL), shape, generator=gen)]
        case "all NaN":
            return torch.full(shape, NAN)
        case "all -inf":
            return torch.full(shape, -INF)
        case "NaN among -inf":
            return torch.where(chance < 0.5, NAN, -INF)
        case "few numbers":
            return torch.where(chance < 0.1, noise, torch.where(chance < 0.6, NAN, -INF))
        case "better on the last rank":
            noise[-1] += 3.0
    return noise


def propose(kind: str, ranks: int, num: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores fp32 and local positions int32, ``[ranks, num, width]``. The first query has all of them, others have fewer on some ranks or
    none; what stands beside -1 is as good as can be."""
    gen = torch.Generator().manual_seed(seed)
    scores = make_scores(kind, (ranks, num, width), gen)
    positions = torch.rand(ranks, num, 3 * width, generator=gen).argsort(2)[:, :, :width].sort(2).values.int()
    for query in range(1, num):
        for rank in range(ranks):
            held = (width, width - 1, width // 2, 1, 0)[int(torch.randint(5, (1,), generator=gen))]
            positions[rank, query, held:] = -1
    return scores.masked_fill(positions < 0, INF), positions


def kept(scores: Tensor, positions: Tensor, query: int, rank: int, topk: int, granularity: int) -> list[int]:
    """The columns of its own candidates that a rank keeps for a query."""
    ranks = scores.shape[0]
    order = []
    for r in range(ranks):
        for column, (score, local) in enumerate(zip(scores[r, query].tolist(), positions[r, query].tolist(), strict=True)):
            if local >= 0:
                logical = (local // granularity * ranks + r) * granularity + local % granularity
                order.append((math.isnan(score), 0.0 if math.isnan(score) else -score, logical, r, column))
    return sorted(column for *_, r, column in sorted(order)[:topk] if r == rank)
