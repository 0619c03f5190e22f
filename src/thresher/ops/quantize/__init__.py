"""FP8 of index queries, keys and block means: e4m3 with one power-of-two scale per vector.

```python
amax = x.float().abs().amax(-1).clamp(min=1e-4)
scales = torch.exp2(torch.ceil(torch.log2(amax / 448)))  # in exact arithmetic
values = (x.float() / scales[..., None]).to(torch.float8_e4m3fn)
again = values.float() * scales[..., None]
```
"""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.errors import require
from thresher.ops.quantize.reference import dequantize_reference, fp8_scale_reference, quantize_reference


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each vector of the last dimension to e4m3 with its own scale.

    Args:
        x: ``[..., D]``, any float type, finite.

    Returns:
        values float8_e4m3fn ``[..., D]`` and scales fp32 ``[...]``: ``max(amax, 1e-4) / 448`` rounded up to a power of two (ue8m0).

    Raises:
        ThresherError: x is not a float tensor, has no last dimension, or holds NaN or inf.

    Source: DeepSeek-V3.2-Exp (arXiv 2512.02556), the indexer's FP8 format.
    """
    require(x.is_floating_point(), "x must be a float tensor", x.dtype, "convert it")
    require(x.dim() >= 1 and x.shape[-1] >= 1, "x must be [..., D] with D at least 1", tuple(x.shape), "reshape it")
    amax = x.float().abs().amax(dim=-1)
    finite = torch.isfinite(amax)
    require(
        bool(finite.all()),
        "x must be finite",
        f"{int((~finite).sum())} of {finite.numel()} vectors with NaN or inf",
        "look upstream for an overflow",
    )
    scales = fp8_scale_reference(amax)
    return quantize_reference(x, scales), scales


def dequantize_fp8(values: Tensor, scales: Tensor) -> Tensor:
    """``values * scales`` in fp32, the inverse of ``quantize_fp8`` up to its rounding.

    Args:
        values: float8_e4m3fn ``[..., D]``.
        scales: fp32 ``[...]``.

    Returns:
        fp32 ``[..., D]``.

    Raises:
        ThresherError: a dtype or shape that does not fit.
    """
    require(values.dtype == torch.float8_e4m3fn, "values must be float8_e4m3fn", values.dtype, "pass the first result of quantize_fp8")
    require(
        scales.dtype == torch.float32 and scales.shape == values.shape[:-1],
        f"scales must be float32 {tuple(values.shape[:-1])}",
        f"{scales.dtype} {tuple(scales.shape)}",
        "pass one scale per vector",
    )
    return dequantize_reference(values, scales)
