"""Times of a layer's parts, fitted to the records of one GPU, and how far off they are on cases that they were not fitted to.

A part's time is a sum of a few terms with non-negative coefficients, found by least squares of relative errors:

    store       a + b * bytes                     topk (of candidates)   a + b * bytes + c * queries + d * candidates of a query
    to_slots    a + b * bytes                     attend                 a + b * FLOPs, heads padded to the kernel's 64
    select      a + b * bytes + c * queries       select with MISA       DSA's fit for the same bytes, + a for routing

Bytes are those of ``floor.useful_work``: each moved once.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np

from thresher.bench.cases import Case, parse_case
from thresher.bench.floor import LATENT_DIM, VALUE_DIM, useful_work
from thresher.bench.record import Record, read
from thresher.errors import ThresherError, require
from thresher.selectors import DSA, HISA, MISA
from thresher.selectors.base import Selector

Terms = tuple[float, ...]
SELECTORS: dict[str, Selector] = {"dsa": DSA(), "misa": MISA(), "hisa": HISA()}
HEAD_TILE = 64  # heads of a program of ops/sparse_attend/gluon.py: fewer are padded
# part -> (op of the records, what its coefficients are of); the parts of selectors are "select dsa" and so on.
BYTES, ROWS = "us/MB", "us/query"
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "store": ("store", ("us", BYTES)),
    **{f"select {name}": ("select", ("us",) if name == "misa" else ("us", BYTES, ROWS)) for name in SELECTORS},
    "to_slots": ("to_slots", ("us", BYTES)),
    "attend": ("sparse_attend_mla_fp8", ("us", "us/GFLOP")),
    "topk": ("keep_best", ("us", BYTES, ROWS, "us/1000 candidates")),
}
LEAST_STEPS = 4  # of a graph: up to 8 us of its beginning stand in one step's time otherwise (docs/benchmarks.md)
SAME = 0.05  # times of one kernel's records, taken twice


@dataclass(frozen=True)
class Step:
    """What one GPU does for one token of every request.

    Attributes:
        lengths: tokens of each request that it scores; for "topk" the candidates.
        selector: what it runs.
        index_heads, attention_heads: heads that it scores with and attends with.
        columns: of the selection that becomes slots.
        attended: tokens that each query attends to.
    """

    lengths: tuple[int, ...]
    selector: Selector
    index_heads: int
    attention_heads: int
    columns: int
    attended: int


@dataclass(frozen=True)
class Point:
    """One record: its case, the GPU, what was done, and the median in us."""

    case: str
    gpu: str
    step: Step
    time_us: float


@dataclass(frozen=True)
class Error:
    """A time that was predicted without the records of its sizes, beside the one that was measured."""

    case: str
    time_us: float
    predicted_us: float

    @property
    def relative(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted_us / self.time_us - 1.0


@dataclass(frozen=True)
class Fit:
    """One part's coefficients, in the order of ``terms``, and the points they are from; ``under`` is a fit whose time comes before."""

    part: str
    terms: tuple[str, ...]
    coefficients: Terms
    points: tuple[Point, ...]
    under: Fit | None = None

    def time_us(self, step: Step) -> float:
        """Microseconds that the part is expected to take."""
        below = 0.0 if self.under is None else self.under.time_us(step)
        return below + sum(c * x for c, x in zip(self.coefficients, features(self.part, step), strict=False))

    def without(self, step: Step) -> Fit | None:
        """The same part, fitted without every point of these sizes; None where none is left."""
        left = [point for point in self.points if features(self.part, point.step) != features(self.part, step)]
        return fit(self.part, left, self.under) if left else None

    def held_out(self) -> list[Error]:
        """Every point, predicted without the points of its sizes; none where all points have the same."""
        rest = [(point, self.without(point.step)) for point in self.points]
        return [Error(point.case, point.time_us, other.time_us(point.step)) for point, other in rest if other is not None]


