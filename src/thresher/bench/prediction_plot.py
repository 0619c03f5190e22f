"""A picture of what is predicted of layers: ``python -m thresher.bench.prediction_plot PREDICTIONS.json RESULTS docs``.

``predictions.png`` has a panel for each case and kind of exchange, in it a bar for each number of GPUs and way, the parts of a step one
after the other, and a stroke where a step ends that was measured since. Matplotlib is imported when it is drawn; the same files give the
same bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.bench.cases import parse_case, size_text
from thresher.bench.curves import save
from thresher.bench.plan_exchange import KINDS
from thresher.bench.prediction_table import Times, measured
from thresher.bench.predictions import LAYERS, Prediction, Predictions, read_predictions
from thresher.bench.table import load
from thresher.errors import ThresherError
from thresher.eval.plots import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "predictions.png"
MEASURED = "measured, whole"
# What a bar is stacked of -> parts of the plan, in the order of a step; exchanges are hatched.
STACK = {
    "store, positions to slots": ("store", "to_slots"),
    "select": ("select",),
    "second top-k": ("topk",),
    "attend": ("attend",),
    "gather queries": ("gather",),
    "gather candidates": ("candidates",),
    "merge outputs": ("merge",),
}
EXCHANGED = tuple(STACK)[4:]
FILLS = (*COLOURS[:6], "#888888")  # black is the stroke's


def draw(made: Predictions, taken: Times, title: str) -> Figure:
    """Cases from left to right, exchanges from top to bottom; a case's panels share their axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(LAYERS), 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(KINDS), len(LAYERS), sharex="col", sharey=True, squeeze=False)
    for row, (exchange, called) in zip(panels, KINDS.items(), strict=True):
        for axes, name in zip(row, LAYERS, strict=True):
            case = parse_case(name)
            assert case.length is not None
            bars = [layer for layer in made.layers if layer.exchange == exchange and layer.case.startswith(f"{name}-r")]
            _panel(axes, bars, taken)
            axes.set_title(f"{case.rows} x {size_text(case.length)}, {called}", fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("time of a layer's step, us", fontsize=9)
    handles = dict(zip(*panels[0][0].get_legend_handles_labels()[::-1], strict=True))
    labels = [*STACK, *([MEASURED] if MEASURED in handles else [])]
    figure.legend([handles[label] for label in labels], labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def _panel(axes: Any, bars: Sequence[Prediction], taken: Times) -> None:
    """Bars from top to bottom; what was predicted stands behind each."""
    times = [taken.get((bar.case, bar.exchange, bar.way)) for bar in bars]
    longest = max(*(bar.layer_us for bar in bars), *(time for time in times if time is not None), 1.0)
    for at, (bar, time) in enumerate(zip(bars, times, strict=True)):
        start = 0.0
        for i, (name, parts) in enumerate(STACK.items()):
            took = sum(bar.parts_us[part] for part in parts)
            look = {"color": FILLS[i], "hatch": "///" if name in EXCHANGED else None, "edgecolor": "white", "linewidth": 0.5}
            axes.barh(at, took, left=start, height=0.66, label=name if at == 0 else None, **look)
            start += took
        if time is not None:
            axes.plot([time, time], [at - 0.42, at + 0.42], color="black", linewidth=2.5)
        axes.text(max(start, time or 0.0) + 0.015 * longest, at, f"{bar.layer_us:.0f}", va="center", fontsize=8)
    if taken:
        axes.plot([], [], color="black", linewidth=2.5, label=MEASURED)
    axes.set_yticks(range(len(bars)), [f"{parse_case(bar.case).ranks} GPUs, {bar.way}" for bar in bars], fontsize=8)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, max(axes.get_xlim()[1], 1.12 * longest))
    axes.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str]) -> int:
    """Draw it; 0, or 1 and a line that says why not."""
    if len(arguments) != 3:
        print("usage: python -m thresher.bench.prediction_plot PREDICTIONS.json RESULTS FOLDER", file=sys.stderr)
        return 1
    file, results, folder = (Path(argument) for argument in arguments)
    try:
        made = read_predictions(file)
        title = f"A layer's step of decoding over 4 and 8 GPUs, DSA: predicted on {made.date} for {made.gpu}"
        figure = draw(made, measured(made, load(results)), title)
    except ThresherError as error:
        print(error, file=sys.stderr)
        return 1
    save(figure, folder / FILE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
