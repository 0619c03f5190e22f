"""The score of a (query, key) pair, and the ragged form."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.cache.fp8 import decode_e4m3

LEAST_SCORE = torch.finfo(torch.float32).min  # of a key that is there: -inf stands for one that is not


def chunk_elements(device: torch.device) -> int:
    """How many dot products to hold at once: what stays in a CPU's cache, and on other devices a few hundred MiB."""
    return 2**20 if device.type == "cpu" else 2**25


def to_double(x: Tensor) -> Tensor:
    """fp64, exactly."""
    return decode_e4m3(x, torch.float64) if x.dtype == torch.float8_e4m3fn else x.double()


def score_pairs(q: Tensor, weights: Tensor, k: Tensor, k_scales: Tensor) -> Tensor:
    """THE score; every form goes through here.

    A dot product of e4m3 vectors is exact in fp64 in any order, so neither the tile nor the batch can show in the result. The sum over
    heads starts from +0.0, so an all-zero score is never -0.0. A score that falls below all finite numbers is the least of them.

    Args:
        q: fp64 ``[Q, H, D]``.
        weights: fp32 ``[Q, H]``.
        k: fp64 ``[N, D]``, shared by the queries, or ``[Q, N, D]``, each query's own.
        k_scales: fp32 ``[N]`` or ``[Q, N]``.

    Returns:
        fp32 ``[Q, N]``.
    """
    num, heads, dim = q.shape
    shared = k.dim() == 2
    dots = (q.reshape(num * heads, dim) @ k.T).view(num, heads, -1) if shared else q @ k.transpose(1, 2)
    terms = dots.float().relu_().mul_(weights[:, :, None])
    total = terms.new_zeros(num, dots.shape[-1])
    for head in range(heads):
        total.add_(terms[:, head])
    return total.mul_(k_scales).clamp_(min=LEAST_SCORE)


@torch.no_grad()
def ragged_scores(q: Tensor, weights: Tensor, k: Tensor, k_scales: Tensor, starts: list[int], ends: list[int]) -> Tensor:
    """fp32 ``[Q, N]``, -inf outside ``[start, end)``; memory beyond the result is bounded by ``chunk_elements``."""
    num, heads, _ = q.shape
    out = torch.full((num, k.shape[0]), -torch.inf, device=q.device)
    rows = [i for i in range(num) if starts[i] < ends[i]]
    if not rows:
        return out
    first, last = min(starts[i] for i in rows), max(ends[i] for i in rows)
    k_double, q_double = to_double(k[first:last]), to_double(q)
    limit = chunk_elements(q.device)
    step = max(1, limit // (max(heads, 1) * (last - first)))
    width = max(1, limit // (max(heads, 1) * step))
    for row in range(0, num, step):
        chunk = range(row, min(row + step, num))
        spans = [(starts[i], ends[i]) for i in chunk if starts[i] < ends[i]]
        if not spans:
            continue
        low, high = min(s for s, _ in spans), max(e for _, e in spans)
        qs = slice(chunk.start, chunk.stop)
        for left in range(low, high, width):
            right = min(left + width, high)
            out[qs, left:right] = score_pairs(q_double[qs], weights[qs], k_double[left - first : right - first], k_scales[left:right])
        for i in chunk:
            if starts[i] >= ends[i]:
                out[i, low:high] = -torch.inf
            else:
                out[i, low : starts[i]] = -torch.inf
                out[i, ends[i] : high] = -torch.inf
    return out
