"""Memory and time of decoding over several GPUs, in three ways, from the records of one GPU: the rows of ``thresher plan``."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thresher.bench.cases import parse_case, parse_size
from thresher.bench.floor import LATENT_DIM, VALUE_DIM
from thresher.bench.plan_exchange import Exchange, kind_of
from thresher.bench.plan_fit import SELECTORS, Error, Fit, Step, comparable, features, fit_parts, gpu_named, layer_errors, load_records
from thresher.bench.plan_models import GPU_BYTES, MODELS, ModelShape
from thresher.bench.record import RESULTS, Record
from thresher.distributed import IDSA, local_topk
from thresher.errors import ThresherError, require
from thresher.selectors.base import Selector

WAYS = ("replicated", "exact", "idsa")
# Parts of a layer in the order of a step; those of layers with an indexer alone come under INDEXER.
ROW_PARTS = ("store", "select", "candidates", "topk", "to_slots", "gather", "attend", "merge")
INDEXER = ("select", "candidates", "topk")
MOST = 4096  # requests of a batch: far more than was measured
MEMORY_SHARE = 0.9  # of a GPU for weights and caches; the rest is left to activations and workspaces, as engines do


@dataclass(frozen=True)
class Settings:
    """What the command line asks for; see ``thresher plan --help``."""

    model: str
    gpus: int = 8
    gpu: str = "h200"
    context: str = "1m"
    batch: str = "1..64"
    nodes: int = 1
    link_latency_us: float | None = None
    link_bandwidth_gbs: float | None = None
    selector: tuple[str, ...] = tuple(SELECTORS)
    exchange: str = "symmetric"
    memory_share: float = MEMORY_SHARE
    records: Path = RESULTS
    json: Path | None = None


@dataclass(frozen=True)
class Row:
    """One way to decode a batch with one selector.

    Attributes:
        batch, way, selector: which.
        parts_us: microseconds of each of ``ROW_PARTS``, on the GPU with most to do, in a layer with an indexer.
        layer_us: their sum.
        step_us: of all layers; those without an indexer lack the parts of ``INDEXER``.
        tokens_per_second: of the whole batch, were that all there is to a step.
        cache_bytes, gpu_bytes: of one request on a GPU; of weights and the whole batch.
        fits, largest_batch: whether that is within the GPU's share of memory, and the most requests that are.
        outside: letter -> in what this row is not what was measured.
    """

    batch: int
    way: str
    selector: str
    parts_us: dict[str, float]
    layer_us: float
    step_us: float
    tokens_per_second: float
    cache_bytes: int
    gpu_bytes: float
    fits: bool
    largest_batch: int
    outside: dict[str, list[str]]


@dataclass(frozen=True)
class Plan:
    """All that is printed: the rows, the fits they are from, and errors: of the fits, of whole layers, and by way of those over ranks."""

    settings: Settings
    model: ModelShape
    gpu: str
    context: int
    rows: tuple[Row, ...]
    fits: Mapping[str, Fit]
    layers: tuple[Error, ...]
    over_ranks: Mapping[str, tuple[Error, ...]]
    room_bytes: float
    weight_bytes: float


def make_plan(settings: Settings) -> Plan:
    """The plan that ``settings`` ask for.

    Raises:
        ThresherError: an option that does not fit, or records that lack what is asked.
    """
    require(settings.model in MODELS, f"--model must be one of {', '.join(MODELS)}", repr(settings.model), "choose another")
    model = MODELS[settings.model]
    context, batches = size_of(settings.context), batches_of(settings.batch)
    many = settings.gpus >= 1 and model.heads % settings.gpus == 0
    require(many, f"--gpus must divide the {model.heads} attention heads of {model.title}", settings.gpus, "choose another number")
    odd = [name for name in settings.selector if name not in SELECTORS]
    known = ", ".join(SELECTORS)
    require(not odd and bool(settings.selector), f"--selector must be among {known}", ", ".join(odd) or "none", "correct it")
    require(0 < settings.memory_share <= 1, "--memory-share must lie in (0, 1]", settings.memory_share, "0.9 is the default")
    bandwidth = None if settings.link_bandwidth_gbs is None else 1e9 * settings.link_bandwidth_gbs
    exchange = Exchange(settings.gpus, settings.nodes, settings.exchange, settings.link_latency_us, bandwidth)
    records = load_records(settings.records)
    gpu = gpu_named(records, settings.gpu)
    memory = [size for name, size in GPU_BYTES.items() if name in gpu.lower()]
    require(bool(memory), f"the GPU must be one of known memory: {', '.join(GPU_BYTES)}", gpu, "add it to bench/plan_models.py")
    fits = fit_parts(records, gpu, settings.selector)
    ways = WAYS if settings.gpus > 1 else WAYS[:1]
    if len(ways) > 1 and "topk" not in fits:
        must = "some record must hold keep_best, the exact merge's second top-k"
        raise ThresherError(f"{must}; got none; take them with tools/records keep-best")
    room, weights = settings.memory_share * memory[0], model.weight_bytes(settings.gpus)
    rows = [
        row_of(model, way, name, context, batch, exchange, fits, gpu, room)
        for batch in batches
        for way in ways
        for name in dict.fromkeys(settings.selector)
    ]
    errors, over_ranks = tuple(layer_errors(records, gpu, fits)), rank_errors(records, gpu, fits)
    return Plan(settings, model, gpu, context, tuple(rows), fits, errors, over_ranks, room, weights)


def size_of(text: str) -> int:
    """Tokens of ``"128k"``, ``"1m"`` or ``"4096"``.

    Raises:
        ThresherError: anything else.
    """
    try:
        tokens = parse_size(text.strip().lower())
    except (ValueError, IndexError):
        tokens = 0
    require(tokens >= 1, "--context must be a number of tokens such as 128k or 1m", repr(text), "1k is 1024 tokens")
    return tokens


def batches_of(text: str) -> list[int]:
    """``"8"``, a list ``"1,4,16"``, or the powers of two in a range ``"1..64"``; ascending.

    Raises:
        ThresherError: anything else, or a range without one.
    """
    low, dots, high = text.partition("..")
    try:
        numbers = [int(low), int(high)] if dots else [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    low_enough = min(numbers) >= 1 and max(numbers) <= MOST
    require(low_enough, "--batch must be like 8, 1,4,16 or 1..64", repr(text), f"batches are 1 to {MOST}")
    found = [2**i for i in range(numbers[1].bit_length()) if numbers[0] <= 2**i <= numbers[1]] if dots else sorted(set(numbers))
    require(bool(found), "a range of batches must hold a power of two", repr(text), "write the batch alone, or a list")
    return found


def rank_step(model: ModelShape, way: str, name: str, context: int, batch: int, gpus: int) -> Step:
    """What the GPU with most to do does for one token of each request.

    Replicated: all tokens, a share of the heads. Dealt: a share of the tokens, all heads, and as many tokens attended to as IDSA's m.
    That is also the most that a rank owns of the exact top-k, except with probability 1e-4.
    """
    selector: Selector = dataclasses.replace(SELECTORS[name], **{"topk": model.topk})
    if way == "replicated":
        kept = min(model.topk, context)
        return Step((context,) * batch, selector, model.index_heads, model.heads // gpus, model.topk, kept)
    held, most = -(-context // gpus), local_topk(model.topk, gpus)
    if way == "idsa":
        local, columns = IDSA(selector, gpus).local_selector, most
    else:
        local, columns = selector.shard(gpus, model.topk), model.topk
    return Step((held,) * batch, local, model.index_heads, model.heads, columns, min(most, held))


def steps_of(model: ModelShape, way: str, name: str, context: int, batch: int, gpus: int) -> dict[str, Step]:
    """Part of the fits -> what ``rank_step`` is to it; the second top-k is over the candidates of all ranks, and slots are looked up after
    it alone: a selection says which it took."""
    step = rank_step(model, way, name, context, batch, gpus)
    used = dict.fromkeys(("store", f"select {name}", "attend"), step)
    second = {"topk": dataclasses.replace(step, lengths=(gpus * model.topk,) * batch), "to_slots": step}
    return {**used, **second} if way == "exact" else used


def exchanged(model: ModelShape, way: str, batch: int, gpus: int) -> dict[str, float]:
    """Bytes that a rank has from each other rank, by part.

    The bf16 queries of the other's heads; fp32 scores and int32 positions of its k candidates; and bf16 outputs and fp32 log-sum-exps of
    the heads that the rank is to have. Index queries are made on every rank.
    """
    if way == "replicated":
        return {}
    heads = model.heads // gpus
    sizes = {"gather": 2.0 * batch * heads * LATENT_DIM, "merge": batch * heads * (2.0 * VALUE_DIM + 4.0)}
    return {**sizes, "candidates": 8.0 * batch * model.topk} if way == "exact" else sizes


def row_of(
    model: ModelShape, way: str, name: str, context: int, batch: int, exchange: Exchange, fits: Mapping[str, Fit], gpu: str, room: float
) -> Row:
    """Memory and time of one way.

    Args:
        model, way, name: what, and which selector.
        context, batch: tokens of each request, and how many.
        exchange: between the ranks.
        fits, gpu: from ``fit_parts``, and the GPU asked for.
        room: bytes of a GPU for weights and caches.
    """
    gpus = exchange.ranks
    times = dict.fromkeys(ROW_PARTS, 0.0)
    used, sizes = steps_of(model, way, name, context, batch, gpus), exchanged(model, way, batch, gpus)
    step = used["store"]
    outside: dict[str, list[str]] = {}
    for part, done in used.items():
        times[part.partition(" ")[0]] = fits[part].time_us(done)
        for letter, text in beyond(part, fits[part], done, gpu):
            outside.setdefault(letter, []).append(text)
    for part, size in sizes.items():
        times[part] = exchange.time_us(part, size)
        if part == "gather" and exchange.kind == "symmetric":  # the launch that selects sends, and nobody waits before it ends
            times[part] = max(0.0, times[part] - times["select"])
        for text in exchange.outside(part, size):
            outside.setdefault("x", []).append(f"{part}: {text}")
    layer = sum(times.values())
    whole = model.layers * layer - (model.layers - model.index_layers) * sum(times[part] for part in INDEXER)
    cache, weights = model.cache_bytes(step.selector, step.lengths[0]), model.weight_bytes(gpus)
    largest = max(0, int((room - weights) // cache))
    held = weights + batch * cache
    return Row(batch, way, name, times, layer, whole, 1e6 * batch / whole, cache, held, batch <= largest, largest, outside)


def rank_errors(records: Sequence[Record], gpu: str, fits: Mapping[str, Fit]) -> dict[str, tuple[Error, ...]]:
    """Way -> layers timed over several ranks, beside ``row_of`` with parts fitted, where others are left, without the points of that step's
    sizes; no way without such a layer.

    Nothing is fitted to these layers. Of each case, selector and exchange the newest record counts; one whose heads are no model's, or
    whose selector or second top-k has no fit, is left out.
    """
    newest: dict[tuple[str, str, str], Record] = {}
    for record in records:
        kind = kind_of(record.settings)
        layer = record.op == "layer" and record.gpu == gpu and record.ranks > 1 and parse_case(record.case).length is not None
        if layer and record.selector is not None and kind is not None and comparable(record):
            newest[record.case, record.selector, kind] = record
    found: dict[str, list[Error]] = {way: [] for way in WAYS}
    for (name, selector, kind), record in newest.items():
        case, exchange = parse_case(name), Exchange(record.ranks, kind=kind)
        models = [model for model in MODELS.values() if (model.index_heads, model.heads) == (case.heads, case.attention_heads)]
        for model, way in itertools.product(models[:1], WAYS):
            asked = (model, way, selector, case.lengths(record.seed)[0], case.rows)
            used = steps_of(*asked, record.ranks)
            if way in record.ways and used.keys() <= fits.keys():
                others = {part: fits[part].without(step) or fits[part] for part, step in used.items()}
                row = row_of(*asked, exchange, others, gpu, room=0.0)
                found[way].append(Error(f"{name} {selector} {kind}", record.ways[way], row.layer_us))
    return {way: tuple(errors) for way, errors in found.items() if errors}


def beyond(part: str, fitted: Fit, step: Step, gpu: str) -> list[tuple[str, str]]:
    """``(letter, what)`` of everything in which a step lies outside the records that its part was fitted to."""
    points = [point.step for point in fitted.points]
    found = [] if fitted.points[0].gpu == gpu else [("g", f"{part}: records of {fitted.points[0].gpu}")]

    def check(letter: str, what: str, value: int, measured: Sequence[int], between: bool = True) -> None:
        low, high = min(measured), max(measured)
        if not low <= value <= high or not (between or value in measured):
            found.append((letter, f"{part}: {value} {what}, measured {low if low == high else f'{low} to {high}'}"))

    check("b", "requests", len(step.lengths), [len(p.lengths) for p in points])
    work, most = features(part, step)[1], max(features(part, p)[1] for p in points)
    if work > most:
        found.append(("n", f"{part}: {work:.3g} {'GFLOP' if part == 'attend' else 'MB'} in all, measured up to {most:.3g}"))
    if part == "attend":
        check("h", "attention heads", step.attention_heads, [p.attention_heads for p in points], between=False)
        check("k", "tokens attended", step.attended, [p.attended for p in points])
    elif part == "to_slots":
        check("k", "columns", step.columns, [p.columns for p in points])
    elif part == "topk":
        check("c", "candidates", max(step.lengths), [max(p.lengths) for p in points])
    else:
        check("h", "index heads", step.index_heads, [p.index_heads for p in points], between=False)
    if part.startswith("select"):
        check("c", "tokens of a request", max(step.lengths), [max(p.lengths) for p in points])
        was, now = asdict(points[0].selector), asdict(step.selector)
        found += [("k", f"{part}: {key}={now[key]}, measured {was[key]}") for key in now if now[key] != was[key]]
    return found


def best(rows: Sequence[Row]) -> dict[tuple[int, str], list[Row]]:
    """``(batch, selector)`` -> the ways that fit, fastest first; ways are compared within a selector, since each picks other tokens."""
    found: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.batch, row.selector), []).extend([row] if row.fits else [])
    return {key: sorted(ways, key=lambda row: row.step_us) for key, ways in found.items()}


def as_json(plan: Plan) -> dict[str, Any]:
    """Every number of a plan; times in microseconds, sizes in bytes, errors as fractions."""

    def errors(found: Sequence[Error]) -> list[dict[str, Any]]:
        return [{**asdict(error), "relative": error.relative} for error in found]

    settings = {**asdict(plan.settings), "records": str(plan.settings.records), "json": None}
    return {
        "settings": settings,
        "model": asdict(plan.model),
        "gpu": plan.gpu,
        "context": plan.context,
        "memory": {"room_bytes": plan.room_bytes, "weight_bytes": plan.weight_bytes},
        "rows": [asdict(row) for row in plan.rows],
        "fits": {
            part: {
                "coefficients": dict(zip(fitted.terms, fitted.coefficients, strict=True)),
                "cases": [point.case for point in fitted.points],
                "gpu": fitted.points[0].gpu,
                "held_out": errors(fitted.held_out()),
            }
            for part, fitted in plan.fits.items()
        },
        "layers": errors(plan.layers),
        "layers_over_ranks": {way: errors(found) for way, found in plan.over_ranks.items()},
    }
