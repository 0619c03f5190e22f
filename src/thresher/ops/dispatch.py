"""Which implementation of an operation runs: one table, and no silent choice.

``impl="auto"`` takes the first implementation of the operation's row in ``TABLE`` that can run for the tensors at hand:

- on a CUDA device of compute capability 8.9 or newer "triton"; for attention over the FP8 latent cache before it "flash_mla", but where the
  kernel for Hopper can run, which is faster (``worthwhile`` there);
- on an older one, on a CPU, and where a kernel cannot take the arguments, "reference". Never a kernel for tensors on a CPU, whether Triton
  interprets there or not: only a name asks for that;
- for ``score_select``, of kernels for compute capability 9.0 alone, "cuda" (a step of decoding) and "triton" (prefill) only for as many
  queries, requests, heads and keys as ``worthwhile`` there says, and else the two steps that "reference" stands for. Those then are "auto"
  themselves: kernels, where these can run. So it is for ``hisa_select``, with four steps.

The implementations in ``NAMED`` are for a name alone, since "auto" promises what they do not: "deep_gemm" scores with other roundings, and
others in its ragged form than in its paged one, where here a pair has one score; "flashinfer" and "vllm" order NaN or break ties in
another way; "flash_mla" over bf16 latents rounds its output to bf16. (Over the FP8 cache it does so too: that cache's own rounding is
coarser.)

A named implementation runs or raises ``ThresherError`` with the reason it cannot; it never falls back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

# operation (the public function's name) -> what "auto" tries, in this order.
TABLE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "index_score": ("triton", "reference"),
        "paged_index_score": ("triton", "reference"),
        "gathered_index_score": ("triton", "reference"),
        "block_index_score": ("triton", "reference"),
        "select_topk": ("triton", "reference"),
        "select_topk_slots": ("triton", "reference"),
        "select_topk_in_blocks": ("triton", "reference"),
        "select_blocks": ("triton", "reference"),
        "to_slots": ("triton", "reference"),
        "keep_best": ("triton", "reference"),
        "score_select": ("cuda", "triton", "reference"),
        "hisa_select": ("cuda", "reference"),
        "pool_keys": ("triton", "reference"),
        "pool_blocks": ("triton", "reference"),
        "grow_means": ("triton", "reference"),
        "partial_means": ("triton", "reference"),
        "head_mass": ("triton", "reference"),
        "route_heads": ("triton", "reference"),
        "routed_query": ("triton", "reference"),
        "sparse_attend": ("triton", "reference"),
        "sparse_attend_mla": ("triton", "reference"),
        "sparse_attend_mla_fp8": ("flash_mla", "triton", "reference"),
        "store_index_keys": ("triton", "reference"),
        "quantize_queries": ("triton", "reference"),
        "store_latents": ("triton", "reference"),
        "store_step": ("triton", "reference"),
        "merge": ("triton", "reference"),
    }
)

# operation -> what else can be asked for by name.
NAMED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "index_score": ("deep_gemm",),
        "paged_index_score": ("deep_gemm",),
        "select_topk": ("flashinfer", "vllm"),
        "sparse_attend_mla": ("flash_mla",),
    }
)

# implementation -> the cards that it runs on: in words, and by (major, minor) compute capability. Triton's kernels need e4m3 in hardware.
CARDS: Mapping[str, tuple[str, Callable[[tuple[int, int]], bool]]] = MappingProxyType(
    {
        "triton": ("8.9 or newer", lambda card: card >= (8, 9)),
        "deep_gemm": ("9.0 or 10.x", lambda card: card[0] in (9, 10)),
        "flash_mla": ("9.0 or 10.x", lambda card: card[0] in (9, 10)),
        "flashinfer": ("9.0 or 10.x", lambda card: card[0] in (9, 10)),
        "vllm": ("9.0 or 10.x", lambda card: card[0] in (9, 10)),
        "cuda": ("9.0", lambda card: card == (9, 0)),
    }
)

# Names the object file vllm/_C_stable_libtorch.abi3.so of a vllm wheel, where the package itself is not installed.
VLLM_OPS = "THRESHER_VLLM_OPS"

# Set to 1, the values in tensors on a CUDA device are checked too (checks_values).
CHECK_VALUES = "THRESHER_CHECK_VALUES"

# operation -> its folder, where that has another name.
FOLDERS: Mapping[str, str] = MappingProxyType(
    {
        "paged_index_score": "index_score",
        "gathered_index_score": "index_score",
        "block_index_score": "index_score",
        "select_topk": "select",
        "select_topk_slots": "select",
        "select_topk_in_blocks": "select",
        "select_blocks": "select",
        "pool_blocks": "pool_keys",
        "grow_means": "pool_keys",
        "partial_means": "pool_keys",
        "head_mass": "route_heads",
        "routed_query": "route_heads",
        "sparse_attend_mla": "sparse_attend",
        "sparse_attend_mla_fp8": "sparse_attend",
        "store_index_keys": "quantize",
        "quantize_queries": "quantize",
        "store_latents": "quantize",
        "store_step": "quantize",
    }
)

_auto_means: ContextVar[str] = ContextVar("auto_means", default=AUTO)


def choose(
    operation: str,
    impl: str,
    device: torch.device,
    unsupported: Callable[[ModuleType], str | None] = lambda module: None,
    worthwhile: Callable[[ModuleType], bool] = lambda module: True,
) -> Callable[..., Any] | None:
    """What runs ``operation``: a kernel's function, with the public function's arguments, or None for the reference.

    Args:
        operation: a row of ``TABLE``.
        impl: "auto", or an implementation of that operation.
        device: where the tensors are.
        unsupported: given the implementation's module, one line on why it cannot take these arguments, or None when it can.
        worthwhile: given it, whether "auto" takes it, if it can run, before those that follow.

    Raises:
        ThresherError: an unknown name, or a named implementation that cannot run, with the reason.
    """
    impl = _auto_means.get() if impl == AUTO else impl
    check_impl(impl, operation)
    for name in _candidates(operation, device) if impl == AUTO else (impl,):
        if name == "reference":
            return None
        why = reason(operation, name, device)
        if why is None:
            module = _module(operation, name)
            why = unsupported(module)
            if why is None and (impl != AUTO or worthwhile(module)):
                function: Callable[..., Any] = getattr(module, operation)
                return function
        if impl != AUTO:
            raise ThresherError(f'impl="{name}" of {operation} must be able to run; got: {why}; pass impl="auto" or "reference"')
    raise ThresherError(f"{operation} must have an implementation that can run; got none; check the table")


def one_or_steps(
    operation: str, device: torch.device, unsupported: Callable[[ModuleType], str | None], worthwhile: Callable[[ModuleType], bool]
) -> Callable[..., Any] | None:
    """What "auto" takes for an operation that stands for several: kernels that do all at once, where they can run and are worthwhile, or
    None for the steps, each "auto" itself.

    What ``using`` makes of "auto" holds for the steps, but "cuda" for this operation; its kernels of "triton" are another way to run them
    as "triton".

    Args:
        operation, device, unsupported: as for ``choose``.
        worthwhile: given the implementation's module, whether it is the faster way.

    Raises:
        ThresherError: inside ``using("cuda")``, a kernel that cannot run.
    """
    meant = meaning()

    def why_not(module: ModuleType) -> str | None:
        return "triton was asked for" if meant == "triton" and module.__name__.endswith(".cuda") else unsupported(module)

    if meant == "cuda":
        return choose(operation, AUTO, device, unsupported)
    if meant not in (AUTO, "triton"):
        return None
    with using(AUTO):
        return choose(operation, AUTO, device, why_not, worthwhile)


def reason(operation: str, impl: str, device: torch.device) -> str | None:
    """Why an implementation cannot run for tensors on ``device``, in one line, or None. What depends on shapes is left to the call."""
    if impl == "reference":
        return None
    if not installed(_path(operation, impl)):
        return f"{operation} has no {impl} kernel"
    why = absent(impl)
    if why is not None:
        return why
    try:
        module = _module(operation, impl)
    except ImportError as error:
        return f"its module cannot be imported ({_line(error)})"
    if not hasattr(module, operation):
        return f"{operation} has no {impl} kernel"
    if impl == "triton" and device.type != "cuda" and interpreting():
        return None
    return wrong_device(impl, device) or _unloadable(module)


def absent(package: str) -> str | None:
    """Why a package with kernels cannot be imported, in one line, or None. Imports nothing."""
    named = os.environ.get(VLLM_OPS) if package == "vllm" else None
    if named:
        return None if os.path.isfile(named) else f"{VLLM_OPS} must name a file, and {named} is none"
    if installed(package):
        return None
    name = "cuda-bindings" if package == "cuda" else package  # as installers call it
    return f"the package {name} is not installed" + (f", nor does {VLLM_OPS} name its object file" if package == "vllm" else "")


def wrong_device(impl: str, device: torch.device) -> str | None:
    """Why an implementation's kernels do not run on a device, in one line, or None."""
    if device.type != "cuda":
        how = "Triton needs a CUDA device, or TRITON_INTERPRET=1" if impl == "triton" else f"{impl} needs a CUDA device"
        return f"the tensors are on {device.type}; {how}"
    card = capability(device)
    if card is None:
        return "no CUDA device is here"
    words, fits = CARDS[impl]
    return None if fits(card) else f"it needs compute capability {words}, and this card has {card[0]}.{card[1]}"


@cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device, None where there is none."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def preferred(operation: str, device: torch.device) -> str:
    """The name of what "auto" takes for tensors on ``device``, as far as that does not depend on shapes."""
    return next(name for name in _candidates(operation, device) if reason(operation, name, device) is None)


def implementations(operation: str) -> tuple[str, ...]:
    """All names that ``impl`` may have for an operation, "auto" apart; those that it tries come first."""
    return TABLE[operation] + NAMED.get(operation, ())


def check_impl(impl: str, operation: str | None = None) -> None:
    """Raise ``ThresherError`` unless ``impl`` is "auto" or an implementation of ``operation`` (of any, when None)."""
    names = implementations(operation) if operation else tuple(dict.fromkeys(name for row in TABLE for name in implementations(row)))
    require(impl == AUTO or impl in names, f"impl must be one of {', '.join((AUTO, *names))}", repr(impl), "check the spelling")


def meaning() -> str:
    """What "auto" means here: an implementation's name inside ``using``, else "auto"."""
    return _auto_means.get()


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
    """Whether a value on a device may be read by the host: not while a CUDA graph is recorded."""
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def checks_values(device: torch.device) -> bool:
    """Whether the values in tensors are checked: on a CPU always, on a CUDA device with THRESHER_CHECK_VALUES=1, outside of graphs.

    A look waits for all the work before it: 0.4 ms, next to 0.5 for the scores of 1024 queries over 32k keys. Without it a kernel takes
    what is out of bounds as absent, and never reads there.
    """
    return device.type != "cuda" or (os.environ.get(CHECK_VALUES) == "1" and can_read(device))


def interpreting() -> bool:
    """Whether Triton kernels run on a CPU, in Triton's own interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@cache
def installed(package: str) -> bool:
    """Whether a package or module can be imported, without importing it."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # a part of a package that is not there
        return False


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Inside, a package launches on this tensor's GPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _candidates(operation: str, device: torch.device) -> tuple[str, ...]:
    """What "auto" tries: no kernel for tensors that are not on a GPU."""
    return TABLE[operation] if device.type == "cuda" else ("reference",)


def _unloadable(module: ModuleType) -> str | None:
    """Why the package behind an adapter cannot be loaded, in one line, or None; our own kernels have none."""
    load = getattr(module, "load", None)
    if load is not None:
        try:
            load()
        except Exception as error:  # an import of somebody else's package may fail in any way
            return f"its package cannot be loaded ({_line(error)})"
    return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _path(operation: str, impl: str) -> str:
    return f"thresher.ops.{FOLDERS.get(operation, operation)}.{impl}"


def _module(operation: str, impl: str) -> ModuleType:
    return import_module(_path(operation, impl))
