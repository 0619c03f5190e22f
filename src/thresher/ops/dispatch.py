"""Which implementation of an operation runs: one table, and no silent choice.

``impl="auto"`` takes the first implementation of the operation's row that can run for the tensors at hand. A named implementation runs or
raises ``ThresherError`` with the reason it cannot; it never falls back.

"reference" stands first in every row because no kernel has been run on a GPU yet: ask for "triton" by name. A row changes when the
kernel's tests have passed there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor

from thresher.errors import ThresherError, require

AUTO = "auto"

# operation (the public function's name) -> its implementations in order of preference.
TABLE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "index_score": ("reference", "triton"),
        "paged_index_score": ("reference", "triton"),
        "gathered_index_score": ("reference", "triton"),
        "select_topk": ("reference", "triton"),
        "select_topk_slots": ("reference", "triton"),
        "pool_keys": ("reference", "triton"),
        "partial_means": ("reference", "triton"),
        "head_mass": ("reference", "triton"),
        "route_heads": ("reference", "triton"),
        "sparse_attend": ("reference", "triton"),
        "sparse_attend_mla": ("reference", "triton"),
        "sparse_attend_mla_fp8": ("reference", "triton"),
        "store_index_keys": ("reference", "triton"),
        "quantize_queries": ("reference", "triton"),
        "store_latents": ("reference", "triton"),
        "merge": ("reference", "triton"),
    }
)

# operation -> its folder, where that has another name.
FOLDERS: Mapping[str, str] = MappingProxyType(
    {
        "paged_index_score": "index_score",
        "gathered_index_score": "index_score",
        "select_topk": "select",
        "select_topk_slots": "select",
        "partial_means": "pool_keys",
        "head_mass": "route_heads",
        "sparse_attend_mla": "sparse_attend",
        "sparse_attend_mla_fp8": "sparse_attend",
        "store_index_keys": "quantize",
        "quantize_queries": "quantize",
        "store_latents": "quantize",
    }
)

_auto_means: ContextVar[str] = ContextVar("auto_means", default=AUTO)


def choose(
    operation: str, impl: str, device: torch.device, unsupported: Callable[[ModuleType], str | None] = lambda module: None
) -> Callable[..., Any] | None:
    """What runs ``operation``: a kernel's function, with the public function's arguments, or None for the reference.

    Args:
        operation: a row of ``TABLE``.
        impl: "auto", or an implementation of that row.
        device: where the tensors are.
        unsupported: given the implementation's module, one line on why it cannot take these arguments, or None when it can.

    Raises:
        ThresherError: an unknown name, or a named implementation that cannot run, with the reason.
    """
    impl = _auto_means.get() if impl == AUTO else impl
    check_impl(impl, operation)
    for name in TABLE[operation] if impl == AUTO else (impl,):
        if name == "reference":
            return None
        why = reason(operation, name, device)
        if why is None:
            module = _module(operation, name)
            why = unsupported(module)
            if why is None:
                function: Callable[..., Any] = getattr(module, operation)
                return function
        if impl != AUTO:
            raise ThresherError(f'impl="{name}" of {operation} must be able to run; got: {why}; pass impl="auto" or "reference"')
    raise ThresherError(f"{operation} must have an implementation that can run; got none; check the table")


def reason(operation: str, impl: str, device: torch.device) -> str | None:
    """Why an implementation cannot run for tensors on ``device``, in one line, or None. What depends on shapes is left to the call."""
    if impl == "reference":
        return None
    if not installed(_path(operation, impl)):
        return f"{operation} has no {impl} kernel"
    if not installed(impl):
        return f"the package {impl} is not installed"
    try:
        module = _module(operation, impl)
    except ImportError as error:
        return f"its module cannot be imported ({' '.join(str(error).split())})"
    if not hasattr(module, operation):
        return f"{operation} has no {impl} kernel"
    if device.type != "cuda" and not interpreting():
        return f"the tensors are on {device.type}; Triton needs a CUDA device, or TRITON_INTERPRET=1"
    return None


def preferred(operation: str, device: torch.device) -> str:
    """The name of what "auto" takes for tensors on ``device``, as far as that does not depend on shapes."""
    return next(name for name in TABLE[operation] if reason(operation, name, device) is None)


def check_impl(impl: str, operation: str | None = None) -> None:
    """Raise ``ThresherError`` unless ``impl`` is "auto" or an implementation of ``operation`` (of any, when None)."""
    names = TABLE[operation] if operation else tuple(dict.fromkeys(name for row in TABLE.values() for name in row))
    require(impl == AUTO or impl in names, f"impl must be one of {', '.join((AUTO, *names))}", repr(impl), "check the spelling")


@contextmanager
def using(impl: str) -> Iterator[None]:
    """Inside the block, ``impl="auto"`` means ``impl`` for every operation, without falling back: a selector's operations are chosen so.

    Raises:
        ThresherError: an unknown name.
    """
    check_impl(impl)
    token = _auto_means.set(impl)
    try:
        yield
    finally:
        _auto_means.reset(token)


def device_of(**tensors: Tensor | None) -> torch.device:
    """The one device of all tensors given (None is left out).

    Raises:
        ThresherError: one of them, named, is on another device than the first.
    """
    there = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    first, device = next(iter(there.items()))
    for name, other in there.items():
        require(other == device, f"{name} must be on the device of {first}, {device}", other, "move it")
    return device


def no_gradient(*tensors: Tensor) -> str | None:
    """Why a kernel cannot run for these tensors of a differentiable operation, or None: kernels have no backward pass."""
    return "it has no gradient" if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors) else None


def can_read(device: torch.device) -> bool:
    """Whether values may be looked at: not while a CUDA graph is recorded, so checks of values are made before and left out there."""
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def interpreting() -> bool:
    """Whether Triton kernels run on a CPU, in Triton's own interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@cache
def installed(package: str) -> bool:
    """Whether a package or module can be imported, without importing it."""
    return find_spec(package) is not None


def _path(operation: str, impl: str) -> str:
    return f"thresher.ops.{FOLDERS.get(operation, operation)}.{impl}"


def _module(operation: str, impl: str) -> ModuleType:
    return import_module(_path(operation, impl))
