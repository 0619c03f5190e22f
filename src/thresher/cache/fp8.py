"""The FP8 format of every cache: e4m3 values under a power-of-two scale (DeepSeek-V3.2-Exp, arXiv 2512.02556)."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.errors import require

E4M3_MAX = 448.0
MIN_AMAX = 1e-4


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each vector along the last dim to e4m3 with one scale.

    ``scale = max(amax, 1e-4) / 448`` rounded up to a power of two (ue8m0), found exactly from the binary exponent; values are
    ``x / scale`` (exact) rounded to nearest, ties to even, and never saturate.

    Args:
        x: ``[..., D]``, any float type, D >= 1; taken in fp32.

    Returns:
        values: float8_e4m3fn ``[..., D]``.
        scales: fp32 ``[...]``.

    Raises:
        ThresherError: ``x`` holds a NaN or an infinity, or is no float tensor, or D is 0.
    """
    fits = x.is_floating_point() and x.dim() >= 1 and x.shape[-1] >= 1
    require(fits, "x must be a float tensor [..., D] with D at least 1", f"{x.dtype} {tuple(x.shape)}", "convert it")
    x = x.float()
    amax = x.abs().amax(dim=-1)
    require(bool(torch.isfinite(amax).all()), "values to quantise must be finite", "NaN or inf", "check the layer before it")
    mantissa, exponent = torch.frexp(amax.clamp_min(MIN_AMAX))
    # 448 = 0.875 * 2**9, so amax / 448 = mantissa / 0.875 * 2**(exponent - 9), with mantissa in [0.5, 1).
    power = exponent - 9 + (mantissa > 0.875).to(exponent.dtype)
    # A power of two from its bits: ldexp goes through pow, which is not exact on every device.
    scales = ((power + 127) << 23).view(torch.float32)
    return (x / scales.unsqueeze(-1)).to(torch.float8_e4m3fn), scales


def dequantize_fp8(values: Tensor, scales: Tensor) -> Tensor:
    """``values * scales`` in fp32.

    Args:
        values: float8_e4m3fn ``[..., D]``.
        scales: fp32 ``[...]``.

    Returns:
        fp32 ``[..., D]``.

    Raises:
        ThresherError: shapes do not match.
    """
    require(
        scales.shape == values.shape[:-1], f"scales must be {tuple(values.shape[:-1])}", tuple(scales.shape), "pass one scale per vector"
    )
    return values.float() * scales.unsqueeze(-1)
