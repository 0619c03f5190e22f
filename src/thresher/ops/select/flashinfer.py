"""Top-k by FlashInfer, through its Python package, asked to break ties to the smaller column.

Its result is sorted here and what is not a candidate left out. Not promised, so that "auto" never comes here: the place of NaN, which it
orders by its bits, above every number or below; and -0.0, which it ranks below 0.0.

It may be recorded in a CUDA graph after one call outside, which compiles it and allocates its buffer.

Source of the interface: flashinfer-python 0.6.12, ``top_k_ragged_transform``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thresher.ops.dispatch import on_device
from thresher.ops.select.reference import candidates
from thresher.ops.select.unsorted import sorted_selection
from thresher.types import Selection

MAX_TOPK = 2048  # of the kernel that breaks ties
SMALLER_FIRST = 1  # its TopKTieBreak.SMALL


class Inputs(NamedTuple):
    """``scores`` fp32 ``[Q, N]``, contiguous; ``offsets`` int32 ``[Q]``, zeros; ``lengths`` int32 ``[Q]``."""

    scores: Tensor
    offsets: Tensor
    lengths: Tensor


def load() -> Any:
    """The package."""
    return import_module("flashinfer")


def unsupported(num_rows: int, width: int, topk: int) -> str | None:
    """Why it cannot take scores ``[num_rows, width]``, in one line; None when it can."""
    if topk > MAX_TOPK:
        return f"topk is at most {MAX_TOPK}, got {topk}"
    return None if width < 2**31 else f"rows hold fewer than 2**31 scores, got {width}"


def select_topk(
    scores: Tensor,
    topk: int,
    space: str = "logical",
    positions: Tensor | None = None,
    ends: Tensor | None = None,
    with_scores: bool = True,
) -> Selection:
    """``thresher.ops.select_topk`` for checked arguments, but for NaN and -0.0."""
    num, width = scores.shape
    scores = candidates(scores, positions)
    if num == 0 or width == 0:
        none = torch.full((num, topk), -1, dtype=torch.int32, device=scores.device)
        beside = scores.new_full((num, topk), -torch.inf) if with_scores else None
        return Selection(none, none.new_zeros(num, dtype=torch.int64), space, beside)
    with on_device(scores):
        picked = top_k(make_inputs(scores, ends), topk, SMALLER_FIRST)
    return sorted_selection(scores, picked, space, positions, with_scores)


def make_inputs(scores: Tensor, lengths: Tensor | None = None) -> Inputs:
    """What the package wants for whole rows, or for the first ``lengths[i]`` scores of row i."""
    num, width = scores.shape
    offsets = torch.zeros(num, dtype=torch.int32, device=scores.device)
    return Inputs(scores.contiguous(), offsets, torch.full_like(offsets, width) if lengths is None else lengths.int())


def top_k(inputs: Inputs, topk: int, tie_break: int = 0) -> Tensor:
    """int32 ``[Q, topk]`` columns in any order, -1 where a row is shorter; ``tie_break`` 0 is its fastest, and then ties are any's."""
    picked: Tensor = load().top_k_ragged_transform(inputs.scores, inputs.offsets, inputs.lengths, topk, tie_break=tie_break)
    return picked
