"""The selection from the lists that collecting fills, in CUDA C++ (``thresher/cuda/settle.cu``).

A thread block takes a row's pairs (score, key) into shared memory and seeks the cut, a pair of which there is one, by histograms. The keys
that are taken become bits of a mask there, which is written out in order: nothing is sorted, and what order the lists are in does not show.
"""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from thresher.cuda import launch
from thresher.types import Selection

if TYPE_CHECKING:
    from thresher.ops.score_select.triton import Plan

BEFORE_MASK, LEAST_WORDS = 288, 1280  # bytes, and words of 4: struct Workspace of settle.cu
MOST_WORDS = 4096  # of a mask that is taken in parts, so that all pairs have room


class Lists(ctypes.Structure):
    """``struct Lists`` of settle.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("found", "counts", "ends", "indices", "lengths", "beside", "redo")),
        *((name, ctypes.c_uint) for name in ("topk", "lists", "room", "found_row", "held", "words")),
    ]


class Memory(NamedTuple):
    """Shared memory for a row.

    Attributes:
        rows: that a multiprocessor has at a time, 1 to 3.
        words: of the mask, 32 keys each.
        held: pairs.
        size: bytes in all.
    """

    rows: int
    words: int
    held: int
    size: int


def shared_memory(plan: Plan, topk: int, room_tokens: int) -> Memory:
    """A mask of all keys and as many rows at a time as leave room for the pairs that are likely; for very many keys, parts of the mask."""
    lists = (plan.lists + 2) // 2 * 2
    most = min(plan.lists * plan.room, room_tokens)
    # What the level lets pass deviates by less than the root of what it counts in the sample, times the stride.
    likely = (plan.want + plan.slack + 1.5 * math.sqrt(topk / plan.stride)) * plan.stride if plan.stride else most
    whole = max(-(-room_tokens // 128) * 4, LEAST_WORDS)
    for words, rows in [(whole, rows) for rows in (3, 2, 1)] + [(min(whole, MOST_WORDS), 1)]:
        fixed = BEFORE_MASK + 4 * (words + lists)
        keys = 0 if words == whole else topk  # behind the pairs: see settle.cu
        held = min((launch.SHARED // rows // 1024 * 1024 - 1024 * (rows > 1) - fixed - 4 * keys) // 8, most)  # CUDA takes 1 KB for each
        if held >= max(min(likely, most), topk / 2):
            break
    return Memory(rows, words, held, fixed + max(8 * held + 4 * keys, 4 * topk))


def settle(
    found: Tensor, counts: Tensor, ends: Tensor, plan: Plan, topk: int, room_tokens: int, with_scores: bool
) -> tuple[Selection, Tensor]:
    """Select from the rows' lists.

    Args:
        found: int64 ``[Q, >= lists * room]``: pairs (score's bits << 32 | key), list after list.
        counts: int32 ``[Q, lists]``: how many a list was given, more than ``room`` where it did not hold them.
        ends: int64 ``[Q]``, how many keys a row sees.
        topk: how many to keep; all that a row sees if it sees fewer.

    Returns:
        The selection, and int32 ``[Q]``: 1 for the rows whose lists do not hold the answer, whose selection is empty.
    """
    num, device = len(ends), found.device
    indices = torch.empty(num, topk, dtype=torch.int32, device=device)
    lengths = torch.empty(num, dtype=torch.int64, device=device)
    beside = torch.empty(num, topk, device=device) if with_scores else None
    redo = torch.empty(num, dtype=torch.int32, device=device)
    memory = shared_memory(plan, topk, room_tokens)
    lists = Lists(
        found=found.data_ptr(), counts=counts.data_ptr(), ends=ends.data_ptr(), indices=indices.data_ptr(), lengths=lengths.data_ptr(),
        beside=None if beside is None else beside.data_ptr(), redo=redo.data_ptr(), topk=topk, lists=plan.lists, room=plan.room,
        found_row=found.stride(0), held=memory.held, words=memory.words,
    )  # fmt: skip
    if num:
        launch.launch("settle", f"settle_{memory.rows}", lists, num, 512 if memory.rows == 3 else 1024, memory.size, device)
    return Selection(indices, lengths, "logical", beside), redo
