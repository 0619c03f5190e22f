"""Rotary position embedding on the first ``rotary_dim`` dims.

```python
i = torch.arange(rotary_dim // 2)
angle = positions.float()[:, None] * theta ** (-2 * i / rotary_dim)  # fp32 [T, rotary_dim / 2]
a, b = (i, i + rotary_dim // 2) if style == "half" else (2 * i, 2 * i + 1)
out = x.clone()
out[:, a] = x[:, a] * angle.cos() - x[:, b] * angle.sin()
out[:, b] = x[:, b] * angle.cos() + x[:, a] * angle.sin()
```
"""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.errors import require
from thresher.ops.rope.reference import rope_reference

STYLES = ("half", "interleaved")


def apply_rope(x: Tensor, positions: Tensor, theta: float, rotary_dim: int, style: str) -> Tensor:
    """Rotate pairs of the first ``rotary_dim`` dims by ``position * theta ** (-2i / rotary_dim)``; the rest passes through.

    Angles and products are fp32. The layout of the input is kept in both styles. Differentiable in x.

    Args:
        x: ``[T, ..., D]``, any float type.
        positions: ``[T]`` integer token positions.
        theta: base of the frequencies, e.g. 10000.
        rotary_dim: how many leading dims rotate; even, at most D.
        style: ``"half"`` pairs dim i with ``i + rotary_dim / 2`` (NeoX; DeepSeek-V3.2's indexer),
            ``"interleaved"`` pairs 2i with 2i + 1 (GLM-5's indexer, and MLA in both).

    Returns:
        A tensor like x.

    Raises:
        ThresherError: a shape, dtype or style that does not fit.
    """
    require(
        x.is_floating_point() and x.dim() >= 2, "x must be a float tensor [tokens, ..., dim]", f"{x.dtype} {tuple(x.shape)}", "reshape it"
    )
    require(style in STYLES, f"style must be one of {', '.join(STYLES)}", repr(style), "name the RoPE layout")
    require(
        rotary_dim % 2 == 0 and 0 <= rotary_dim <= x.shape[-1],
        f"rotary_dim must be even and at most {x.shape[-1]}",
        rotary_dim,
        "pass the number of rotated dims",
    )
    require(theta > 0, "theta must be positive", theta, "pass the model's rope_theta")
    is_integer = positions.dtype in (torch.int32, torch.int64)
    require(
        is_integer and positions.shape == x.shape[:1],
        f"positions must be integers [{x.shape[0]}]",
        f"{positions.dtype} {tuple(positions.shape)}",
        "pass one position per token",
    )
    return rope_reference(x, positions, theta, rotary_dim, style == "interleaved")