def features(part: str, step: Step) -> Terms:
    """What a part's coefficients are multiplied with: 1, then MB (10**6) or GFLOP, then queries; then, for "topk", thousands of a query's
    candidates, all of which one program looks at."""
    queries, longest = len(step.lengths), max(step.lengths)
    case = Case("layer", queries, longest, step.index_heads, topk=step.columns)
    if part == "attend":
        padded = -(-step.attention_heads // HEAD_TILE) * HEAD_TILE
        return 1.0, 2e-9 * padded * (LATENT_DIM + VALUE_DIM) * step.attended * queries, float(queries)
    op = PARTS[part][0]
    if op == "keep_best":
        case = Case("decode", queries, longest, step.index_heads, topk=step.columns)
    _, moved = useful_work(case, op, step.selector if op == "select" else None, list(step.lengths))
    return 1.0, 1e-6 * moved, float(queries), 1e-3 * longest if op == "keep_best" else 0.0


def non_negative(rows: Sequence[Terms], times: Sequence[float]) -> Terms:
    """Coefficients of at least 0 with the least sum of squared relative errors.

    Every choice of terms is solved on its own, and the best whose coefficients are all positive is taken: exact, for a few terms.

    Args:
        rows: one tuple of terms for each time.
        times: above 0.
    """
    y = np.asarray(times, dtype=np.float64)
    a = np.asarray(rows, dtype=np.float64) / y[:, None]
    best, least = np.zeros(a.shape[1]), float(len(times))
    for size in range(1, a.shape[1] + 1):
        for chosen in itertools.combinations(range(a.shape[1]), size):
            part = a[:, chosen]
            scale = np.abs(part).max(axis=0)
            if (scale == 0).any():
                continue
            found, _, rank, _ = np.linalg.lstsq(part / scale, np.ones(len(times)), rcond=None)
            found = found / scale
            left = float(((part @ found - 1.0) ** 2).sum())
            if rank == size and (found > 0).all() and left < least - 1e-12:
                best, least = np.zeros(a.shape[1]), left
                best[list(chosen)] = found
    return tuple(float(x) for x in best)


def fit(part: str, points: Sequence[Point], under: Fit | None = None) -> Fit:
    """Fit a part to its points; with ``under``, what is left of their times beyond that fit's."""
    terms = PARTS[part][1]
    rows = [features(part, point.step)[: len(terms)] for point in points]
    if under is None:
        return Fit(part, terms, non_negative(rows, [point.time_us for point in points]), tuple(points))
    # One term, the same for every point: the mean of what is left, in relative errors of the whole times.
    weights = [point.time_us**-2 for point in points]
    left = [w * (point.time_us - under.time_us(point.step)) for w, point in zip(weights, points, strict=True)]
    return Fit(part, terms, (max(0.0, sum(left) / sum(weights)),), tuple(points), under)


def load_records(path: Path) -> list[Record]:
    """All records of a file, or of the ``*.jsonl`` of a folder and its folders, oldest first; but for those of ``thresher bench-model``,
    whose cases are whole models.

    Raises:
        ThresherError: nothing there, or a line that is no record.
    """
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path] if path.is_file() else []
    records = [record for file in files for record in read(file) if not record.case.startswith("model-")]
    require(bool(records), "--records must name a file of records, or a folder with some", path, "take them with tools/records")
    return sorted(records, key=lambda record: record.date)


def gpu_named(records: Sequence[Record], asked: str) -> str:
    """The one GPU of the records whose name holds ``asked``.

    Raises:
        ThresherError: none, or several; names those that there are.
    """
    names = sorted({record.gpu for record in records})
    found = [name for name in names if asked.lower() in name.lower()]
    require(len(found) == 1, f"the records must be of one GPU named {asked!r}", ", ".join(found or names), "see --gpu and --records")
    return found[0]


def usable(records: Sequence[Record], gpu: str) -> list[Record]:
    """Of each decoding case and op on this GPU the newest record by the kernel that "auto" is there to take: the fastest.

    Normal inputs, one rank, one query a request, in a graph of several steps. Where the records of one commit and kernel are more than 5 %
    off newer ones of the same cases (median), that kernel has been replaced since: what it alone was the fastest in is left out.
    """
    newest: dict[tuple[str, ...], Record] = {}
    taken = [record for record in records if record.gpu == gpu and record.ranks == 1 and comparable(record)]
    newest.update((_key(record), record) for record in taken)
    shared = defaultdict(list)
    for record in taken:
        now = newest[_key(record)]
        if now.commit != record.commit:
            shared[(*_key(record)[1:], record.commit)].append(abs(record.time_us["p50"] / now.time_us["p50"] - 1.0))
    fastest: dict[tuple[str, ...], Record] = {}
    for key, record in sorted(newest.items(), key=lambda item: -item[1].time_us["p50"]):
        fastest[key[:-1]] = record
    return [r for r in fastest.values() if median(shared.get((*_key(r)[1:], r.commit), [0.0])) <= SAME]


