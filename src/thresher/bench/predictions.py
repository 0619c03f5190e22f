"""What the planner says of layers over 4 and 8 GPUs before they are timed there: ``python -m thresher.bench.predictions OUT.json``.

The file is committed, and runs that come after it are held against it (``prediction_table``, docs/predictions.md). So one that is there is
never written over.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from thresher.bench.cases import Case, parse_case
from thresher.bench.floor import useful_work
from thresher.bench.plan_exchange import MEASURED, Exchange
from thresher.bench.plan_fit import Step, load_records, usable
from thresher.bench.plan_models import ModelShape
from thresher.bench.plan_rows import WAYS, Plan, Settings, exchanged, make_plan, rank_step, row_of
from thresher.bench.record import RESULTS, today
from thresher.errors import ThresherError, require
from thresher.eval.rundir import write_json
from thresher.eval.source import source_state

MODEL, SELECTOR = "deepseek-v3.2", "dsa"
LAYERS = ("layer-1x1m-h64", "layer-8x256k-h64", "layer-32x128k-h64")
RANKS = (4, 8)


@dataclass(frozen=True)
class Prediction:
    """One way of a case over one kind of exchange.

    Attributes:
        case: with its number of ranks, such as layer-1x1m-h64-r8.
        exchange: a key of ``plan_exchange.MEASURED``.
        way: one of ``plan_rows.WAYS``.
        layer_us, parts_us: microseconds of a layer's step on the GPU with most to do, and of its parts.
        outside: letter of ``plan.LETTERS`` -> in what this is not what was measured.
        rank_bytes: of ``idsa``: what a rank moves at least, each byte once; None for the others.
        floor_us: those bytes at the bandwidth of a copy, and the two exchanges; None for the others.
    """

    case: str
    exchange: str
    way: str
    layer_us: float
    parts_us: dict[str, float]
    outside: dict[str, list[str]]
    rank_bytes: float | None
    floor_us: float | None


@dataclass(frozen=True)
class Predictions:
    """A file of them.

    Attributes:
        gpu, model, selector: of what.
        date, commit, dirty: UTC, and of the source, as records have them.
        bandwidth: bytes a second that copies reach on this GPU, the median of its records.
        layer_error: the worst error of a whole layer on one GPU, a fraction (docs/plan.md).
        layers: every case, exchange and way.
    """

    gpu: str
    model: str
    selector: str
    date: str
    commit: str | None
    dirty: bool | None
    bandwidth: float
    layer_error: float
    layers: tuple[Prediction, ...]


def predict(records: Path = RESULTS, gpu: str = "h200") -> Predictions:
    """Ask the planner.

    Args:
        records: a file of records, or a folder with some.
        gpu: part of the GPU's name in them.

    Raises:
        ThresherError: what ``make_plan`` refuses, or records that do not say how fast a copy is.
    """
    plan = make_plan(Settings(MODEL, gpu=gpu, batch="1", selector=(SELECTOR,), records=records))  # its fits are all that is taken
    bandwidth = copy_bandwidth(records, plan.gpu)
    asked = [(parse_case(name), ranks, kind, way) for name in LAYERS for ranks in RANKS for kind in MEASURED for way in WAYS]
    layers = tuple(_predict(plan, bandwidth, *each) for each in asked)
    commit, dirty = source_state()
    error = max((abs(error.relative) for error in plan.layers), default=0.0)
    return Predictions(plan.gpu, MODEL, SELECTOR, today(), commit, dirty, bandwidth, error, layers)


def _predict(plan: Plan, bandwidth: float, case: Case, ranks: int, exchange: str, way: str) -> Prediction:
    context, name = max(case.lengths(0)), f"{case.name}-r{ranks}"
    between = Exchange(ranks, kind=exchange)
    row = row_of(plan.model, way, SELECTOR, context, case.rows, between, plan.fits, plan.gpu, plan.room_bytes)
    moved = floor = None
    if way == "idsa":
        moved = rank_bytes(plan.model, rank_step(plan.model, way, SELECTOR, context, case.rows, ranks))
        exchanges = exchanged(plan.model, way, case.rows, ranks)
        floor = 1e6 * moved / bandwidth + sum(between.time_us(part, size) for part, size in exchanges.items())
    return Prediction(name, exchange, way, row.layer_us, row.parts_us, row.outside, moved, floor)


def rank_bytes(model: ModelShape, step: Step) -> float:
    """What a rank moves at least for one token of each request: a layer's useful bytes over the tokens that it holds, as many kept as it
    keeps, with all heads of the attention."""
    held = Case("layer", len(step.lengths), step.lengths[0], model.index_heads, model.index_dim, step.columns)
    assert held.attention_heads == step.attention_heads
    return useful_work(held, "layer", step.selector, list(step.lengths))[1]


def copy_bandwidth(records: Path, gpu: str) -> float:
    """Bytes a second, read and written, of large copies on a GPU: the median of the records that the planner is fitted to.

    Raises:
        ThresherError: none of them says.
    """
    found = [r.settings["ceilings"]["copy"] for r in usable(load_records(records), gpu) if "ceilings" in r.settings]
    require(bool(found), f"records of {gpu} must hold the ceilings of their run", "none", "take them with tools/records layer")
    return median(found)


def read_predictions(path: Path) -> Predictions:
    """What ``main`` wrote.

    Raises:
        ThresherError: a file that is not there or holds something else.
    """
    try:
        held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Predictions(**{**held, "layers": tuple(Prediction(**layer) for layer in held["layers"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        must = "predictions must be a file that python -m thresher.bench.predictions wrote"
        raise ThresherError(f"{must}; got {path} ({type(error).__name__}); name another") from None


def main(arguments: Sequence[str]) -> int:
    """Write a new file; 0, or 1 and a line that says why not."""
    parser = argparse.ArgumentParser(prog="python -m thresher.bench.predictions", description="Predict layers over 4 and 8 GPUs.")
    parser.add_argument("out", type=Path, help="the file to write, such as benchmarks/predictions/h200-2026-11-30.json")
    parser.add_argument("--records", type=Path, default=RESULTS, help="a folder or a file (default: %(default)s)")
    parser.add_argument("--gpu", default="h200", help="part of a GPU's name in the records (default: %(default)s)")
    args = parser.parse_args(arguments)
    try:
        new = not args.out.exists() and args.out.parent.is_dir()
        require(new, "predictions must go to a new file in a folder that exists", args.out, "name another: runs are held against each")
        write_json(args.out, asdict(predict(args.records, args.gpu)))
    except ThresherError as error:
        print(error, file=sys.stderr)
        return 1
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
