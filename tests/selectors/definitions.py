"""The methods written out once more in fp64, one query at a time, straight from the papers' formulas."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thresher.ops.quantize import dequantize_fp8, quantize_fp8

from .worlds import ATTENTION_DIM, ATTENTION_HEADS, KEY_HEADS, World


def terms(world: World, request: int, position: int, keys: Tensor) -> Tensor:
    """``w[j] * relu(q[j] . k[s])``, fp64 ``[H, n]``."""
    q, weights = world.q[request][position].double(), world.weights[request][position].double()
    return weights[:, None] * (q @ keys.T).clamp(min=0)


def scores(world: World, request: int, position: int, heads: list[int] | None = None) -> Tensor:
    each = terms(world, request, position, world.key_values(request)[: position + 1])
    return (each if heads is None else each[heads]).sum(0)


def best(values: Tensor, count: int, among: list[int] | None = None) -> list[int]:
    """Largest first, ties to the smaller number; the answer ascending."""
    values = values.tolist()
    return sorted(sorted(range(len(values)) if among is None else among, key=lambda i: (-values[i], i))[:count])


def is_close_call(values: Tensor, count: int) -> bool:
    """Whether the ``count``-th and the next value are too near to tell apart in fp32. Two exact zeros are not: a rule breaks that tie."""
    ordered = values.sort(descending=True).values
    if not 0 < count < len(ordered) or ordered[count - 1] == ordered[count] == 0:
        return False
    return bool(ordered[count - 1] - ordered[count] <= 1e-5 * ordered.abs().max())


def mean_key(keys: Tensor) -> Tensor:
    values, scale = quantize_fp8(keys.mean(0)[None].float())
    return dequantize_fp8(values, scale)[0].double()


def head_mass(world: World, request: int, position: int, block_size: int) -> Tensor:
    """MISA's E, fp64 ``[H]``: full blocks, and the part of the own one up to the query."""
    keys = world.key_values(request)[: position + 1]
    means = torch.stack([mean_key(block) for block in keys.split(block_size)])
    return terms(world, request, position, means).abs().mean(1)


def block_scores(world: World, request: int, position: int, block_size: int) -> Tensor:
    """HISA's J over the full blocks before the query's own, fp64 ``[own]``."""
    own = position // block_size
    keys = world.key_values(request)[: own * block_size]
    if own == 0:
        return torch.zeros(0, dtype=torch.float64)
    means = torch.stack([mean_key(block) for block in keys.split(block_size)])
    return terms(world, request, position, means).sum(0)


def attention_mass(world: World, request: int, position: int) -> Tensor:
    """Attention probability of each visible key summed over heads, with plain Python numbers."""
    total = [0.0] * (position + 1)
    for head in range(ATTENTION_HEADS):
        q = world.attention_q[request][position, head].tolist()
        group = head // (ATTENTION_HEADS // KEY_HEADS)
        logits = []
        for key in world.attention_k[request][: position + 1, group].tolist():
            logits.append(sum(a * b for a, b in zip(q, key, strict=True)) / math.sqrt(ATTENTION_DIM))
        norm = sum(math.exp(x) for x in logits)
        total = [t + math.exp(x) / norm for t, x in zip(total, logits, strict=True)]
    return torch.tensor(total, dtype=torch.float64)


def assert_same_set(got: list[int], values: Tensor, topk: int, among: list[int] | None = None) -> None:
    """``got`` is the top ``topk`` of fp64 ``values``; a key on one side only must score within fp32 rounding of the last one kept."""
    expected = best(values, topk, among)
    assert len(got) == len(expected)
    kth = min(values[i] for i in expected)
    eps = 8 * 2**-23 * float(values.abs().max())
    for key in set(got) ^ set(expected):
        assert abs(values[key] - kth) <= eps, (key, got, expected)
