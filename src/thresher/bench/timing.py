"""Times of several ways in one process: interleaved, over inputs that do not stay in the L2 cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch

from thresher.distributed.collectives import Collectives
from thresher.errors import ThresherError, require

Step = Callable[[], object]
Copy = TypeVar("Copy")
MANY = 16  # steps of decoding in a graph, at least
WARM_UPS = 3
AHEAD = 2**28  # bytes that a GPU clears, in about 80 us, while its host gets ahead of it
TIMINGS = ("graph", "events", "clock")


@dataclass(frozen=True)
class Prepared:
    """``steps``: one for each copy of the inputs. ``kernel``: which of several kernels they call, where there was a choice."""

    steps: tuple[Step, ...]
    kernel: str | None = None


@dataclass(frozen=True)
class Quantiles:
    """Microseconds of one run."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Quantiles:
        """Of at least one sample, by linear interpolation, to the nanosecond."""
        at = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        return cls(*(round(x, 3) for x in torch.quantile(torch.tensor(samples, dtype=torch.float64), at).tolist()))


def num_copies(bytes_read: float, device: torch.device) -> int:
    """How many copies of an input to rotate, so that between two uses of a byte at least three times the L2 cache is read; 256 at most.

    ``make_copies`` makes as many of them as there is room for.
    """
    if device.type != "cuda":
        return 2
    l2 = int(torch.cuda.get_device_properties(device).L2_cache_size)
    return min(-(-3 * l2 // max(int(bytes_read), 1)), 256)


def make_copies(first: Copy, make: Callable[[int], Copy], most: int, device: torch.device) -> list[Copy]:
    """``first`` and ``make(1)``, ``make(2)`` ..., ``most`` in all, or fewer: on a GPU those after the first hold at most a quarter of the
    memory that is free then, since results, graphs and a peer's own copies need some too. One of them there always is.

    Where they are fewer, a part of the inputs may stay in the L2 cache; a record's ``copies`` times its ``useful_bytes`` says so.
    """
    copies, room, before = [first], free_bytes(device) // 4, held_bytes(device)
    while len(copies) < most:
        more = len(copies) - 1
        if more and (held_bytes(device) - before) * (more + 1) > room * more:  # one more, as large as they are
            break
        copies.append(make(len(copies)))
    return copies


def free_bytes(device: torch.device) -> int:
    """What can still be allocated on a GPU; without end on a CPU."""
    if device.type != "cuda":
        return 2**62
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def held_bytes(device: torch.device) -> int:
    """What tensors hold of a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def in_turns(steps: Sequence[Copy]) -> list[Copy]:
    """The steps, one for every copy of the input, as often one after the other as makes ``MANY`` of them.

    A step of decoding is one of many launches in a model's graph. What a graph takes to begin, 8 us on an H200, is no part of it, and stood
    in the time of a step whole where the graph held one.
    """
    return list(steps) * -(-MANY // len(steps))


def interleave(ways: Mapping[str, Sequence[Step]], device: torch.device, repeats: int, timing: str) -> dict[str, Quantiles]:
    """Time every way, one sample of each in turn, ``repeats`` times.

    A sample runs each of the way's steps once and counts their mean.

    Args:
        ways: name -> its steps; all leave their work on the current stream.
        device: where the steps run.
        repeats: samples, after ``WARM_UPS`` that do not count.
        timing: "graph" (all steps of a sample in one CUDA graph) or "events" (launched one by one), both on a CUDA
            device; "clock" is the host's, on a CPU.

    Raises:
        ThresherError: a timing that does not fit the device, or a step that cannot be recorded in a CUDA graph.
    """
    return {name: Quantiles.of(taken) for name, taken in _samples(ways, device, repeats, timing, lambda: None).items()}


def interleave_ranks(
    ways: Mapping[str, Sequence[Step]], device: torch.device, repeats: int, timing: str, group: Collectives
) -> dict[str, Quantiles]:
    """``interleave`` of steps that ranks take together: a sample is the time of the slowest.

    Ranks meet before each sample, and GPUs are then kept busy for as long as hosts need to launch it, so that none waits in its time for
    one that has not begun.

    Args:
        ways, device, repeats, timing: as for ``interleave``, with the same ways of as many steps on every rank.
        group: the ranks, as a process group: what meets between replays must have no part in the turns of the recorded exchanges.
    """
    here = torch.zeros(1, device=device)
    ahead = torch.empty(AHEAD, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def meet() -> None:
        group.gather(here)
        if ahead is not None:
            ahead.zero_()

    mine = _samples(ways, device, repeats, timing, meet)
    every = group.gather(torch.tensor(list(mine.values()), dtype=torch.float64, device=device))
    return {name: Quantiles.of(taken) for name, taken in zip(mine, every.amax(0).tolist(), strict=True)}


def _samples(
    ways: Mapping[str, Sequence[Step]], device: torch.device, repeats: int, timing: str, meet: Callable[[], None]
) -> dict[str, list[float]]:
    """Microseconds of a step, for every way and sample; ``meet`` comes before each and is not timed."""
    require(repeats >= 1, "repeats must be at least 1", repeats, "20 or more give steady figures")
    on_gpu = device.type == "cuda"
    fitting = TIMINGS[:2] if on_gpu else TIMINGS[2:]
    require(timing in fitting, f"timing on {device.type} must be one of {', '.join(fitting)}", repr(timing), "decode cases use graph")
    runs: dict[str, Step] = {}
    for name, steps in ways.items():
        meet()  # what ran before is over everywhere, whatever it is that gets recorded
        runs[name] = _graph(name, steps) if timing == "graph" else _sequence(steps)
    sample = _event_us if on_gpu else _clock_us
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(WARM_UPS + repeats):
        for name, run in runs.items():
            meet()
            took = sample(run) / len(ways[name])
            if turn >= WARM_UPS:
                samples[name].append(took)
    return samples


def _sequence(steps: Sequence[Step]) -> Step:
    def run() -> None:
        for step in steps:
            step()

    return run


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all graphs: cuBLAS keeps a workspace, 32 MiB on an H200, for each stream that it was called on."""
    return torch.cuda.Stream(device)


def _graph(name: str, steps: Sequence[Step]) -> Step:
    """A replay of all steps. They run once before, on a side stream, so that compilation and first allocations are not recorded."""
    side = _side_stream(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _sequence(steps)()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            _sequence(steps)()
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise ThresherError(f"{name} must be recordable in a CUDA graph; got {why}; pass --timing events") from None
    return graph.replay


def _event_us(run: Step) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def _clock_us(run: Step) -> float:
    start = time.perf_counter()
    run()
    return 1e6 * (time.perf_counter() - start)
