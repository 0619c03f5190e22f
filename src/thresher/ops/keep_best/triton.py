"""One launch: a program for a query finds the last candidate that all ranks keep, and writes those of its own rank that are not behind it.

Up to ``MOST_HELD`` candidates stay in registers, where ``ops.select``'s search finds the cut with three counts a step, and among ties once
more. More are read again for each count: sixteen times at most for the score, and as often among ties.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from thresher.cache.device import on_device, overlapped, unit_rows
from thresher.ops.keep_best import MOST_HELD
from thresher.ops.keep_best.triton_kernels import keep_kernel
from thresher.types import Selection

HELD = 64  # of a thread
WALKED = 8192  # candidates that are looked at together where they are not held
WRITTEN = 2048  # of its own that a program writes together


def keep_best(scores: Tensor, positions: Tensor, rank: int, topk: int, granularity: int = 1) -> Selection:
    """What a rank keeps: see ``thresher.ops.keep_best.keep_best``."""
    scores, positions = unit_rows(scores), unit_rows(positions)
    ranks, num, width = scores.shape
    indices = torch.empty(num, topk, dtype=torch.int32, device=scores.device)
    lengths = torch.empty(num, dtype=torch.int64, device=scores.device)
    beside = torch.empty(num, topk, dtype=torch.float32, device=scores.device)
    columns = triton.next_power_of_2(max(width, 1))
    block = max(columns * triton.next_power_of_2(ranks), 512)
    held = block <= MOST_HELD
    block = block if held else WALKED
    warps = max(block // (32 * HELD), 4) if held else 16
    if num:
        with on_device(scores):
            keep_kernel[(num,)](
                scores, positions, indices, lengths, beside, ranks, width, rank, topk, *scores.stride()[:2], *positions.stride()[:2],
                COLUMNS=columns, BLOCK=block, FULL=ranks * width == block, HELD=held, TILE=min(max(columns, 512), WRITTEN),
                GRANULARITY=granularity, WARPS=warps, num_warps=warps, **overlapped(scores),
            )  # fmt: skip
    return Selection(indices, lengths, "local", beside)
