"""Pictures of what a selection costs, drawn from the records: ``python -m thresher.bench.curves benchmarks/results docs``.

``select-by-length.png`` has a line for each selector and number of heads over the context, ``select-by-heads.png`` one for DSA over the
number of heads. Dashed in the same colour is the floor, hollow and grey the peer of the same record; peers do DSA's work whatever the
selector, and are drawn with DSA alone. A line takes the newest record of each case. Matplotlib is imported when a picture is drawn, as in
``eval/plots.py``; the same records give the same bytes.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.bench.cases import Case, parse_case, size_text
from thresher.bench.record import Record
from thresher.bench.table import load
from thresher.errors import ThresherError, require
from thresher.eval.plots import COLOURS
from thresher.eval.rundir import atomic_path
from thresher.selectors import DSA, SELECTORS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = 1024  # queries of the prefills that are drawn
CONTEXT = 128 * 1024  # tokens, of the picture over heads
PEER = "#888888"
MARKERS = "osD^vPX"
GAP = 0.045  # between two names, of the picture's height
DPI = 150

# Name -> {x: record}, x ascending: what a picture shows.
Lines = dict[str, dict[int, Record]]


def by_length(records: Sequence[Record]) -> Lines:
    """Over the tokens of context, for every selector, its options and number of heads that were timed at two lengths or more."""
    found: dict[tuple[int, int, str], dict[int, Record]] = {}
    for record, case, length in _whole_jobs(records):
        place = list(SELECTORS).index(str(record.selector))
        found.setdefault((place, -case.heads, name_of(record, case.heads)), {})[length] = record
    return {key[2]: _ascending(line) for key, line in sorted(found.items()) if len(line) > 1}


def by_heads(records: Sequence[Record]) -> Lines:
    """Over the number of index heads: DSA over ``CONTEXT`` tokens, once it was timed with two numbers or more."""
    line: dict[int, Record] = {}
    for record, case, length in _whole_jobs(records):
        if length == CONTEXT and record.options == asdict(DSA()) and record.selector == "dsa":
            line[case.heads] = record
    return {"dsa": _ascending(line)} if len(line) > 1 else {}


def origin(lines: Mapping[str, Mapping[Any, Record]]) -> str:
    """What the records were taken on: the GPU, and the commits; * marks an uncommitted tree.

    Raises:
        ThresherError: more than one GPU.
    """
    records = [record for line in lines.values() for record in line.values()]
    gpus = sorted({record.gpu for record in records})
    require(len(gpus) == 1, "a picture must be of one GPU", ", ".join(gpus), "name the one to draw with --gpu")
    commits = sorted({(record.commit or "none")[:8] + ("*" if record.dirty else "") for record in records})
    return f"{gpus[0]}, commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"


def draw(lines: Lines, title: str, xlabel: str) -> Figure:
    """Both axes are logarithmic, x by twos. Each line's name stands at its right, in its colour."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    hollow: dict[str, Any] = {"color": PEER, "linestyle": "none", "markerfacecolor": "none", "markersize": 9}
    for i, (name, line) in enumerate(lines.items()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axes.plot(list(line), [record.time_us["p50"] for record in line.values()], color=colour, marker=marker, markersize=4.5, label=name)
        axes.plot(list(line), [record.floor_us for record in line.values()], "--", color=colour, linewidth=0.9, label=f"{name}: floor")
        peer = {x: record.peer_time_us["p50"] for x, record in line.items() if record.selector == "dsa" and record.peer_time_us is not None}
        axes.plot(list(peer), list(peer.values()), marker=marker, **hollow, label=f"{name}: peer")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({x for line in lines.values() for x in line})
    axes.set_xticks(ticks, [size_text(x) for x in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    low, high = (math.log(edge) for edge in axes.get_ylim())
    ends = [(math.log(list(line.values())[-1].time_us["p50"]) - low) / (high - low) for line in lines.values()]
    for i, (name, y) in enumerate(zip(lines, spread(ends), strict=True)):
        axes.text(1.01, y, name, color=COLOURS[i % len(COLOURS)], transform=axes.transAxes, va="center", fontsize=9)
    shown = [record for line in lines.values() for record in line.values() if record.selector == "dsa"]
    peers = sorted({record.peer for record in shown if record.peer is not None})
    key = [Line2D([], [], color="black", marker="o", markersize=4.5, label="ours")]
    key.append(Line2D([], [], color="black", linestyle="--", linewidth=0.9, label="floor"))
    key += [Line2D([], [], marker="o", **hollow, label=peer) for peer in peers]
    axes.legend(handles=key, loc="upper left", frameon=False, fontsize=9)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("time of a layer's whole selection, us, median")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def spread(places: Sequence[float]) -> list[float]:
    """The places, moved upwards where two are less than ``GAP`` apart."""
    moved = list(places)
    below = -math.inf
    for at in sorted(range(len(places)), key=lambda at: places[at]):
        moved[at] = below = max(moved[at], below + GAP)
    return moved


def parse_arguments(arguments: Sequence[str], module: str, what: str) -> argparse.Namespace:
    """The command line of a module that draws from records: the folders of both, and one GPU or None."""
    parser = argparse.ArgumentParser(prog=f"python -m thresher.bench.{module}", description=what)
    parser.add_argument("results", type=Path, help="the folder of records")
    parser.add_argument("folder", type=Path, help="where to put the pictures")
    parser.add_argument("--gpu", help="draw this GPU's records alone; a name as records have it")
    return parser.parse_args(arguments)


def records_of(args: argparse.Namespace) -> list[Record]:
    """Those that the command line asks for, oldest first."""
    return [record for record in load(args.results) if args.gpu in (None, record.gpu)]


def save(figure: Figure, path: Path) -> None:
    """Write a picture, whole or not at all, and say where."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")
    print(path)


def main(arguments: Sequence[str]) -> int:
    """Draw what there are records of; 0 if that is every picture, else 1 and a line that says why."""
    args = parse_arguments(arguments, "curves", "Draw what a selection costs, from records.")
    try:
        records = records_of(args)
        shown = {picture: picture.collect(records) for picture in PICTURES}
        figures = {p.file: draw(lines, f"{p.title}\n{origin(lines)}", p.xlabel) for p, lines in shown.items() if lines}
    except ThresherError as error:
        print(error, file=sys.stderr)
        return 1
    for file, figure in figures.items():
        save(figure, args.folder / file)
    missing = [picture.file for picture in PICTURES if picture.file not in figures]
    if missing:
        print(f"{args.results} has no line of records for {' and '.join(missing)}; take them with tools/records", file=sys.stderr)
    return 1 if missing else 0


def _whole_jobs(records: Sequence[Record]) -> Iterator[tuple[Record, Case, int]]:
    """Oldest first, with case and context: prefills of a published model's sizes over normal inputs, as kernels run them in a graph."""
    for record in records:
        case = parse_case(record.case)
        timed = record.op == "select" and record.inputs == "normal" and record.ranks == 1 and record.settings.get("timing") == "graph"
        if not timed or record.impl == "reference" or record.floor_us is None or case.length is None:
            continue
        if case == Case("prefill", ROWS, case.length, case.heads):
            yield record, case, case.length


def _ascending(line: dict[int, Record]) -> dict[int, Record]:
    return {x: line[x] for x in sorted(line)}


def name_of(record: Record, heads: int) -> str:
    """The selector, how many heads score every token, and the options that differ from their defaults."""
    options = record.options
    usual = {field.name: field.default for field in fields(SELECTORS[str(record.selector)]) if field.default is not MISSING}
    active = options.get("active_heads")
    odd = [f"{name}={value}" for name, value in options.items() if name != "active_heads" and value != usual.get(name)]
    return ", ".join([str(record.selector), f"{heads} heads" if active is None else f"{active} of {heads} heads", *odd])


@dataclass(frozen=True)
class Picture:
    """A file, what it shows and how that is collected."""

    file: str
    title: str
    xlabel: str
    collect: Callable[[Sequence[Record]], Lines]


PICTURES = (
    Picture("select-by-length.png", f"Selecting 2048 tokens for {ROWS} queries, by length", "context, tokens", by_length),
    Picture(
        "select-by-heads.png",
        f"DSA: selecting 2048 of {size_text(CONTEXT)} tokens for {ROWS} queries, by heads",
        "index heads",
        by_heads,
    ),
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
