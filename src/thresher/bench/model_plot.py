"""What a layer's attention block costs over the context, drawn: ``python -m thresher.bench.model_plot benchmarks/results/model docs``.

``model-layers.png`` has a panel for each model and number of requests, with a line for each selector of ``thresher bench-model``, and a
dashed one for what lies between the projections. Where two lines cross is marked, named, and printed below a table of the times. The newest
record of each counts. Matplotlib is imported when the picture is drawn; the same records give the same bytes.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any

from thresher.bench.cases import parse_size, size_text
from thresher.bench.curves import origin, parse_arguments, records_of, save
from thresher.bench.record import Record
from thresher.bench.table import markdown
from thresher.errors import ThresherError
from thresher.eval.plots import COLOURS
from thresher.selectors import DSA, HISA, Dense, Selector

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "model-layers.png"
CASE = re.compile(r"model-(?P<model>.+)-(?P<batch>\d+)x(?P<context>\d+[km]?)")
# Selector -> what it must have been timed as, what it is called, its colour and marker.
LINES: Mapping[str, tuple[Selector, str, str, str]] = {
    "dense": (Dense(), "dense MLA", COLOURS[1], "s"),
    "dsa": (DSA(), "DSA", COLOURS[0], "o"),
    "hisa": (HISA(), "HISA", COLOURS[2], "D"),
}
INNER = "between the projections"

# (model, requests) -> {selector: {context: record}}, contexts ascending.
Panels = dict[tuple[str, int], dict[str, dict[int, Record]]]


def by_panel(records: Sequence[Record]) -> Panels:
    """The newest record of each, timed in graphs; selectors in the order of ``LINES``, each with its default options."""
    found: Panels = {}
    for record in records:
        case, name = CASE.fullmatch(record.case), record.selector or ""
        if case is None or name not in LINES or record.op != "attention" or record.settings.get("timing") != "graph":
            continue
        if all(record.settings.get(option) == value for option, value in asdict(LINES[name][0]).items()):
            lines = found.setdefault((case["model"], int(case["batch"])), {})
            lines.setdefault(name, {})[parse_size(case["context"])] = record
    return {key: {name: dict(sorted(lines[name].items())) for name in LINES if name in lines} for key, lines in sorted(found.items())}


def times_of(line: Mapping[int, Record], inner: bool = False) -> dict[int, float]:
    """Context -> median, in microseconds, of the block or of what lies between its projections."""
    return {context: (record.settings["parts_us"]["inner"] if inner else record.time_us)["p50"] for context, record in line.items()}


def crossings(first: Mapping[int, float], second: Mapping[int, float]) -> list[tuple[float, float, bool]]:
    """Where two lines cross, straight between neighbouring contexts that both have, both axes logarithmic.

    Args:
        first, second: context -> time.

    Returns:
        context, time, and whether it is the second that is the faster one from there on.
    """
    ahead = {context: math.log(second[context] / first[context]) for context in sorted(first.keys() & second.keys())}
    found = []
    for left, right in pairwise(ahead):
        before, after = ahead[left], ahead[right]
        if (before > 0) == (after > 0):
            continue
        share = before / (before - after)
        context, time = (math.exp((1 - share) * math.log(a) + share * math.log(b)) for a, b in ((left, right), (first[left], first[right])))
        found.append((context, time, after <= 0))
    return found


def said(lines: Mapping[str, Mapping[int, Record]], inner: bool = False) -> list[str]:
    """A sentence for each crossing, and for each pair of selectors that do not cross."""
    sentences = []
    for one, other in combinations(lines, 2):
        first, second = times_of(lines[one], inner), times_of(lines[other], inner)
        shared = first.keys() & second.keys()
        points = crossings(first, second)
        names = LINES[one][1], LINES[other][1]
        for context, _, later in points:
            slow, fast = names if later else names[::-1]
            sentences.append(f"{fast} is faster than {slow} from {about(context)} on")
        if shared and not points:
            slow, fast = names if second[min(shared)] < first[min(shared)] else names[::-1]
            sentences.append(f"{fast} is faster than {slow} from {size_text(min(shared))} to {size_text(max(shared))}")
    return sentences


def about(context: float) -> str:
    """Tokens, to three digits."""
    return f"{context / 1024:.3g}k"


def table(panels: Panels) -> str:
    """Markdown: medians of a layer's attention block, in brackets of what lies between its projections, and then where these cross."""
    names = [name for name in LINES if any(name in lines for lines in panels.values())]
    rows = [("model", "requests", "context", *(f"{LINES[name][1]} us" for name in names))]
    notes = []
    for (model, batch), lines in panels.items():
        for context in sorted({context for line in lines.values() for context in line}):
            both = [[times_of(lines.get(name, {}), inner).get(context) for inner in (False, True)] for name in names]
            cells = ("-" if whole is None else f"{whole:.1f} ({inner:.1f})" for whole, inner in both)
            rows.append((model, str(batch), size_text(context), *cells))
        notes += [f"- {model}, batch {batch}: {sentence}." for sentence in said(lines)]
        notes += [f"- {model}, batch {batch}, {INNER}: {sentence}." for sentence in said(lines, inner=True)]
    return "\n".join([markdown(rows), "", *notes])


