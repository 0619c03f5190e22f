"""What an argument must be, checked in one line each before anything is launched. Nothing here reads a tensor's values."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from thresher.errors import ThresherError

FLOAT = "a float tensor"  # of any float type, float8 too
WIDE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
HALF_OR_SINGLE = (torch.bfloat16, torch.float16, torch.float32)
E4M3 = (torch.float8_e4m3fn,)
FP32 = (torch.float32,)
INT64 = (torch.int64,)
INT32 = (torch.int32,)
INDEX = (torch.int32, torch.int64)
BYTES = (torch.uint8,)


def check_tensor(name: str, value: object, dtypes: str | tuple[torch.dtype, ...], shape: tuple[int | str, ...], do: str) -> None:
    """Raise unless ``value`` is a tensor of one of the dtypes and of this shape.

    Args:
        name: the argument's.
        value: what was passed.
        dtypes: those it may have, or ``FLOAT``.
        shape: a number for a size that is fixed, a name for one that is free; ``"..."`` for any number of dims.
        do: what the caller should do instead.

    Raises:
        ThresherError: naming the argument, what it must be and what it was.
    """
    if isinstance(value, Tensor):
        right = value.is_floating_point() if isinstance(dtypes, str) else value.dtype in dtypes
        if right and _fits(value.shape, shape):
            return
    words = dtypes if isinstance(dtypes, str) else " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    _refuse(f"{name} must be {words} [{', '.join(map(str, shape))}]", value, do)


def check_count(name: str, value: object, low: int, high: int | None = None, do: str = "pass a whole number") -> None:
    """Raise unless ``value`` is a whole number in ``low..high`` (no bound where None); a bool is none."""
    if not isinstance(value, bool) and isinstance(value, Integral) and low <= int(value) and (high is None or int(value) <= high):
        return
    _refuse(f"{name} must be a whole number of at least {low}" if high is None else f"{name} must be in {low}..{high}", value, do)


def check_number(name: str, value: object, positive: bool = False, do: str = "pass a number") -> None:
    """Raise unless ``value`` is a finite real number, and above 0 where ``positive``; a tensor or a bool is none."""
    if not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value) and (float(value) > 0 or not positive):
        return
    _refuse(f"{name} must be a {'positive ' if positive else ''}finite number", value, do)


def check_kind(name: str, value: object, kind: type, do: str) -> None:
    """Raise unless ``value`` is a ``kind``."""
    if not isinstance(value, kind):
        _refuse(f"{name} must be of type {kind.__name__}", value, do)


def check_list(name: str, value: object, of: str, do: str) -> None:
    """Raise unless ``value`` is a list or a tuple."""
    if not isinstance(value, list | tuple):
        _refuse(f"{name} must be a list of {of}", value, do)


def _fits(sizes: torch.Size, shape: tuple[int | str, ...]) -> bool:
    if "..." in shape:
        more = len(sizes) - len(shape) + 1
        at = shape.index("...")
        shape = (*shape[:at], *["any"] * more, *shape[at + 1 :])
    return len(sizes) == len(shape) and all(isinstance(want, str) or want == size for want, size in zip(shape, sizes, strict=True))


def _refuse(must: str, value: object, do: str) -> None:
    """A tensor is described by dtype and shape, a number or a text as it is, and anything else by its type."""
    if isinstance(value, Tensor):
        got = f"{value.dtype} {tuple(value.shape)}"
    elif value is None or isinstance(value, int | float | str):
        got = repr(value)
    else:
        got = f"an object of type {type(value).__name__}"
    raise ThresherError(f"{must}; got {got}; {do}")
