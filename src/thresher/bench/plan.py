"""``thresher plan``: what decoding over several GPUs takes, as text and as JSON (docs/plan.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from thresher.bench.cases import size_text
from thresher.bench.plan_exchange import SOURCE, Exchange
from thresher.bench.plan_fit import Error, Fit
from thresher.bench.plan_rows import MEMORY_SHARE, ROW_PARTS, Plan, Settings, as_json, best, make_plan
from thresher.errors import require
from thresher.eval.rundir import write_json
from thresher.eval.table import aligned

LETTERS = {
    "b": "batches",
    "c": "contexts (or candidates) of a GPU",
    "h": "numbers of heads",
    "n": "bytes or FLOPs of all requests together",
    "k": "numbers of tokens or blocks kept on a GPU",
    "g": "another GPU's records",
    "x": "exchanges",
}


def run_plan(settings: Settings, write: Callable[[str], None]) -> Plan:
    """Make the plan, write it as text, and as JSON where a file is named.

    Raises:
        ThresherError: an option that does not fit, records that lack what is asked, or a file that cannot be made.
    """
    folder = settings.json.parent if settings.json is not None else Path()
    require(folder.is_dir(), "--json must name a file in a folder that exists", settings.json, "make the folder first")
    plan = make_plan(settings)
    write(text_of(plan))
    if settings.json is not None:
        write_json(settings.json, as_json(plan))
    return plan


def text_of(plan: Plan) -> str:
    """What ``thresher plan`` prints: memory, times, the best way for each batch, and how far the model is off."""
    return "\n\n".join([_head(plan), _memory(plan), _times(plan), _best(plan), _errors(plan)])


def _head(plan: Plan) -> str:
    model, asked = plan.model, plan.settings
    nodes = "" if asked.nodes == 1 else f" on {asked.nodes} nodes"
    lines = [
        f"{model.title} on {asked.gpus} x {plan.gpu}{nodes}, context {size_text(plan.context)}; records: {asked.records}",
        f"Times are of indexer and attention alone, all {model.layers} layers ({model.index_layers} with an indexer). Projections, dense"
        " layers, mixtures of experts, all-reduces and sampling are not in them.",
    ]
    if plan.context > model.positions:
        lines.append(f"{model.title} was made for {model.positions} positions: beyond that, sizes and times hold, what it says need not.")
    return "\n".join(lines)


def _memory(plan: Plan) -> str:
    seen = {(row.way, row.selector): row for row in plan.rows}
    share = plan.settings.memory_share
    lines = [("way", "selector", "GB a request", "largest batch")]
    lines += [(way, name, f"{row.cache_bytes / 1e9:.2f}", str(row.largest_batch)) for (way, name), row in seen.items()]
    said = f"Memory of a GPU: {plan.room_bytes / 1e9:.1f} GB ({share:g} of it), of which weights {plan.weight_bytes / 1e9:.1f}"
    return said + ("" if share == MEMORY_SHARE else f"; --memory-share is {MEMORY_SHARE} unless given") + "\n" + aligned(lines, 2)


def _times(plan: Plan) -> str:
    lines: list[Sequence[str]] = [("batch", "way", "selector", *ROW_PARTS, "layer", "step ms", "tokens/s", "GB", "fits", "outside")]
    for row in plan.rows:
        parts = [f"{row.parts_us[part]:.1f}" if row.parts_us[part] else "-" for part in ROW_PARTS]
        speed = [f"{row.layer_us:.1f}", f"{1e-3 * row.step_us:.2f}", f"{row.tokens_per_second:.0f}"]
        memory = [f"{row.gpu_bytes / 1e9:.0f}", "yes" if row.fits else "no"]
        lines.append((str(row.batch), row.way, row.selector, *parts, *speed, *memory, "".join(sorted(row.outside))))
    used = {letter for row in plan.rows for letter in row.outside}
    legend = [f"{letter}: {text}" for letter, text in LETTERS.items() if letter in used]
    said = f"Outside what was measured, so extrapolated: {'; '.join(legend)}. --json lists each." if legend else "No row is extrapolated."
    title = "Time of a layer with an indexer, us, on the GPU with most to do; of a step, all layers together; tokens/s of the whole batch"
    return "\n".join([title, aligned(lines, 3), said])


def _best(plan: Plan) -> str:
    over_ranks = [error for errors in plan.over_ranks.values() for error in errors]
    worst = max((abs(error.relative) for error in over_ranks or plan.layers), default=0.0)
    lines, close = ["Best way that fits, for each selector, ms a step:"], False
    ranked = best(plan.rows)
    for batch in dict.fromkeys(batch for batch, _ in ranked):
        said = []
        for name in dict.fromkeys(name for _, name in ranked):
            ways = ranked[batch, name]
            text = f"{name} {ways[0].way} {1e-3 * ways[0].step_us:.2f}" if ways else f"{name} none fits"
            if len(ways) > 1:
                near = ways[1].step_us <= (1 + worst) * ways[0].step_us
                close = close or near
                text += f" (then {ways[1].way} {1e-3 * ways[1].step_us:.2f}{'~' if near else ''})"
            said.append(text)
        lines.append(f"batch {batch}: " + "; ".join(said))
    if close:
        lines.append(f"~ closer than the worst error of a {'layer over ranks' if over_ranks else 'whole layer'}, {worst:.0%}: measure both")
    return "\n".join(lines)


def _errors(plan: Plan) -> str:
    lines: list[Sequence[str]] = [("part", "fit", "records", "median", "worst", "of")]
    lines += [(part, _formula(fitted), str(len(fitted.points)), *_summary(fitted.held_out())) for part, fitted in plan.fits.items()]
    lines.append(("whole layer", "the sum of its parts, each fitted without its sizes", str(len(plan.layers)), *_summary(plan.layers)))
    lines += [
        (f"layer over ranks, {way}", "parts as above, and exchanges; fitted to no layer", str(len(errors)), *_summary(errors))
        for way, errors in plan.over_ranks.items()
    ]
    exchange = Exchange(1, kind=plan.settings.exchange)
    notes = [f"Exchanges are from a pair of GPUs: {SOURCE}."]
    for part in ("gather", "merge"):
        fixed, slope = exchange.coefficients(part)
        sizes = len(exchange.measured(part))
        notes.append(f"{part}, {exchange.kind}: {fixed:.1f} us + bytes / {1e-3 / slope:.0f} GB/s, from {sizes} sizes")
    others = {fitted.points[0].gpu for fitted in plan.fits.values()} - {plan.gpu}
    if others:
        notes.append(f"The second top-k (topk) is fitted to records of {', '.join(sorted(others))}, since {plan.gpu} has none.")
    return "Error on cases left out of the fit, predicted over measured\n" + aligned(lines, 2) + "\n" + "\n".join(notes)


def _formula(fitted: Fit) -> str:
    words = []
    for value, unit in zip(fitted.coefficients, fitted.terms, strict=True):
        if unit == "us/MB" and value:
            words.append(f"bytes / {1e3 / value:.0f} GB/s")
        elif unit == "us/GFLOP" and value:
            words.append(f"FLOPs / {1e3 / value:.0f} TFLOP/s")
        elif value:
            words.append(f"{value:.3g} {unit}")
    return ("" if fitted.under is None else f"{fitted.under.part} + ") + " + ".join(words or ["0 us"])


def _summary(errors: Sequence[Error]) -> tuple[str, str, str]:
    if not errors:
        return "-", "-", "no case can be left out"
    worst = max(errors, key=lambda error: abs(error.relative))
    return f"{median(abs(error.relative) for error in errors):.1%}", f"{worst.relative:+.1%}", worst.case
