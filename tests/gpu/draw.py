"""Inputs, drawn on the CPU so that a seed means the same everywhere, and caches with odd page tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thresher.cache.index_keys import planes
from thresher.ops import quantize_fp8
from thresher.types import IndexKeys, IndexQuery

from .machine import DEVICE, INTERPRET

FP8 = torch.float8_e4m3fn
GARBAGE = torch.tensor([-(2**31), 2**31 - 1, -2, 1 << 30, -1, 10**6, -(2**30)], dtype=torch.int32)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vectors(*shape: int, seed: int) -> tuple[Tensor, Tensor]:
    """Normal vectors of several magnitudes in FP8. In the interpreter small integers: only those add up alike in any order there."""
    gen = generator(seed)
    if INTERPRET:
        values = torch.randint(-3, 4, shape, generator=gen).float().to(FP8)
        return values.to(DEVICE), (2.0 ** torch.randint(-4, 3, shape[:-1], generator=gen).float()).to(DEVICE)
    size = 10.0 ** torch.randint(-1, 2, (*shape[:-1], 1), generator=gen)
    values, scales = quantize_fp8(torch.randn(*shape, generator=gen) * size)
    return values.to(DEVICE), scales.to(DEVICE)


def queries(num: int, heads: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """q ``[num, heads, dim]`` and weights of both signs, scales folded in."""
    q, scales = vectors(num, heads, dim, seed=seed)
    weights = torch.randn(num, heads, generator=generator(seed + 1)).to(DEVICE)
    return q, weights * scales * (heads * dim) ** -0.5


def query_of(q: Tensor, weights: Tensor, positions: Sequence[int] | Tensor, requests: Sequence[int] | Tensor) -> IndexQuery:
    return IndexQuery(q, weights, torch.as_tensor(positions, device=DEVICE), torch.as_tensor(requests, device=DEVICE))


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x; FP8 tensors by their bytes."""
    return x.view(torch.uint8)[index].view(FP8) if x.dtype == FP8 else x[index]


def paged(requests: Sequence[tuple[Tensor, Tensor]], page_size: int, seed: int = 0) -> IndexKeys:
    """Keys in shuffled pages, with a table wider than needed (-1, then garbage); all bytes that hold no key are NaN."""
    needed = [-(-len(scales) // page_size) for _, scales in requests]
    order = torch.randperm(sum(needed) + 2, generator=generator(seed))
    dim = requests[0][0].shape[1]
    pages = torch.full((len(order), page_size, 1, dim + 4), 0xFF, dtype=torch.uint8)
    value_plane, scale_plane = planes(pages)
    table = torch.full((len(requests), max(needed) + 2), -1, dtype=torch.int32)
    table[:, -1] = GARBAGE[torch.arange(len(requests)) % len(GARBAGE)]
    used = 0
    for row, (values, scales) in enumerate(requests):
        mine = order[used : used + needed[row]]
        used += needed[row]
        table[row, : needed[row]] = mine.int()
        at = torch.arange(len(scales))
        page, offset = mine[at // page_size], at % page_size
        value_plane.view(torch.uint8)[page, offset] = values.cpu().view(torch.uint8)
        scale_plane[page, offset] = scales.cpu()
    lengths = torch.tensor([len(scales) for _, scales in requests])
    return IndexKeys(pages.to(DEVICE), table.to(DEVICE), lengths.to(DEVICE))


def on_cpu(query: IndexQuery, keys: IndexKeys) -> tuple[IndexQuery, IndexKeys]:
    q = IndexQuery(query.q.cpu(), query.weights.cpu(), query.positions.cpu(), query.requests.cpu())
    return q, IndexKeys(keys.pages.cpu(), keys.page_table.cpu(), keys.lengths.cpu())
