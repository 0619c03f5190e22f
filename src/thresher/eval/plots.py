"""Pictures of a run, as PNG. Matplotlib is imported when a picture is drawn, with a backend that needs no display.

Colours are the Okabe-Ito set, told apart by colour-blind readers; lines also differ in marker and dash, cells in their mark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.errors import require
from thresher.eval.rundir import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
FOUND, MISSED, NOT_RUN = "#0072B2", "#E69F00", "#EEEEEE"
_MARKERS = "osD^vPX*"
_DASHES = ("-", "--", "-.")
_DPI = 150


def needle_heatmap(
    path: str | Path,
    found: Mapping[str, Mapping[tuple[int, float], bool]],
    lengths: Sequence[int],
    depths: Sequence[float],
    title: str = "Planted number found?",
) -> Path:
    """One row for each selector, one column for each length and depth; a cell is found (tick), missed (cross) or not run (empty).

    Args:
        path: the PNG to write (atomically).
        found: selector name -> {(length in tokens, depth in [0, 1]): found or not}, rows from top to bottom.
        lengths: column groups, left to right.
        depths: columns inside a group.
        title: above the picture.

    Raises:
        ThresherError: when there is nothing to draw.
    """
    require(bool(found and lengths and depths), "needle_heatmap needs a selector, a length and a depth", "none", "pass each")
    names = list(found)
    cases = [(length, depth) for length in lengths for depth in depths]
    figure = _figure(2.2 + 0.52 * len(cases), 1.8 + 0.36 * len(names))
    axes = figure.add_subplot()
    for row, name in enumerate(names):
        for column, case in enumerate(cases):
            hit = found[name].get(case)
            colour = NOT_RUN if hit is None else FOUND if hit else MISSED
            axes.add_patch(_rectangle(column - 0.48, row - 0.47, 0.96, 0.94, colour))
            if hit is not None:
                mark, ink = ("\N{CHECK MARK}", "white") if hit else ("\N{MULTIPLICATION SIGN}", "black")
                axes.text(column, row, mark, ha="center", va="center", color=ink, fontsize=11)
        total = sum(found[name].get(case) is not None for case in cases)
        hits = sum(found[name].get(case) is True for case in cases)
        axes.text(len(cases) - 0.35, row, f"{hits} / {total}", ha="left", va="center", fontsize=9)
    for group in range(1, len(lengths)):
        axes.axvline(group * len(depths) - 0.5, color="black", linewidth=1)
    axes.set_xlim(-0.5, len(cases) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xticks(range(len(cases)), [f"{depth:.0%}" for _, depth in cases], fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for group, length in enumerate(lengths):
        middle = group * len(depths) + (len(depths) - 1) / 2
        place: dict[str, Any] = {"xytext": (0, -22), "textcoords": "offset points", "xycoords": ("data", "axes fraction")}
        axes.annotate(f"{length} tokens", (middle, 0), ha="center", va="top", fontsize=9, **place)
    axes.set_xlabel("depth of the fact in the text, by length of the text", labelpad=26, fontsize=9)
    axes.set_title(title, fontsize=11)
    return _save(figure, path)


def recall_by_layer(
    path: str | Path,
    recalls: Mapping[str, Sequence[float]],
    chance: float | None = None,
    title: str = "Recall of DSA's tokens, by layer",
) -> Path:
    """One line for each selector over the layers, and a dotted line at chance (k / context).

    Args:
        path: the PNG to write (atomically).
        recalls: selector name -> recall in [0, 1] for layer 0, 1, ...; nan leaves a gap.
        chance: what tokens picked at random would score, in [0, 1].
        title: above the picture.

    Raises:
        ThresherError: when there is nothing to draw.
    """
    require(bool(recalls) and all(len(line) > 0 for line in recalls.values()), "recall_by_layer needs values", "none", "pass a line")
    figure = _figure(8.0, 4.2)
    axes = figure.add_subplot()
    for i, (name, values) in enumerate(recalls.items()):
        axes.plot(range(len(values)), values, label=name, markersize=4, linewidth=1.4, **_line_style(i))
    if chance is not None:
        axes.axhline(chance, color="black", linestyle=":", linewidth=1.2, label=f"chance ({chance:.2f})")
    num_layers = max(len(line) for line in recalls.values())
    axes.set_xlim(-0.5, num_layers - 0.5)
    axes.set_ylim(0, 1.02)
    axes.set_xticks(range(0, num_layers, max(1, num_layers // 15)))
    _finish(axes, "layer", "recall", title, outside=True)
    return _save(figure, path)


def loss_curve(path: str | Path, losses: Mapping[str, Sequence[tuple[int, float]]], ylabel: str, title: str) -> Path:
    """A training run: one line for each named curve (training, held out), the y axis logarithmic when every value is positive.

    Args:
        path: the PNG to write (atomically).
        losses: curve name -> (step, loss) pairs in step order.
        ylabel: what is measured, with its unit (e.g. ``"KL, nats a token"``).
        title: above the picture.

    Raises:
        ThresherError: when there is nothing to draw.
    """
    require(bool(losses) and all(len(line) > 0 for line in losses.values()), "loss_curve needs values", "none", "pass a line")
    figure = _figure(7.0, 4.0)
    axes = figure.add_subplot()
    for i, (name, points) in enumerate(losses.items()):
        style: dict[str, Any] = _line_style(i) if len(points) <= 40 else {"color": COLOURS[i % len(COLOURS)]}
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, label=name, markersize=4, linewidth=1.2, **style)
    if all(loss > 0 for points in losses.values() for _, loss in points):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(_log_ticks())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    _finish(axes, "step", ylabel, title, outside=False)
    return _save(figure, path)


def missing_by_ranks(
    path: str | Path, panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], promise: float, title: str
) -> Path:
    """One panel for each text: the share of rows that lose a token against ranks, a line for each placement, dotted the promise.

    Args:
        path: the PNG to write (atomically).
        panels: text -> placement -> (ranks, share in [0, 1]) pairs, ranks rising.
        promise: the share that the rule for m allows, above 0; below it the axis is linear, so that 0 has a place.
        title: above the picture.

    Raises:
        ThresherError: when there is nothing to draw.
    """
    require(bool(panels) and all(panels.values()), "missing_by_ranks needs a text and a placement", "none", "pass each")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(1.5 + 3.2 * columns, 0.9 + 2.8 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axes, (text, lines) in zip(grid, panels.items(), strict=False):
        for i, (name, points) in enumerate(lines.items()):
            ranks, shares = zip(*points, strict=True)
            axes.plot(ranks, shares, label=name, markersize=4, linewidth=1.3, **_line_style(i))
        axes.axhline(promise, color="black", linestyle=":", linewidth=1.2, label=f"promised ({promise:g})")
        axes.set_xscale("log", base=2)
        axes.set_yscale("symlog", linthresh=promise)
        axes.set_ylim(-promise / 4, 2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(text, fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[: len(panels)][-columns:]:  # the lowest of its column, where the last row is not full too
        axes.tick_params(labelbottom=True)
    figure.supxlabel("ranks", fontsize=9)
    figure.supylabel("share of rows that lose a token", fontsize=9)
    figure.suptitle(title, fontsize=11)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    return _save(figure, path)


def error_by_budget(path: str | Path, errors: Mapping[str, Sequence[tuple[int, float]]], scale: Mapping[str, float], title: str) -> Path:
    """One line for each text over m, and in its colour, dotted, the error of DSA itself.

    Args:
        path: the PNG to write (atomically).
        errors: text -> (m, relative error against DSA) pairs, m rising.
        scale: text -> relative error of DSA against dense attention.
        title: above the picture.

    Raises:
        ThresherError: when there is nothing to draw.
    """
    require(bool(errors) and all(len(line) > 0 for line in errors.values()), "error_by_budget needs values", "none", "pass a line")
    figure = _figure(8.0, 4.2)
    axes = figure.add_subplot()
    for i, (name, points) in enumerate(errors.items()):
        style = _line_style(i)
        budgets, values = zip(*points, strict=True)
        axes.plot(budgets, values, label=name, markersize=4, linewidth=1.4, **style)
        axes.axhline(scale[name], color=style["color"], linestyle=":", linewidth=1.2)
    axes.set_ylim(bottom=0)
    _finish(axes, "m, tokens that each rank keeps", "relative error (dotted: of DSA against dense)", title, outside=True)
    return _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    """A figure with its own Agg canvas: the caller's pyplot state and backend stay as they are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _log_ticks() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1.0, 2.0, 5.0))


def _rectangle(x: float, y: float, width: float, height: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=colour, edgecolor="none")


def _line_style(i: int) -> dict[str, Any]:
    dash = _DASHES[i // len(COLOURS) % len(_DASHES)]
    return {"color": COLOURS[i % len(COLOURS)], "marker": _MARKERS[i % len(_MARKERS)], "linestyle": dash}


def _finish(axes: Any, xlabel: str, ylabel: str, title: str, outside: bool) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    place = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)} if outside else {"loc": "best"}
    axes.legend(frameon=False, fontsize=9, **place)


def _save(figure: Figure, path: str | Path) -> Path:
    final = Path(path)
    with atomic_path(final) as temporary:
        figure.savefig(temporary, dpi=_DPI, format="png")
    return final
