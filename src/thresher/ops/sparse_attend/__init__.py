"""Softmax attention over chosen slots, with its log-sum-exp.

```python
k_sel = k[slots.clamp(min=0)].float().repeat_interleave(N // G, 2)  # [Q, K, N, Dk]
v_sel = v[slots.clamp(min=0)].float().repeat_interleave(N // G, 2)
score = torch.einsum("qnd,qknd->qnk", q.float(), k_sel) * scale
score = score.masked_fill(slots[:, None] < 0, -torch.inf)
lse = torch.logsumexp(score, -1)
out = torch.einsum("qnk,qknd->qnd", torch.exp(score - lse[..., None]), v_sel)  # no slot at all: out 0, lse -inf
```
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from thresher.cache.latents import FP8_BYTES, LATENT_DIM, ROPE_DIM
from thresher.checks import BYTES, FLOAT, INT32, check_count, check_kind, check_number, check_tensor
from thresher.errors import require
from thresher.ops.arguments import check_values
from thresher.ops.dispatch import choose, device_of, no_gradient
from thresher.ops.sparse_attend.reference import attend_fp8_reference, attend_reference
from thresher.types import PartialAttention


def sparse_attend(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, scale: float, impl: str = "auto") -> PartialAttention:
    """Grouped-query attention of each query over its own slots. Differentiable in q, k and v.

    Args:
        q: ``[Q, N, Dk]``, any float type (computed in fp32).
        k: ``[S, G, Dk]`` with G dividing N: head n reads group ``n // (N // G)``.
        v: ``[S, G, Dv]``.
        slots: int32 ``[Q, K]``, rows of k and v, no duplicates; -1 is skipped wherever it stands.
        scale: softmax scale, usually ``Dk**-0.5``.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Returns:
        out fp32 ``[Q, N, Dv]`` and lse fp32 ``[Q, N]``; 0 and -inf for a row without slots. Slots that are not named are never read
        into the result, whatever they hold.

    Raises:
        ThresherError: a shape, dtype or device that does not fit, a slot outside -1..S - 1, or an impl that cannot run.
    """
    check_tensor("k", k, FLOAT, ("slots", "groups", "dim"), "reshape it")
    require(k.shape[1] >= 1, "k must have at least one group", tuple(k.shape), "check the model's kv heads")
    check_tensor("v", v, FLOAT, (k.shape[0], k.shape[1], "value_dim"), "pass a value per key")
    device = _check(q, FLOAT, slots, scale, k.shape[2], k=k, v=v)
    heads, groups = q.shape[1], k.shape[1]
    require(heads % groups == 0, "the groups of k must divide the heads of q", f"{groups} and {heads}", "check the model's kv heads")
    _check_slots(slots, k.shape[0])
    kernel = choose("sparse_attend", impl, device, lambda module: no_gradient(q, k, v) or module.unsupported(q, k, v))
    return attend_reference(q, k, v, v.shape[2], slots, scale) if kernel is None else kernel(q, k, v, slots, scale)


def sparse_attend_mla(
    q: Tensor, latents: Tensor, slots: Tensor, scale: float, value_dim: int = 512, impl: str = "auto"
) -> PartialAttention:
    """Multi-query attention over MLA latents: every head reads the same ``[S, 576]`` rows, the value is their first 512 dims.

    Args:
        q: ``[Q, N, 576]``, the absorbed queries (512 latent dims, then 64 of RoPE), any float type.
        latents: ``[S, 576]``.
        slots: int32 ``[Q, K]``, -1 is skipped wherever it stands.
        scale: softmax scale.
        value_dim: leading dims that are the value (kv_lora_rank).
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Returns:
        out fp32 ``[Q, N, 512]`` and lse fp32 ``[Q, N]``; 0 and -inf for a row without slots.

    Raises:
        ThresherError: a shape, dtype or device that does not fit, a slot outside -1..S - 1, or an impl that cannot run.

    Source: DeepSeek-V3.2-Exp (arXiv 2512.02556), MLA in its MQA mode.
    """
    check_tensor("latents", latents, FLOAT, ("slots", "dim"), "reshape them")
    dim = latents.shape[1]
    check_count("value_dim", value_dim, 1, dim, "pass the latent's value dims")
    device = _check(q, FLOAT, slots, scale, dim, latents=latents)
    _check_slots(slots, latents.shape[0])
    kernel = choose(
        "sparse_attend_mla", impl, device, lambda module: no_gradient(q, latents) or module.unsupported_mla(q, latents, value_dim)
    )
    if kernel is not None:
        part: PartialAttention = kernel(q, latents, slots, scale, value_dim)
        return part
    return attend_reference(q, latents[:, None], None, value_dim, slots, scale)


def sparse_attend_mla_fp8(
    q: Tensor, cache_data: Tensor, slots: Tensor, scale: float, impl: str = "auto", early: bool = True
) -> PartialAttention:
    """``sparse_attend_mla`` over the FP8 latent cache as it lies in memory. The reference is differentiable in q.

    Args:
        q: bf16 ``[Q, N, 576]``, the absorbed queries.
        cache_data: uint8 ``[P, page_size, 1, 656]``, the bytes of ``LatentCache.data``; pages and tokens may be strided.
        slots: int32 ``[Q, K]``, ``page * page_size + offset``; -1 is skipped wherever it stands.
        scale: softmax scale.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.
        early: whether a GPU may put programs on multiprocessors while the launch ahead still has others, which is faster; but not after a
            launch that has all of them to its end, as a selection with ``Selection.slots``: a program is a third slower there
            (docs/lab-log.md).

    Returns:
        out fp32 ``[Q, N, 512]`` and lse fp32 ``[Q, N]``; 0 and -inf for a row without slots. The reference multiplies values by their
        scales in fp32, a kernel may round the product to bf16, which loses nothing where the scale is a power of two.

    Raises:
        ThresherError: a shape, dtype or device that does not fit, a slot outside -1..P * page_size - 1, or an impl that cannot run. Where
            values are not checked (``ops.dispatch.checks_values``) a kernel takes a slot outside as -1.

    Source: the cache of DeepSeek-V3.2-Exp (arXiv 2512.02556); docs/formats.md has its bytes.
    """
    check_tensor("cache_data", cache_data, BYTES, ("pages", "page_size", 1, FP8_BYTES), "pass LatentCache(fp8=True).data")
    require(cache_data.shape[1] >= 1, "the page_size of cache_data must be at least 1", tuple(cache_data.shape), "64 is usual")
    device = _check(q, (torch.bfloat16,), slots, scale, LATENT_DIM + ROPE_DIM, cache_data=cache_data)
    _check_slots(slots, cache_data.shape[0] * cache_data.shape[1])
    check_kind("early", early, bool, "pass True or False")
    kernel = kernel_over_fp8(q, cache_data, slots, impl, device)
    return attend_fp8_reference(q, cache_data, slots, scale) if kernel is None else kernel(q, cache_data, slots, scale, early)


def kernel_over_fp8(q: Tensor, cache_data: Tensor, slots: Tensor, impl: str, device: torch.device) -> Callable[..., Any] | None:
    """What runs ``sparse_attend_mla_fp8`` for these arguments: a kernel, or None for the reference.

    Raises:
        ThresherError: a named implementation that cannot run.
    """
    return choose(
        "sparse_attend_mla_fp8", impl, device, lambda module: no_gradient(q) or module.unsupported_mla_fp8(q, cache_data, slots),
        lambda module: module.worthwhile(q) if hasattr(module, "worthwhile") else True,
    )  # fmt: skip


def _check(q: Tensor, q_dtypes: str | tuple[torch.dtype, ...], slots: Tensor, scale: float, dim: int, **memory: Tensor) -> torch.device:
    check_tensor("q", q, q_dtypes, ("num_queries", "heads", dim), "use the dim of the keys")
    check_tensor("slots", slots, INT32, (q.shape[0], "K"), "pass a row per query, as .int()")
    check_number("scale", scale, do="pass the softmax scale")
    return device_of(q=q, slots=slots, **memory)


def _check_slots(slots: Tensor, num_slots: int) -> None:
    check_values(("slots", slots, -1, num_slots - 1, "map positions to slots of this cache"))
