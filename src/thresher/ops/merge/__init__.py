"""Merge softmax attention over disjoint sets of keys.

```python
lses = torch.stack([part.lse for part in parts])  # [R, Q, N]
lse = torch.logsumexp(lses, 0)
weight = torch.exp(lses - lse)  # 0 for an empty part
out = sum(weight[r, ..., None] * part.out for r, part in enumerate(parts))  # in the order of the parts
```
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from thresher.errors import require
from thresher.ops.dispatch import can_read, choose, device_of, no_gradient
from thresher.ops.merge.reference import merge_reference
from thresher.types import PartialAttention


def merge(parts: Sequence[PartialAttention], impl: str = "auto") -> PartialAttention:
    """Attention over the union of the parts' sets, exactly when those are disjoint.

    Sums run over the parts in the given order, so every rank that holds the same list gets the same bits.
    What an empty part (lse -inf) holds in ``out`` is ignored; where all are empty, ``out`` is 0 and ``lse`` -inf.

    Args:
        parts: at least one, all with ``out`` fp32 ``[Q, N, Dv]`` and ``lse`` fp32 ``[Q, N]``.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Returns:
        The merged part, of the same shapes.

    Raises:
        ThresherError: no parts, shapes, dtypes or devices that differ, an lse of +inf (some kernels mark empty rows so), or an impl that
            cannot run.
    """
    require(len(parts) >= 1, "parts must hold at least one PartialAttention", 0, "pass one per rank")
    shape = parts[0].out.shape
    for part in parts:
        require(
            part.out.shape == shape and len(shape) == 3 and part.lse.shape == shape[:2],
            "all parts must have out [Q, N, Dv] and lse [Q, N] of the same shapes",
            f"out {tuple(part.out.shape)}, lse {tuple(part.lse.shape)}, first out {tuple(shape)}",
            "give every rank the same queries",
        )
        require(
            part.out.dtype == part.lse.dtype == torch.float32,
            "parts must be float32",
            f"{part.out.dtype}, {part.lse.dtype}",
            "call .float()",
        )
        device = device_of(first_part=parts[0].out, out=part.out, lse=part.lse)
        if can_read(device):
            require(not bool((part.lse == torch.inf).any()), "lse must be below +inf", "+inf", "mark empty rows with -inf")
    kernel = choose("merge", impl, parts[0].out.device, lambda _: no_gradient(*(x for part in parts for x in (part.out, part.lse))))
    return merge_reference(parts) if kernel is None else kernel(parts)
