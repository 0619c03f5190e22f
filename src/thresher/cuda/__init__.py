"""Kernels in CUDA C++, for what needs shared memory at any address and its atomics, which Triton has not."""

from __future__ import annotations

from importlib.util import find_spec


def missing() -> str | None:
    """Why no kernel can be compiled, in one line, or None. Imports nothing."""
    try:
        found = find_spec("cuda.bindings") is not None
    except ModuleNotFoundError:
        found = False
    return None if found else "the package cuda-bindings is not installed, which comes with PyTorch's CUDA builds"
