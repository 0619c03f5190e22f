"""A picture of which way to decode over ranks is the fastest where: ``python -m thresher.bench.ways benchmarks/results docs``.

``ways.png`` has a panel for each number of requests with a line for each way over the context, and below them a table of the fastest, of
what comes next and of the best public way. It takes the newest record of each case of ``tools/records ranks-grid``. Matplotlib is imported
when it is drawn; the same records give the same bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from thresher.bench.cases import Case, parse_case, size_text
from thresher.bench.curves import origin, parse_arguments, records_of, save
from thresher.bench.ranks import PLACED
from thresher.bench.record import Record
from thresher.errors import ThresherError
from thresher.eval.plots import COLOURS
from thresher.selectors import DSA

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "ways.png"
PUBLIC = "public_"
RANKS, HEADS, WAY = 2, 64, "idsa"  # of the cases that are drawn, and of their records
# Placement -> colour and marker; public ways are dashed and hollow.
LOOKS = {"idsa": (COLOURS[0], "o"), "exact": (COLOURS[1], "s"), "replicated": (COLOURS[2], "D")}

# Requests -> {tokens of context: record}, both ascending.
Grid = dict[int, dict[int, Record]]


def by_size(records: Sequence[Record]) -> Grid:
    """The newest record of each size: DSA over normal inputs in graphs, over ``RANKS``, with another way at least."""
    found: Grid = {}
    for record in records:
        case = parse_case(record.case)
        whole = record.ranks == RANKS and record.inputs == "normal" and record.settings.get("timing") == "graph"
        dsa = record.selector == "dsa" and record.options == asdict(DSA()) and record.settings.get("way") == WAY and bool(record.beside)
        usual = case.length is not None and case == Case("layer", case.rows, case.length, HEADS, ranks=RANKS)
        if whole and dsa and usual and record.impl != "reference":
            assert case.length is not None
            found.setdefault(case.rows, {})[case.length] = record
    return {rows: dict(sorted(line.items())) for rows, line in sorted(found.items())}


def fastest(times: Mapping[str, float]) -> tuple[str, list[str]]:
    """The fastest way, and lines about the next and the best public one, with their times over the fastest's."""
    first, second, *_ = sorted(times, key=lambda way: times[way])
    public = [time for way, time in times.items() if way.startswith(PUBLIC)]
    lines = [f"{second} {times[second] / times[first]:.2f}"]
    return first, [*lines, f"public {min(public) / times[first]:.2f}"] if public else lines


def draw(grid: Grid, title: str) -> Figure:
    """Panels above, the table of the fastest below; both have the same contexts from left to right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = sorted({length for line in grid.values() for length in line})
    width, low = max(9.0, 4.1 * len(grid)), 0.9 + 0.72 * len(grid)
    figure = Figure(figsize=(width, 5.2 + low), layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=[5.2, low])
    upper, lower = parts
    panels = upper.subplots(1, len(grid), sharey=True, squeeze=False)[0]
    for panel, (rows, line) in zip(panels, grid.items(), strict=True):
        _panel(panel, line, lengths)
        panel.set_title(f"{rows} request{'s' if rows > 1 else ''}", fontsize=10)
    panels[0].set_ylabel("time of a layer's step, us, median")
    handles = dict(zip(*[side for panel in panels for side in panel.get_legend_handles_labels()][1::-1], strict=True))
    upper.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    _table(lower.subplots(), grid, lengths)
    figure.suptitle(title, fontsize=11)
    return figure


def look_of(way: str) -> dict[str, Any]:
    """Colour, marker and dash of a way."""
    colour, marker = LOOKS[way.removeprefix(PUBLIC)]
    public = way.startswith(PUBLIC)
    face = {"markerfacecolor": "white"} if public else {}
    return {"color": colour, "marker": marker, "linestyle": "--" if public else "-", "markersize": 5, "linewidth": 1.5, **face}


def _panel(axes: Any, line: Mapping[int, Record], lengths: Sequence[int]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for way in PLACED:
        times = {length: record.ways[way] for length, record in line.items() if way in record.ways}
        axes.plot(list(times), list(times.values()), **look_of(way), label=way)
    best = {length: min(record.ways.values()) for length, record in line.items()}
    axes.plot(list(best), list(best.values()), "*", color="black", markersize=11, zorder=4, label="the fastest")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [size_text(length) for length in lengths])
    axes.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("context, tokens")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _table(axes: Any, grid: Grid, lengths: Sequence[int]) -> None:
    """A cell for each size, in the colour of the fastest way."""
    for row, line in enumerate(grid.values()):
        for column, length in enumerate(lengths):
            if length not in line:
                continue
            way, others = fastest(line[length].ways)
            axes.barh(row, 0.96, left=column - 0.48, height=0.92, color=look_of(way)["color"], alpha=0.22)
            axes.text(column, row - 0.25, way, ha="center", va="center", fontsize=9, weight="bold")
            axes.text(column, row + 0.14, "\n".join(others), ha="center", va="center", fontsize=8)
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(len(grid) - 0.5, -0.5)
    axes.set_xticks(range(len(lengths)), [size_text(length) for length in lengths])
    axes.set_yticks(range(len(grid)), [f"{rows} request{'s' if rows > 1 else ''}" for rows in grid], fontsize=9)
    axes.set_title("the fastest way; the next and the best public one, with their times over the fastest's", fontsize=10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def main(arguments: Sequence[str]) -> int:
    """Draw it; 0, or 1 and a line that says why not."""
    args = parse_arguments(arguments, "ways", "Draw which way to decode over ranks is the fastest, from records.")
    try:
        grid = by_size(records_of(args))
        if not grid:
            must = f"{args.results} must hold cases over {RANKS} ranks, such as layer-1x1m-h{HEADS}-r{RANKS}"
            raise ThresherError(f"{must}; got none; take them with torchrun --nproc-per-node {RANKS} tools/records ranks-grid")
        named = {str(rows): line for rows, line in grid.items()}
        figure = draw(grid, f"A layer's step of decoding over {RANKS} GPUs, DSA, 2048 tokens selected\n{origin(named)}")
    except ThresherError as error:
        print(error, file=sys.stderr)
        return 1
    save(figure, args.folder / FILE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
