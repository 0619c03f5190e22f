"""``thresher eval coverage``: does the union of IDSA's local sets hold the global top-k on real scores, and does it matter?"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from thresher.bench.inputs import recorded_inputs
from thresher.cache import pack_keys
from thresher.distributed import local_topk
from thresher.distributed.idsa import MISS_PROBABILITY
from thresher.distributed.simulate import OverRanks
from thresher.errors import require
from thresher.eval.coverage import Coverage, counted, measure, placements
from thresher.eval.coverage_error import OutputError, error_methods, local_budgets, next_tokens
from thresher.eval.coverage_report import write_report
from thresher.eval.coverage_texts import TEXTS, file_ids, read_text, text_ids
from thresher.eval.rundir import create_run_dir, write_json
from thresher.eval.source import source_state
from thresher.models.checkpoint import SHIPPED, load_indexers, load_record
from thresher.models.decoder import Decoder
from thresher.models.indexer import indexer_at
from thresher.models.llama import LayerInput, Llama, causal_attention
from thresher.models.smollm2 import CONFIG, load_model, load_tokenizer
from thresher.selectors import DSA
from thresher.types import Selection

LAST = 16
"""Tokens at the end of each text whose attention output and next token are looked at."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        length: tokens of each text.
        topk: k.
        queries: the last tokens of each text, whose selections are counted. 336 in 30 layers are 10080 rows, enough to see one in 10000.
        ranks: values of R.
        granularity: values of g, for interleaved placements.
        error_ranks: R of the part that attends; 0 leaves it out.
        texts: built-in texts, of ``TEXTS``.
        files: UTF-8 files to measure besides.
        recorded: what ``thresher record`` wrote, to measure instead of texts and without a model; it has a length and queries of its own.

    Raises:
        ThresherError: values that do not fit together.
    """

    length: int = 2048
    topk: int = 256
    queries: int = 336
    ranks: Sequence[int] = (2, 4, 8, 16, 32, 64)
    granularity: Sequence[int] = (1, 4, 16, 64)
    error_ranks: int = 8
    texts: Sequence[str] = TEXTS
    files: Sequence[str] = ()
    recorded: Path | None = None

    def __post_init__(self) -> None:
        for name, values in (("ranks", self.ranks), ("granularity", self.granularity)):
            good = len(values) > 0 and len(set(values)) == len(values) and all(value >= 1 for value in values)
            require(good, f"{name} must be different numbers of at least 1", " ".join(map(str, values)) or "none", "name each once")
        require(self.topk >= 1, "topk must be at least 1", self.topk, "256 is the default")
        require(self.error_ranks >= 0, "error_ranks must be at least 0", self.error_ranks, "0 leaves that part out")
        if self.recorded is not None:
            require(not self.files, "recorded inputs are measured instead of texts", f"{len(self.files)} texts too", "leave one out")
            return
        least, limit = self.topk + LAST, CONFIG.max_position_embeddings
        must = f"length must lie in {least}..{limit}: {LAST} queries that see more than topk={self.topk}, and the model's positions"
        require(least <= self.length <= limit, must, self.length, "change length or topk")
        require(LAST <= self.queries <= self.length, f"queries must lie in {LAST}..{self.length}", self.queries, "change queries")
        names = [*self.texts, *map(_short, self.files)]
        require(len(names) > 0, "there must be a text", "none", "name one or leave the option out")
        require(len(set(names)) == len(names), "texts must have different names", " ".join(names), "rename a file")
        for name in self.texts:
            require(name in TEXTS, f"a text must be one of {', '.join(TEXTS)}", repr(name), "check the spelling")


def run_coverage(out: str, settings: Settings, device: str = "cpu", overwrite: bool = False, weights: Path = SHIPPED) -> str:
    """Measure, and write the run directory.

    Each text is read densely, once, so that every placement is judged by the same scores; the top-k of its last queries is counted over the
    ranks. The same pass attends with DSA, dense attention and IDSA of several m for the very last tokens, and the decoder then reads those
    tokens under each, in every layer.

    Args:
        out: run directory: ``config.json``, ``metrics.json``, ``table.txt``, ``coverage.png`` and, where there is a model, ``error.png``.
        settings: what is measured.
        device: "cpu" or "cuda".
        overwrite: replace an earlier run in ``out``.
        weights: the indexers.

    Returns:
        the tables and what follows from them.

    Raises:
        ThresherError: a text or a file of recorded inputs that cannot be used, or a run directory that is not free.
    """
    from tqdm import tqdm

    if settings.recorded is not None:
        return _run_recorded(Path(out), settings, settings.recorded, device, overwrite)
    for path in settings.files:
        read_text(path)  # a wrong path is noticed before the model is loaded
    record, indexers = load_record(weights), load_indexers(weights, device)
    tokenizer = load_tokenizer()
    texts = {name: text_ids(tokenizer, name, settings.length, settings.topk) for name in settings.texts}
    texts |= {_short(path): file_ids(tokenizer, path, settings.length) for path in settings.files}
    run = create_run_dir(out, overwrite=overwrite)
    # Not bf16: next tokens then hang on roundings that differ between devices and versions of PyTorch.
    model = load_model(dtype=torch.float32, device=device)
    write_json(run / "config.json", {**_config(settings, device, texts), "indexers_sha256": record["sha256"]})
    rule = local_topk(settings.topk, max(settings.error_ranks, 1), MISS_PROBABILITY, settings.length)
    methods: dict[str, OverRanks] = {}
    if settings.error_ranks:
        methods = error_methods(settings.topk, settings.error_ranks, local_budgets(settings.topk, settings.error_ranks, rule))
    results: dict[str, dict[str, list[Coverage]]] = {}
    errors: dict[str, OutputError] = {}
    with torch.inference_mode(), tqdm(total=len(texts) * (len(indexers) + len(methods)), unit="step", dynamic_ncols=True) as bar:
        for name, listed in texts.items():
            ids = torch.tensor(listed, device=device)
            error = OutputError(methods) if methods else None
            bar.set_postfix_str(f"{name}, by layer")
            layers = read_layers(model, indexers, ids, settings, error, bar.update)
            results[name] = _measured(layers, settings, settings.length)
            if error is not None:
                bar.set_postfix_str(f"{name}, next tokens")
                errors[name] = error
                error.following = _following(model, indexers, ids, error, bar.update)
    return write_report(run, settings.topk, results, errors, rule)


def read_layers(
    model: Llama, indexers: nn.ModuleList, ids: Tensor, settings: Settings, error: OutputError | None, done: Callable[[], object]
) -> list[Selection]:
    """One dense pass: DSA's selection in each layer, of the last queries whose context exceeds k.

    Args:
        model: the dense model.
        indexers: one a layer.
        ids: int64 ``[N]``, the text.
        settings: k, and how many queries.
        error: looks on at the last ``LAST`` queries, if any.
        done: called after each layer.
    """
    layers = []

    def attend(given: LayerInput) -> Tensor:
        indexer = indexer_at(indexers, given.layer)
        keys = pack_keys([indexer.index_keys(given.hidden, given.positions)])
        query = indexer.index_query(given.hidden[-settings.queries :], given.positions[-settings.queries :])
        layers.append(DSA(settings.topk).select_indices(counted(query, settings.topk), keys))
        if error is not None:
            error.look(given, query.rows(slice(-LAST, None)), keys)
        done()
        return causal_attention(given)

    model(ids, torch.arange(len(ids), device=ids.device), attend)
    return layers


def _run_recorded(out: Path, settings: Settings, recorded: Path, device: str, overwrite: bool) -> str:
    """The part that needs scores alone; each request of the file is a layer."""
    from tqdm import tqdm

    made = recorded_inputs(recorded, torch.device(device))
    length = int(made[0].keys.lengths[0])
    require(length > settings.topk, f"recorded contexts must exceed topk={settings.topk}", length, "pass a smaller topk")
    run = create_run_dir(out, overwrite=overwrite)
    write_json(run / "config.json", _config(settings, device, {}))
    layers = []
    for inputs in tqdm(made, unit="layer", dynamic_ncols=True):
        query = counted(inputs.query, settings.topk)
        layers.append(DSA(settings.topk).select_indices(query, inputs.keys))
    return write_report(run, settings.topk, {"recorded": _measured(layers, settings, length)}, {}, 0)


def _measured(layers: Sequence[Selection], settings: Settings, length: int) -> dict[str, list[Coverage]]:
    by_ranks = [placements(ranks, settings.granularity, length) for ranks in settings.ranks]
    return {name: [measure(layers, named[name], length) for named in by_ranks] for name in by_ranks[0]}


def _following(model: Llama, indexers: nn.ModuleList, ids: Tensor, error: OutputError, done: Callable[[], object]) -> dict[str, Tensor]:
    """The next tokens of ``OutputError``, the context before them prefilled densely."""
    decoder = Decoder(model, indexers, capacity=len(ids))
    decoder.prefill(ids[:-LAST])
    return next_tokens(decoder, ids[-LAST:], error.methods, done)


def _config(settings: Settings, device: str, texts: dict[str, list[int]]) -> dict[str, object]:
    commit, dirty = source_state()
    recorded = settings.recorded
    return {
        "commit": commit,
        "dirty": dirty,
        **asdict(settings),
        "recorded": None if recorded is None else str(recorded),
        "recorded_sha256": None if recorded is None else hashlib.sha256(recorded.read_bytes()).hexdigest(),
        "tokens_sha256": {name: hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest() for name, ids in texts.items()},
        "device": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _short(path: str) -> str:
    return Path(path).name
