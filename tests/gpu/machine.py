"""Where the tests of this folder run."""

from __future__ import annotations

import os
from typing import TypeVar

import torch
import triton

T = TypeVar("T")

INTERPRET = bool(triton.knobs.runtime.interpret)
DEVICE = torch.device("cpu" if INTERPRET else "cuda")
REPEATS = int(os.environ.get("THRESHER_GPU_REPEATS", "20"))  # runs of score_select that must have the same bits


def sized(gpu: T, interpreted: T) -> T:
    """A size for a GPU, or the smaller one that the interpreter can finish."""
    return interpreted if INTERPRET else gpu
