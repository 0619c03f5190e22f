"""A level for each row from a sample of its scores, in CUDA C++ (``thresher/cuda/level.cu``).

It is the pair (score, key) that so many of the sample's do not lie below.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from torch import Tensor

from thresher.cuda import WORKSPACE, launch

if TYPE_CHECKING:
    from thresher.ops.score_select.triton import Plan

THREADS = 512


class Samples(ctypes.Structure):
    """``struct Samples`` of level.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("scores", "ends", "requests", "levels", "level_keys", "found", "counts")),
        *((name, ctypes.c_uint) for name in ("num_rows", "score_row", "width", "found_row", "lists", "room", "stride", "want", "whole")),
        ("together", ctypes.c_uint),
    ]


def write_levels(
    sample: Tensor,
    ends: Tensor,
    requests: Tensor,
    plan: Plan,
    together: int,
    levels: Tensor,
    level_keys: Tensor,
    found: Tensor,
    counts: Tensor,
) -> None:
    """Write each row's level, and where ``plan.kept`` what passes of the sample to its lists.

    Args:
        sample: fp32 ``[Q, width]``, column c the score of key ``c // 64 * stride * 64 + c % 64``.
        ends, requests: int64 ``[Q]``.
        together: rows that collect together.
        levels, level_keys: fp32 and int32 ``[Q]``: a key passes whose score is larger than its row's level, or equal while the key is not
            larger than the level's. -inf and -1 for rows whose keys the lists can hold, and where the sample has too few numbers.
        found, counts: the lists, of which all are begun here where ``plan.kept``, and none is touched else.
    """
    num, width = sample.shape
    samples = Samples(
        scores=sample.data_ptr(), ends=ends.data_ptr(), requests=requests.data_ptr(), levels=levels.data_ptr(),
        level_keys=level_keys.data_ptr(), found=found.data_ptr() if plan.kept else None, counts=counts.data_ptr(), num_rows=num,
        score_row=sample.stride(0), width=width, found_row=found.stride(0), lists=plan.lists, room=plan.room, stride=plan.stride,
        want=plan.want, whole=plan.lists * plan.room, together=together,
    )  # fmt: skip
    launch.launch("level", "level", samples, num, THREADS, WORKSPACE + 4 * (width + plan.lists), sample.device)
