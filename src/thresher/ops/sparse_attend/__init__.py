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

import torch
from torch import Tensor

from thresher.errors import require
from thresher.ops.dispatch import can_read, choose, device_of, no_gradient
from thresher.ops.sparse_attend.reference import attend_reference
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
    require(
        k.dim() == 3 and v.dim() == 3 and k.shape[:2] == v.shape[:2],
        "k and v must be [slots, groups, dim]",
        f"{tuple(k.shape)} and {tuple(v.shape)}",
        "reshape them",
    )
    device = device_of(q=q, k=k, v=v, slots=slots)
    _check_query(q, slots, k.shape[0], k.shape[2])
    heads, groups = q.shape[1], k.shape[1]
    require(
        groups >= 1 and heads % groups == 0,
        "the kv groups must divide the attention heads",
        f"{groups} and {heads}",
        "check the model's kv heads",
    )
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
    require(latents.dim() == 2, "latents must be [slots, dim]", tuple(latents.shape), "reshape them")
    dim = latents.shape[1]
    require(1 <= value_dim <= dim, f"value_dim must be in 1..{dim}", value_dim, "pass the latent's value dims")
    device = device_of(q=q, latents=latents, slots=slots)
    _check_query(q, slots, latents.shape[0], dim)
    kernel = choose(
        "sparse_attend_mla", impl, device, lambda module: no_gradient(q, latents) or module.unsupported_mla(q, latents, value_dim)
    )
    if kernel is not None:
        part: PartialAttention = kernel(q, latents, slots, scale, value_dim)
        return part
    return attend_reference(q, latents[:, None], None, value_dim, slots, scale)


def _check_query(q: Tensor, slots: Tensor, num_slots: int, dim: int) -> None:
    require(q.dim() == 3 and q.shape[2] == dim, f"q must be [num_queries, heads, {dim}]", tuple(q.shape), "use the dim of the keys")
    ok = slots.dtype == torch.int32 and slots.dim() == 2 and slots.shape[0] == q.shape[0]
    require(ok, f"slots must be int32 [{q.shape[0]}, K]", f"{slots.dtype} {tuple(slots.shape)}", "convert them")
    if slots.numel() and can_read(slots.device):
        low, high = int(slots.min()), int(slots.max())
        require(
            low >= -1 and high < num_slots,
            f"slots must be in -1..{num_slots - 1}",
            f"{low}..{high}",
            "map positions to slots of this cache",
        )
