"""``thresher bench`` over ranks: every way of a layer's step is checked, then all are timed in turn; rank 0 has the record."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from thresher.bench.cases import Case
from thresher.bench.floor import floor_us, measure_ceilings, useful_work
from thresher.bench.once import peak_bytes, rows_redone
from thresher.bench.peers import Peer, find_peer, versions
from thresher.bench.rank_check import Reference, check_step
from thresher.bench.rank_steps import RankStep
from thresher.bench.ranks import OURS, RankWork, make_whole, make_works, share_whole, together
from thresher.bench.record import Record, ran_on, ratio_of
from thresher.bench.timing import Prepared, in_turns, interleave_ranks, make_copies, num_copies
from thresher.bench.work import all_preferred
from thresher.distributed import IDSA
from thresher.distributed.collectives import Collectives, ProcessGroup
from thresher.errors import ThresherError, require
from thresher.ops.dispatch import AUTO
from thresher.selectors.base import Selector

if TYPE_CHECKING:
    from thresher.bench.run import Settings

TIMEOUT_S = 300.0  # that ranks wait for one another: long contexts are drawn and checked in tens of seconds
WAY = "idsa"  # that is timed where none is named
Made = TypeVar("Made")


def ways_of(settings: Settings) -> tuple[str, ...]:
    """All ways of a run over ranks, first the one that the record is of, then its peer."""
    return (settings.way or WAY, *(() if settings.peer is None else (settings.peer,)), *settings.others)


def check_ways(settings: Settings, case: Case, ranks: int) -> tuple[str, ...]:
    """The names that must be peers, of a case in so many processes: all ways, or the peer where there is one process.

    Raises:
        ThresherError: a case for another number of processes, ways without ranks, or ways that are none of ours or named twice.
    """
    do = f"torchrun --nproc-per-node {case.ranks} -m thresher bench starts them" if case.ranks > 1 else f"name one that ends in -r{ranks}"
    require(case.ranks == ranks, f"{case.name} must run in as many processes as it has ranks, {case.ranks}", ranks, do)
    if ranks == 1:
        alone = settings.way is None and not settings.others
        require(alone, "--way and several peers must come with a case over ranks", case.name, "name one such as layer-1x1m-h64-r2")
        return () if settings.peer is None else (settings.peer,)
    ways = ways_of(settings)
    require(ways[0] in OURS, f"--way must be one of {', '.join(OURS)}", repr(ways[0]), "name public ones with --peer")
    require(len(set(ways)) == len(ways), "each way must be named once", ", ".join(ways), "leave one out")
    return ways


def measure(
    settings: Settings, case: Case, inputs: str, selector: Selector, device: torch.device, ranks: Collectives, peers: Mapping[str, Peer]
) -> Record | None:
    """Check every way, then time all of them.

    Args:
        settings: what the command line asks for.
        case: over as many ranks as there are.
        inputs: one of ``INPUTS``.
        selector: of our ways.
        device: the rank's own.
        ranks: what carries our exchanges.
        peers: where ways are found.

    Returns:
        The record, with the same times on every rank; None where there is only a check.

    Raises:
        ThresherError: a rank that cannot make its inputs or steps, or a way that is wrong, on all ranks alike.
    """
    group, ways = ProcessGroup(), ways_of(settings)
    timing = (settings.timing or "graph") if device.type == "cuda" else "clock"
    flops, moved = useful_work(case, "layer", selector, case.lengths(settings.seed))

    def all_do(do: Callable[[], Made]) -> Made:
        return together(group, device, do)

    def make(copy: int) -> tuple[dict[str, RankWork], Reference | None]:
        drawn = share_whole if device.type == "cpu" else make_whole
        whole = drawn(case, settings.impl, inputs, settings.seed, device, ranks, settings.recorded, copy)
        works = make_works(case, ways, selector, settings.impl, ranks, whole)
        return works, None if copy else Reference.of(whole, works)

    if device.type == "cuda":
        torch.cuda.empty_cache()  # as for a case of one rank
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // case.ranks))  # torchrun leaves one, and the reference is long
    first, reference = all_do(lambda: make(0))
    assert reference is not None
    most = 1 if settings.check_only else num_copies(moved / case.ranks, device)
    copies = all_do(lambda: make_copies(first, lambda copy: make(copy)[0], most, device))
    del copies[int(group.gather(torch.tensor([len(copies)], device=device)).min()) :]
    prepared: dict[str, Prepared] = {}
    for way in ways:
        prepare = find_peer(way, case, "layer", device, peers)
        prepared[way] = all_do(partial(prepare, [works[way] for works in copies]))
        sets = all_do(partial(_right, prepared[way].steps[0], reference, group, inputs))
        all_do(partial(_as_one_process, first[way], sets, reference, inputs))
    if settings.check_only:
        return None
    steps = {way: in_turns(made.steps) if timing == "graph" else made.steps for way, made in prepared.items()}
    run = prepared[ways[0]].steps[0]
    peak, redone = all_do(lambda: (peak_bytes(run, device), rows_redone(run)))
    times = {way: asdict(taken) for way, taken in all_do(lambda: interleave_ranks(steps, device, settings.repeats, timing, group)).items()}
    ceilings = all_do(lambda: measure_ceilings(device))
    theirs = None if settings.peer is None else times[settings.peer]
    floor = floor_us(ceilings, "layer", flops, moved)
    kernels = {way: made.kernel for way, made in prepared.items() if made.kernel is not None}
    return Record(
        case=case.name,
        op="layer",
        selector=settings.selector.partition(":")[0].strip(),
        settings={
            **asdict(selector),
            "timing": timing,
            "copies": len(copies),
            "steps": len(steps[ways[0]]),
            "repeats": settings.repeats,
            **({"peer_kernel": kernels} if kernels else {}),
            **({} if ceilings is None else {"ceilings": asdict(ceilings)}),
            "way": ways[0],
            "others": {way: times[way] for way in settings.others},
            "cache_bytes": {way: first[way].held.cache_bytes for way in ways},
            "exchange": exchange_of(ranks),
            "m": IDSA(selector, case.ranks).budget,
        },
        inputs=inputs,
        seed=settings.seed,
        impl=all_preferred(device) if settings.impl == AUTO else settings.impl,
        peer=settings.peer,
        time_us=times[ways[0]],
        peer_time_us=theirs,
        ratio=ratio_of(times[ways[0]], theirs),
        useful_flops=flops,
        useful_bytes=moved,
        floor_us=None if floor is None else floor / case.ranks,
        peak_bytes=peak,
        rows_redone=redone,
        ranks=case.ranks,
        peer_versions={dist_: number for way in ways for dist_, number in versions(way, peers, kernels.get(way)).items()},
        **ran_on(device),
    )


def exchange_of(ranks: Collectives) -> str:
    """What carries our exchanges: symmetric memory, NCCL or gloo."""
    if not isinstance(ranks, ProcessGroup):
        return "symmetric memory"
    return {"nccl": "NCCL"}.get(dist.get_backend(ranks.group), dist.get_backend(ranks.group))


def _right(step: Any, reference: Reference, group: Collectives, inputs: str) -> Tensor:
    assert isinstance(step, RankStep)
    sets, why = check_step(step, reference, group)
    _refuse(step.work, inputs, "the reference", why)
    return sets


def _as_one_process(work: RankWork, sets: Tensor, reference: Reference, inputs: str) -> None:
    """Once no rank is red by itself: here all would see the tokens of the one that is."""
    if work.way in OURS:
        _refuse(work, inputs, "one process", reference.alone.differs(work, sets))


def _refuse(work: RankWork, inputs: str, by: str, why: str | None) -> None:
    must = f"{work.way} of {work.case.name} under {inputs} inputs must agree with {by}"
    if why is not None:
        raise ThresherError(f"{must}; got: {why}; no time is taken on a red check")
