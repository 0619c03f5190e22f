"""The Hadamard rotation as ``log2(D)`` butterfly passes."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard_reference(x: Tensor) -> Tensor:
    """fp32 ``[..., D]``. Butterflies rather than a matmul: elementwise, so the bits do not depend on the batch."""
    dim = x.shape[-1]
    y = x.float()
    half = 1
    while half < dim:
        low, high = y.unflatten(-1, (dim // (2 * half), 2, half)).unbind(-2)
        y = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        half *= 2
    return y * dim**-0.5
