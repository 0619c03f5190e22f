"""What one run more tells, outside the time."""

from __future__ import annotations

import torch

from thresher.bench.timing import Step
from thresher.ops.score_select.marks import keeping_marks


def peak_bytes(run: Step, device: torch.device) -> int | None:
    """Most device memory that a run allocates beyond its inputs; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)


def rows_redone(run: Step) -> int | None:
    """Rows that kernels selected again; None where none ran that does so."""
    with keeping_marks() as marks:
        run()
    return sum(int(mark.sum()) for mark in marks) if marks else None