def fit_parts(records: Sequence[Record], gpu: str, selectors: Sequence[str]) -> dict[str, Fit]:
    """The fit of every part that the records hold, with those of the selectors named; "topk" from another GPU if this one lacks it.

    Raises:
        ThresherError: a part without records; names the ops that there are.
    """
    own = usable(records, gpu)
    wanted = ["store", "select dsa", *(f"select {name}" for name in selectors if name != "dsa"), "to_slots", "attend"]
    fits: dict[str, Fit] = {}
    for part in wanted:
        points = points_of(part, own)
        if not points:
            have = ", ".join(sorted({record.op for record in own})) or "none"
            must = f"the records of {gpu} must hold {PARTS[part][0]} of decoding ({part}), in graphs of {LEAST_STEPS} steps or more"
            raise ThresherError(f"{must}; got {have}; take them with tools/records layer decode attend")
        fits[part] = fit(part, points, fits["select dsa"] if part == "select misa" else None)
    for other in (gpu, *sorted({record.gpu for record in records} - {gpu})):
        points = points_of("topk", usable(records, other))
        if points and "topk" not in fits:
            fits["topk"] = fit("topk", points)
    return fits


def points_of(part: str, records: Sequence[Record]) -> list[Point]:
    """The points of one part."""
    op, name = PARTS[part][0], part.partition(" ")[2]
    return [Point(r.case, r.gpu, step_of(r), r.time_us["p50"]) for r in records if r.op == op and (not name or r.selector == name)]


def step_of(record: Record) -> Step:
    """What a record's run did."""
    case = parse_case(record.case)
    selector = SELECTORS[record.selector] if record.selector is not None else SELECTORS["dsa"]
    return Step(tuple(case.lengths(record.seed)), selector, case.heads, case.attention_heads, case.topk, case.topk)


def layer_errors(records: Sequence[Record], gpu: str, fits: dict[str, Fit]) -> list[Error]:
    """Whole layers, timed as one, beside the sum of their parts, each fitted without the points of that layer's sizes.

    No part is fitted to a whole layer. A layer is left out where a part has no other sizes, or its selector no fit.
    """
    found = []
    for record in usable(records, gpu):
        parts = ("store", f"select {record.selector}", "attend")
        if record.op != "layer" or any(part not in fits for part in parts):
            continue
        step = step_of(record)
        others = [fits[part].without(step) for part in parts]
        if all(other is not None for other in others):
            total = sum(other.time_us(step) for other in others if other is not None)
            found.append(Error(f"{record.case} {record.selector}", record.time_us["p50"], total))
    return found


def comparable(record: Record) -> bool:
    """Whether a record is of a case as models have it, with a known selector, over normal inputs, in a graph of several steps."""
    case = parse_case(record.case)
    steps = record.settings.get("steps", record.settings.get("copies", 0))
    how = record.inputs == "normal" and record.settings.get("timing") == "graph" and steps >= LEAST_STEPS
    one = case.kind != "prefill" and case == Case(case.kind, case.rows, case.length, case.heads, ranks=record.ranks)
    # Contexts that are kept whole are not scored; a top-k of mixed lengths takes as long as its longest row.
    scored = record.op not in ("select", "layer") or max(case.lengths(record.seed)) > case.topk
    known = record.selector is None or (record.selector in SELECTORS and record.options == asdict(SELECTORS[record.selector]))
    return how and one and scored and known and record.impl != "reference" and (record.op != "select_topk" or case.length is not None)


def _key(record: Record) -> tuple[str, ...]:
    return record.case, record.op, record.selector or "", record.impl
