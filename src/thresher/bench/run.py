"""``thresher bench``: check, then time, then record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from thresher.bench.cases import CASES, Case, parse_case
from thresher.bench.check import check_work
from thresher.bench.floor import floor_us, measure_ceilings, useful_work
from thresher.bench.inputs import CRUEL, INPUTS
from thresher.bench.once import peak_bytes, rows_redone
from thresher.bench.peers import PEERS, Peer, find_peer, peer_reason, versions
from thresher.bench.rank_run import check_ways, measure, ways_of
from thresher.bench.ranks import together
from thresher.bench.record import Record, append, ran_on, ratio_of, results_path
from thresher.bench.timing import Step, in_turns, interleave, make_copies, num_copies
from thresher.bench.work import SHARING, Work, check_inputs, check_op, default_op, make_work, resolved
from thresher.distributed.collectives import Alone, Collectives
from thresher.distributed.group import agree
from thresher.errors import ThresherError, require
from thresher.ops.dispatch import AUTO, check_impl
from thresher.selectors.base import Selector
from thresher.selectors.parse import parse


@dataclass(frozen=True)
class Settings:
    """What the command line asks for; see ``thresher bench --help``.

    Attributes:
        cases, inputs: names; "cruel" stands for all three cruel inputs.
        selector: text, for the ops that select.
        op: None for the whole job of each case.
        peer: None to time ours alone.
        way, others: of cases over ranks: how ours decodes (None for idsa), and what is timed besides the peer.
        timing: "graph" or "events"; None for graphs.
        out: a file to append to; None for the results folder on a GPU, and for nothing on a CPU.
        recorded: the file of recorded inputs.
        check_only: whether a case is over when its check is: no time, no record.
    """

    cases: tuple[str, ...]
    selector: str = "dsa"
    inputs: tuple[str, ...] = ("normal",)
    op: str | None = None
    peer: str | None = None
    way: str | None = None
    others: tuple[str, ...] = ()
    impl: str = AUTO
    device: str = "cuda"
    seed: int = 0
    repeats: int = 50
    timing: str | None = None
    out: Path | None = None
    recorded: Path | None = None
    check_only: bool = False


def run_bench(
    settings: Settings, write: Callable[[str], None], peers: Mapping[str, Peer] = PEERS, ranks: Collectives | None = None
) -> list[Record]:
    """Check and time every case under every input; each record is written as soon as it is there, by rank 0 where there are ``ranks``.

    Returns:
        The records; none where cases are only checked.

    Raises:
        ThresherError: an option that does not fit (before anything runs), or a check that fails (no time is taken then).
    """
    device = torch.device(settings.device)
    cases = [parse_case(name) for name in settings.cases]
    names = [name for asked in settings.inputs for name in (CRUEL if asked == "cruel" else (asked,))]
    check_impl(settings.impl)
    everyone: Collectives = Alone()
    if ranks is not None:
        everyone = ranks
        agree(ranks, {"settings": settings}, settings.device)
    for case in cases:
        op = settings.op or default_op(case)
        check_op(case, op)
        for name in names:
            check_inputs(case, name)
        for way in check_ways(settings, case, everyone.ranks):
            find_peer(way, case, op, device, peers)
        selector = _selector(settings, case, op)
        bounded = case.ranks == 1 or (selector is not None and selector.topk is not None)
        require(bounded, "a selector over ranks must have a topk", settings.selector, "choose another")
    records = []
    for case in cases:
        for name in names:
            if ranks is None:
                record = _measure(settings, case, name, device, peers)
            else:
                record = measure(settings, case, name, parse(settings.selector, defaults={"topk": case.topk}), device, ranks, peers)
            if record is not None:
                together(everyone, device, partial(_keep, settings, record, everyone.rank))
                records.append(record)
            if everyone.rank == 0:
                write(checked(settings, case, name) if record is None else line_of(record))
    return records


def checked(settings: Settings, case: Case, inputs: str) -> str:
    """One line for the terminal, of a case that was only checked."""
    op = settings.op or default_op(case)
    selector = settings.selector.partition(":")[0].strip() if _selector(settings, case, op) is not None else ""
    ways = f": {', '.join(ways_of(settings))}" if case.ranks > 1 else ""
    return f"{' '.join(word for word in (case.name, op, selector, inputs) if word)}{ways}: right, and not timed"


def line_of(record: Record) -> str:
    """One line for the terminal."""
    what = " ".join(word for word in (record.case, record.op, record.selector, record.inputs, record.impl) if word)
    text = f"{what}: {record.settings['way']} " if record.ranks > 1 else f"{what}: "
    text += f"{record.time_us['p50']:.1f} us"
    for name, times in record.beside.items():
        text += f", {name} {times['p50']:.1f} us, ratio {ratio_of(record.time_us, times):.2f}"
    text += f", floor {record.floor_us:.1f} us" if record.floor_us is not None else ""
    return text + (f", {record.rows_redone} rows redone" if record.rows_redone is not None else "")


def listing(device: torch.device) -> str:
    """Named cases, inputs and peers, with what keeps a peer from running."""
    lines = ["cases:", *(f"  {name}" for name in CASES), "inputs:", *(f"  {name}" for name in INPUTS), "peers:"]
    for name, peer in PEERS.items():
        where = ", under torchrun" if peer.ranks > 1 else ""
        lines.append(f"  {name}: {peer.what}{where}; {peer_reason(name, device, ranks=peer.ranks) or 'ok'}")
    return "\n".join(lines)


def _selector(settings: Settings, case: Case, op: str) -> Selector | None:
    return parse(settings.selector, defaults={"topk": case.topk}) if op == "select" or case.kind == "layer" else None


def _keep(settings: Settings, record: Record, rank: int) -> None:
    path = settings.out or (results_path(record.gpu, record.date) if settings.device == "cuda" else None)
    if rank == 0 and path is not None:
        append(path, record)


def _measure(settings: Settings, case: Case, inputs: str, device: torch.device, peers: Mapping[str, Peer]) -> Record | None:
    op = settings.op or default_op(case)
    selector = _selector(settings, case, op)
    timing = (settings.timing or "graph") if device.type == "cuda" else "clock"
    lengths = case.lengths(settings.seed)
    flops, moved = useful_work(case, op, selector, lengths)

    def make(copy: int, beside: Work | None = None) -> Work:
        return make_work(case, op, selector, settings.impl, inputs, settings.seed, device, settings.recorded, copy, beside)

    if device.type == "cuda":
        # Nothing is left of the case before, but what it had stays the allocator's, in its sizes; graphs need the driver's memory.
        torch.cuda.empty_cache()
    first = make(0)
    why = check_work(first)
    if why is not None:
        raise ThresherError(f"{case.name} under {inputs} inputs must agree with the reference; got: {why}; no time is taken on a red check")
    if settings.check_only:
        return None
    peak = peak_bytes(first.run, device)
    beside = first if case.kind == "layer" and op in SHARING else None
    copies = make_copies(first, lambda copy: make(copy, beside), num_copies(moved, device), device)
    kernel: dict[str, str] = {}
    ways: dict[str, Sequence[Step]] = {"ours": [work.run for work in copies]}
    if settings.peer is not None:
        prepared = find_peer(settings.peer, case, op, device, peers)(copies)
        ways[settings.peer] = prepared.steps
        kernel = {} if prepared.kernel is None else {"peer_kernel": prepared.kernel}
    if case.kind != "prefill" and timing == "graph":
        ways = {name: in_turns(steps) for name, steps in ways.items()}
    how = {"copies": len(copies), "steps": len(ways["ours"])}
    times = {name: asdict(taken) for name, taken in interleave(ways, device, settings.repeats, timing).items()}
    theirs = times[settings.peer] if settings.peer is not None else None
    options: dict[str, Any] = asdict(selector) if selector is not None else {}
    ceilings = measure_ceilings(device)
    measured = {} if ceilings is None else {"ceilings": asdict(ceilings)}
    return Record(
        case=case.name,
        op=op,
        selector=settings.selector.partition(":")[0].strip() if selector is not None else None,
        settings={**options, "timing": timing, **how, "repeats": settings.repeats, **kernel, **measured},
        inputs=inputs,
        seed=settings.seed,
        impl=resolved(first),
        peer=settings.peer,
        time_us=times["ours"],
        peer_time_us=theirs,
        ratio=ratio_of(times["ours"], theirs),
        useful_flops=flops,
        useful_bytes=moved,
        floor_us=floor_us(ceilings, op, flops, moved),
        peak_bytes=peak,
        rows_redone=None if selector is None else rows_redone(first.run),
        ranks=1,
        peer_versions=versions(settings.peer, peers),
        **ran_on(device),
    )
