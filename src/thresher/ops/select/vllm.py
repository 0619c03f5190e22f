"""Top-k by vLLM's kernels, out of an installed vllm, or of its one object file named by the environment variable THRESHER_VLLM_OPS.

Its result is sorted here and what is not a candidate left out. Not promised, so that "auto" never comes here: which of equal scores are
kept, and so the same set in two runs; the place of NaN; and, by vLLM's own issue 51782, that no better score is lost where more scores
than a kernel's buffer holds (4096 to 16384) agree in their leading bits.

It may be recorded in a CUDA graph; the workspace is made outside, or by ``select_topk`` in the graph's own memory.

Source of the interface: vllm 0.33.0, the four operators' schemas in its object file, and vLLM's tests of them.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thresher.errors import require
from thresher.ops.dispatch import VLLM_OPS, on_device
from thresher.ops.select.reference import candidates
from thresher.ops.select.unsorted import sorted_selection
from thresher.types import Selection

COOPERATIVE, PERSISTENT = "cooperative_topk", "persistent_topk"
DECODE, PREFILL = "top_k_per_row_decode", "top_k_per_row_prefill"
KERNELS = (COOPERATIVE, PERSISTENT, DECODE, PREFILL)

TOPKS = (512, 1024, 2048)  # that the first two are compiled for
MAX_TOPK = 2048
COOPERATIVE_ROWS = 64
COOPERATIVE_WIDTH = 2**19  # where the persistent kernel overtakes it, between 128k and 1m on an H200
WORKSPACE_BYTES = 2**20


class Buffers(NamedTuple):
    """What a call writes: ``out`` int32 ``[Q, topk]``, -1 before, and ``workspace`` uint8. ``starts`` int32 ``[Q]``, zeros."""

    out: Tensor
    workspace: Tensor
    starts: Tensor


def load() -> Any:
    """The operators' namespace; loads the object file, or the package's own, once.

    Raises:
        ImportError, OSError, RuntimeError: it cannot be loaded, or holds no top-k.
    """
    ops = torch.ops._C
    if not hasattr(ops, PERSISTENT):
        named = os.environ.get(VLLM_OPS)
        if named:
            torch.ops.load_library(named)
        else:
            import_module("vllm._C_stable_libtorch")
        if not hasattr(ops, PERSISTENT):
            raise ImportError(f"{named or 'vllm'} holds no {PERSISTENT}")
    return ops


def unsupported(num_rows: int, width: int, topk: int) -> str | None:
    """Why it cannot take scores ``[num_rows, width]``, in one line; None when it can."""
    if topk > MAX_TOPK:
        return f"topk is at most {MAX_TOPK}, got {topk}"
    return None if width < 2**31 - 8 else f"rows hold fewer than 2**31 scores, got {width}"


def fitting(logits: Tensor, topk: int) -> tuple[str, ...]:
    """The kernels that take these logits, fp32 ``[Q, N]`` with unit stride, in the order of preference that ``select_topk`` follows.

    For 512, 1024 or 2048 tokens and logits that begin at a multiple of 16 bytes: the cooperative kernel, a cluster for each row, where rows
    are at most 64, 16 bytes aligned, and hold at most 2**19 scores; else the persistent one. Otherwise those that take a row a block.
    """
    rows, width = logits.shape
    kernels = [DECODE, PREFILL]
    if topk in TOPKS and logits.data_ptr() % 16 == 0:
        kernels.insert(0, PERSISTENT)
        if rows <= COOPERATIVE_ROWS and logits.stride(0) % 4 == 0:
            kernels.insert(0 if width <= COOPERATIVE_WIDTH else 1, COOPERATIVE)
    return tuple(kernels)


def select_topk(
    scores: Tensor,
    topk: int,
    space: str = "logical",
    positions: Tensor | None = None,
    ends: Tensor | None = None,
    kernel: str | None = None,
    with_scores: bool = True,
) -> Selection:
    """``thresher.ops.select_topk`` for checked arguments, but for ties, NaN and issue 51782; ``kernel`` None takes the first that fits."""
    num, width = scores.shape
    scores = candidates(scores, positions)
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    buffers = make_buffers(num, topk, scores.device)
    if num == 0 or width == 0:
        lengths = torch.zeros(num, dtype=torch.int64, device=scores.device)
        return Selection(buffers.out, lengths, space, scores.new_full((num, topk), -torch.inf) if with_scores else None)
    lengths = torch.full_like(buffers.starts, width) if ends is None else ends.int().contiguous()
    with on_device(scores):
        top_k(kernel or fitting(scores, topk)[0], scores, lengths, buffers, width)
    return sorted_selection(scores, buffers.out, space, positions, with_scores)


def make_buffers(num_rows: int, topk: int, device: torch.device) -> Buffers:
    """Fresh buffers for ``top_k``."""
    return Buffers(
        torch.full((num_rows, topk), -1, dtype=torch.int32, device=device),
        torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device),
        torch.zeros(num_rows, dtype=torch.int32, device=device),
    )


def top_k(kernel: str, logits: Tensor, lengths: Tensor, buffers: Buffers, longest: int) -> Tensor:
    """Call one kernel and nothing else.

    Args:
        kernel: of ``KERNELS``, one that ``fitting`` names.
        logits: fp32 ``[Q, N]`` with unit stride; only the first ``lengths[i]`` of row i count.
        lengths: int32 ``[Q]``, contiguous.
        buffers: of the same rows; ``out`` gets the columns in any order, -1 where a row is shorter.
        longest: at least every length.

    Returns:
        ``buffers.out``.
    """
    require(kernel in KERNELS, f"kernel must be one of {', '.join(KERNELS)}", repr(kernel), "take one that fitting() names")
    out, workspace, starts = buffers
    rows, topk = out.shape
    op = getattr(load(), kernel)
    if kernel in (COOPERATIVE, PERSISTENT):
        op(logits, lengths, out, workspace, topk, longest)
    elif kernel == DECODE:
        op(logits, 1, lengths, out, rows, logits.stride(0), logits.stride(1), topk)
    else:
        op(logits, starts, lengths, out, rows, logits.stride(0), logits.stride(1), topk)
    return out