def draw(panels: Panels, title: str) -> Figure:
    """Panels side by side; crossings of whole blocks are rings with their context, and all crossings stand in words below each panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7.5, 5.6 * len(panels)), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for panel, ((model, batch), lines) in zip(axes, panels.items(), strict=True):
        _panel(panel, lines)
        panel.set_title(f"{model}, {batch} request{'s' if batch > 1 else ''}", fontsize=10)
    axes[0].set_ylabel("a layer's attention block, us, median")
    figure.suptitle(title, fontsize=11)
    return figure


def _panel(axes: Any, lines: Mapping[str, Mapping[int, Record]]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for name, line in lines.items():
        _, called, colour, marker = LINES[name]
        axes.plot(list(line), list(times_of(line).values()), color=colour, marker=marker, markersize=5, linewidth=1.5, label=called)
        axes.plot(list(line), list(times_of(line, inner=True).values()), "--", color=colour, linewidth=1, label=f"{called}, {INNER}")
    points = sorted(point for one, other in combinations(lines, 2) for point in crossings(times_of(lines[one]), times_of(lines[other])))
    for i, (context, time, _) in enumerate(points):  # named below and above in turn, since neighbours may be close
        axes.plot([context], [time], "o", color="black", markersize=11, markerfacecolor="none")
        place: dict[str, Any] = {"xytext": (0, 11 if i % 2 else -17), "textcoords": "offset points"}
        axes.annotate(about(context), (context, time), ha="center", fontsize=9, **place)
    ticks = sorted({context for line in lines.values() for context in line})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [size_text(context) for context in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    words = [f"{INNER}: {sentence}" for sentence in said(lines, inner=True)]
    axes.set_xlabel("\n".join(["context, tokens", "", *said(lines), *words]), fontsize=9)
    axes.grid(alpha=0.3)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.4)  # room for the legend above all lines
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str]) -> int:
    """Draw it and print the table; 0, or 1 and a line that says why not."""
    args = parse_arguments(arguments, "model_plot", "Draw what a layer's attention block costs over the context, from records.")
    try:
        panels = by_panel(records_of(args))
        if not panels:
            raise ThresherError(f"{args.results} must hold records of a model; got none; take them with thresher bench-model")
        every = {f"{key} {name}": line for key, lines in panels.items() for name, line in lines.items()}
        figure = draw(panels, f"Decoding at true layer shapes: projections, indexer, attention\n{origin(every)}")
    except ThresherError as error:
        print(error, file=sys.stderr)
        return 1
    save(figure, args.folder / FILE)
    print(table(panels))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
