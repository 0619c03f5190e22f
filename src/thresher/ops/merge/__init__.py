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
from torch import Tensor

from thresher.checks import FP32, check_kind, check_list, check_tensor
from thresher.errors import require
from thresher.ops.dispatch import checks_values, choose, device_of, no_gradient
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
    check_list("parts", parts, "PartialAttention", "pass one per rank")
    require(len(parts) >= 1, "parts must hold at least one PartialAttention", 0, "pass one per rank")
    shape: tuple[int | str, ...] = ("Q", "N", "Dv")
    tensors: dict[str, Tensor] = {}
    for i, part in enumerate(parts):
        check_kind(f"parts[{i}]", part, PartialAttention, "pass what sparse_attend returns")
        check_tensor(f"parts[{i}].out", part.out, FP32, shape, "give every rank the same queries, in fp32")
        shape = tuple(part.out.shape)
        check_tensor(f"parts[{i}].lse", part.lse, FP32, shape[:2], "pass one per query and head, in fp32")
        tensors |= {f"parts[{i}].out": part.out, f"parts[{i}].lse": part.lse}
    device = device_of(**tensors)
    if checks_values(device):
        high = torch.stack([(part.lse == torch.inf).any() for part in parts])
        require(not bool(high.any()), "the lse of parts must be below +inf", "+inf", "mark empty rows with -inf")
    kernel = choose("merge", impl, device, lambda _: no_gradient(*(x for part in parts for x in (part.out, part.lse))))
    return merge_reference(parts) if kernel is None else kernel(parts)
