"""Processes as ranks: started by ``torchrun``, agreed on what they do, and ended together."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from thresher.distributed.collectives import Collectives, ProcessGroup, unheard
from thresher.distributed.reach import gave_up, unsupported
from thresher.errors import ThresherError, require

TIMEOUT_S = 60.0
"""How long a rank waits for another."""
LATER_S = 60.0


def world_size() -> int:
    """How many processes ``torchrun`` started, this one among them; 1 where it did not start this one."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


@contextmanager
def started(device: str, timeout_s: float = TIMEOUT_S) -> Iterator[Collectives]:
    """Join the ranks that ``torchrun`` started: over gloo on a CPU; with a GPU for each over symmetric memory where all can read one
    another's, and else over NCCL.

    A rank that is gone or hangs ends the others, after ``timeout_s`` at the latest: an exchange raises, or with GPUs what waits for the
    GPU next; over NCCL the process ends, with the same line.

    Args:
        device: "cpu" or "cuda"; with "cuda" the process is given the GPU of its local rank.
        timeout_s: seconds that a rank waits for another.

    Raises:
        ThresherError: a timeout that is not positive, fewer GPUs than ranks on this host, or a rank that does not come or answer in time.
    """
    require(timeout_s > 0, "timeout_s must be positive", timeout_s, f"{TIMEOUT_S:g} is the default")
    if device == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        require(local < there, "there must be a GPU for each rank of a host", f"{there} GPUs", "start fewer processes, or use --device cpu")
        torch.cuda.set_device(local)
    backend = "nccl" if device == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        why = str(error).strip().splitlines()[0]
        raise ThresherError(f"all ranks must come within {timeout_s:g} s; got: {why}; see what the others printed") from None
    if backend == "nccl":
        # PyTorch's own watchdog says it in many lines: it comes second.
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s + LATER_S))
    message = unheard(dist.get_rank(), dist.get_world_size(), timeout_s)
    try:
        yield chosen(device, timeout_s)
    except BaseException as error:
        with suppress(Exception):
            # Whoever destroys a group over NCCL waits for the others.
            dist.distributed_c10d._abort_process_group() if device == "cuda" else dist.destroy_process_group()
        if not gave_up(error):
            raise
        raise ThresherError(message) from None
    dist.destroy_process_group()


def chosen(device: str, timeout_s: float) -> Collectives:
    """The exchanges that are taken between the ranks of the default process group: the same on all of them."""
    group = ProcessGroup(timeout_s=timeout_s)
    if device == "cpu":
        return group
    able = group.gather(torch.tensor([unsupported() is None], device=device))
    if not bool(able.all()):
        return group
    from thresher.distributed.symmetric import SymmetricMemory  # which needs Triton

    return SymmetricMemory.of_group(timeout_s=timeout_s)


def agree(ranks: Collectives, facts: Mapping[str, object], device: str = "cpu") -> None:
    """Refuse to start where ranks were told different things.

    Args:
        ranks: the ranks; all call this with the same names.
        facts: what must be the same on all of them, such as ``{"k": 2048}``; compared as text.
        device: where the backend takes tensors.

    Raises:
        ThresherError: the first name whose value differs, with both values and the rank that differs from rank 0; on every rank alike.
    """
    text = json.dumps({name: str(value) for name, value in facts.items()}).encode()
    sizes = ranks.gather(torch.tensor([len(text)], device=device)).flatten().tolist()
    padded = text.ljust(max(sizes), b" ")
    told = ranks.gather(torch.tensor(list(padded), dtype=torch.uint8, device=device)).cpu()
    first, *others = (json.loads(bytes(row[:size].tolist())) for row, size in zip(told, sizes, strict=True))
    for rank, other in enumerate(others, 1):
        for name in first | other:
            here, there = first.get(name), other.get(name)
            require(here == there, f"all ranks must have the same {name}", f"{here} on rank 0, {there} on rank {rank}", "start all alike")
