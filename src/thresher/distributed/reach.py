"""Whether this host's GPUs can read one another's memory, as ``symmetric.py`` needs, and whether one of them waited in vain."""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist


def gave_up(error: BaseException) -> bool:
    """Whether an error is that of a kernel that waited too long for a peer."""
    return isinstance(error, torch.AcceleratorError) and "unspecified launch failure" in str(error)


def unsupported(group: dist.ProcessGroup | None = None) -> str | None:
    """Why a process group has no symmetric memory here, or None. It asks about this process and its host alone."""
    if not torch.cuda.is_available():
        return "needs GPUs"
    if dist.get_backend(group) != "nccl":
        return f"needs a process group over NCCL, not {dist.get_backend(group)}"
    return unreadable(dist.get_world_size(group))


def unreadable(ranks: int) -> str | None:
    """Why this host's GPUs cannot be so many ranks that read one another's memory, or None."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if there < max(ranks, 2):
        return f"needs {max(ranks, 2)} GPUs on one host, which has {there}"
    pairs = itertools.permutations(range(ranks), 2)
    apart = [f"{one} and {other}" for one, other in pairs if not torch.cuda.can_device_access_peer(one, other)]
    return f"GPUs {', '.join(apart)} cannot read one another's memory" if apart else None
