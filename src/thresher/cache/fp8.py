"""The FP8 format of every cache: e4m3 values under a power-of-two scale (DeepSeek-V3.2-Exp, arXiv 2512.02556)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from thresher.checks import E4M3, FLOAT, FP32, check_tensor
from thresher.errors import require

MIN_AMAX = 1e-4


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each vector along the last dim to e4m3 with one scale.

    ``scale = max(amax, 1e-4) / 448`` rounded up to a power of two (ue8m0); values are ``x / scale`` (exact) rounded to nearest, ties to
    even, and never saturate.

    Args:
        x: ``[..., D]``, any float type, D >= 1; taken in fp32.

    Returns:
        values: float8_e4m3fn ``[..., D]``.
        scales: fp32 ``[...]``.

    Raises:
        ThresherError: ``x`` holds a NaN or an infinity, or is no float tensor, or D is 0.
    """
    check_tensor("x", x, FLOAT, ("...", "D"), "convert it")
    require(x.shape[-1] >= 1, "x must be [..., D] with D at least 1", tuple(x.shape), "reshape it")
    x = x.float()
    amax = x.abs().amax(dim=-1)
    finite = torch.isfinite(amax)
    if not bool(finite.all()):
        bad = f"{int((~finite).sum())} of {finite.numel()} vectors with NaN or inf"
        require(False, "x must be finite", bad, "look upstream for an overflow")
    scales = fp8_scale(amax)
    return (x / scales.unsqueeze(-1)).to(torch.float8_e4m3fn), scales


def dequantize_fp8(values: Tensor, scales: Tensor) -> Tensor:
    """``values * scales`` in fp32; exact but for underflow, the scale being a power of two.

    Args:
        values: float8_e4m3fn ``[..., D]``.
        scales: fp32 ``[...]``.

    Returns:
        fp32 ``[..., D]``.

    Raises:
        ThresherError: a dtype, shape or device that does not fit.
    """
    check_tensor("values", values, E4M3, ("...", "D"), "pass the first result of quantize_fp8")
    check_tensor("scales", scales, FP32, tuple(values.shape[:-1]), "pass one scale per vector")
    require(scales.device == values.device, f"scales must be on the device of values, {values.device}", scales.device, "move them")
    return decode_e4m3(values, torch.float32) * scales.unsqueeze(-1)


def fp8_scale(amax: Tensor) -> Tensor:
    """fp32 ``max(amax, 1e-4) / 448`` rounded up to a power of two, exactly.

    ``448 = 0.875 * 2**9``: with ``amax = m * 2**e`` and m in [0.5, 1) the exponent is ``e - 9``, or one more when m > 0.875. No division,
    so no device's rounding of it can move a boundary; and the power comes from its bits, since ldexp is not exact on every device.
    """
    mantissa, exponent = torch.frexp(amax.clamp(min=MIN_AMAX))
    exponent = exponent.int() - 9 + (mantissa > 0.875)
    return ((exponent + 127) << 23).view(torch.float32)


def decode_e4m3(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that e4m3 bytes stand for, as fp32 or fp64. A table look-up: 5 times faster on a CPU than the cast."""
    codes = values.reshape(-1).view(torch.uint8).int()
    return _e4m3_table(dtype, values.device).index_select(0, codes).view(values.shape)


@cache
def _e4m3_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype).to(device)
