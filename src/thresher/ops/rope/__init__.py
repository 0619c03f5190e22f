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

from torch import Tensor

from thresher.checks import FLOAT, INDEX, check_count, check_number, check_tensor
from thresher.errors import require
from thresher.ops.dispatch import device_of
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
        ThresherError: a shape, dtype, device, size or style that does not fit.
    """
    check_tensor("x", x, FLOAT, ("tokens", "...", "dim"), "reshape it")
    check_rotation(x.shape[-1], theta, rotary_dim, style)
    check_tensor("positions", positions, INDEX, (x.shape[0],), "pass one position per token")
    device_of(x=x, positions=positions)
    return rope_reference(x, positions, theta, rotary_dim, style == "interleaved")


def check_rotation(dim: int, theta: float, rotary_dim: int, style: str) -> None:
    """Raise ``ThresherError`` unless vectors of ``dim`` dims can be rotated so."""
    require(style in STYLES, f"style must be one of {', '.join(STYLES)}", repr(style), "name the RoPE layout")
    check_count("rotary_dim", rotary_dim, 0, dim, "pass the number of rotated dims")
    require(rotary_dim % 2 == 0, "rotary_dim must be even", rotary_dim, "pass the number of rotated dims")
    check_number("theta", theta, positive=True, do="pass the model's rope_theta")
