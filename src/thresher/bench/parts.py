"""A picture of what a layer's step is made of, drawn from the records: ``python -m thresher.bench.parts benchmarks/results docs``.

``layer-parts.png`` has a bar for each layer case and selector of which every part was timed by itself, the parts one after the other, and a
stroke where the whole step, timed as one, ends. A bar takes the newest record of each part. Matplotlib is imported when it is drawn; the
same records give the same bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from thresher.bench.cases import parse_case
from thresher.bench.curves import name_of, origin, parse_arguments, records_of, save
from thresher.bench.record import Record
from thresher.errors import ThresherError
from thresher.eval.plots import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "layer-parts.png"
WHOLE = "the whole, as one"
# op -> what it does, in the order of a step.
PARTS = {"store": "quantise and store", "select": "select", "sparse_attend_mla_fp8": "attend"}

# Name of a bar -> {op: record}, the whole step's under "layer".
Bars = dict[str, dict[str, Record]]


def by_part(records: Sequence[Record]) -> Bars:
    """The bars of which there is every part, by case and selector in the order of their first record."""
    found: Bars = {}
    for record in records:
        case = parse_case(record.case)
        timed = record.inputs == "normal" and record.ranks == 1 and record.settings.get("timing") == "graph" and record.impl != "reference"
        if case.kind == "layer" and timed and record.selector is not None and record.op in (*PARTS, "layer"):
            found.setdefault(f"{record.case}\n{name_of(record, case.heads)}", {})[record.op] = record
    return {name: bar for name, bar in found.items() if len(bar) == len(PARTS) + 1}


def draw(bars: Bars, title: str) -> Figure:
    """Bars from top to bottom; each part's time stands in it where there is room."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 1.2 + 0.55 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    longest = max(sum(bar[op].time_us["p50"] for op in PARTS) for bar in bars.values())
    for row, bar in enumerate(bars.values()):
        start = 0.0
        for i, op in enumerate(PARTS):
            took = bar[op].time_us["p50"]
            axes.barh(row, took, left=start, height=0.6, color=COLOURS[i], label=PARTS[op] if row == 0 else None)
            if took > 0.05 * longest:
                axes.text(start + took / 2, row, f"{took:.1f}", ha="center", va="center", fontsize=8, color="white")
            start += took
        whole = bar["layer"].time_us["p50"]
        axes.plot([whole, whole], [row - 0.38, row + 0.38], color="black", linewidth=2, label=WHOLE if row == 0 else None)
        axes.text(max(start, whole) + 0.01 * longest, row, f"{whole:.1f}", va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), list(bars), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(longest, *(bar["layer"].time_us["p50"] for bar in bars.values())))
    axes.set_xlabel("time, us, median")
    axes.set_title(title, fontsize=11)
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    labels = [*PARTS.values(), WHOLE]
    figure.legend([handles[label] for label in labels], labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(arguments: Sequence[str]) -> int:
    """Draw it; 0, or 1 and a line that says why not."""
    args = parse_arguments(arguments, "parts", "Draw the parts of a layer's step, from records.")
    try:
        bars = by_part(records_of(args))
        if not bars:
            must = f"{args.results} must hold a layer case with each of its parts"
            raise ThresherError(f"{must}; got none; take them with tools/records layer")
        figure = draw(bars, f"A layer's step of decoding, 2048 tokens selected\n{origin(bars)}")
    except ThresherError as error:
        print(error, file=sys.stderr)
        return 1
    save(figure, args.folder / FILE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
