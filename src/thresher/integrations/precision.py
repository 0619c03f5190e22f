"""Queries and keys of a model in the forms that selectors take: exact, or in the FP8 of the published models.

Index keys are FP8 everywhere in Thresher, with 4 significant bits. An exact key is a row of them, side by side: the first rounds the key,
each next one what the one before left, times 16. The query stands beside itself as often, each time divided by 16, so that the dot product
of the two rows is the one of the model, and every selector and operation takes them as they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thresher.cache.fp8 import fp8_scale
from thresher.errors import require
from thresher.ops import hadamard, quantize_fp8

PRECISIONS = ("model", "fp8")
FP8_BITS = 4  # significant bits of e4m3; what a rounding leaves, times 2**FP8_BITS, is again in e4m3's range


def parts_of(dtype: torch.dtype) -> int:
    """How many FP8 numbers hold one of ``dtype``: 2 for bf16, 3 for fp16, 6 for fp32."""
    return math.ceil((1 - math.log2(torch.finfo(dtype).eps)) / FP8_BITS)


def encode_keys(k: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Keys as a cache of Thresher's stores them.

    Args:
        k: ``[n, D]``, any float type, after RoPE.
        precision: "model" for an exact row of ``parts_of(k.dtype)`` keys; "fp8" for one, after Hadamard.

    Returns:
        values: float8_e4m3fn ``[n, P * D]``.
        scales: fp32 ``[n]``.

    Raises:
        ThresherError: NaN or infinity in a key.
    """
    if precision == "fp8":
        return quantize_fp8(hadamard(k))
    amax = k.float().abs().amax(dim=-1)
    require(bool(torch.isfinite(amax).all()), "index keys must be finite", "a NaN or an infinity", "check the layer before it")
    scales = fp8_scale(amax)
    left, parts = k.float() / scales[:, None], []
    for _ in range(parts_of(k.dtype)):
        parts.append(left.to(torch.float8_e4m3fn))
        left = (left - parts[-1].float()) * 2**FP8_BITS
    return torch.cat([part.view(torch.uint8) for part in parts], dim=-1).view(torch.float8_e4m3fn), scales


def encode_queries(q: Tensor, weights: Tensor, dtype: torch.dtype, precision: str) -> tuple[Tensor, Tensor]:
    """Queries that score such keys.

    Args:
        q: ``[Q, H, D]``, any float type, after RoPE.
        weights: fp32 ``[Q, H]``, with every factor but the query's scale.
        dtype: of the model's keys.
        precision: as for ``encode_keys``.

    Returns:
        The ``q`` and ``weights`` of an ``IndexQuery``: fp32 ``[Q, H, P * D]``, or float8_e4m3fn ``[Q, H, D]``; and fp32 ``[Q, H]``.
    """
    if precision == "fp8":
        values, scales = quantize_fp8(hadamard(q))
        return values, weights * scales
    return torch.cat([q.float() * 2.0 ** (-FP8_BITS * part) for part in range(parts_of(dtype))], dim=-1), weights
