"""The main job on real input: a planted fact, a question, and every way of choosing tokens answering it."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from thresher.distributed.simulate import OverRanks
from thresher.errors import require
from thresher.eval.costs import index_cost
from thresher.eval.needle import ANSWER_TOKENS, Needle, build_needle, found
from thresher.eval.plots import needle_heatmap, recall_by_layer
from thresher.eval.probe import Probe
from thresher.eval.rundir import create_run_dir, write_json, write_text
from thresher.eval.settings import TOPK, describe, methods
from thresher.eval.source import source_state
from thresher.eval.table import demo_table
from thresher.models.checkpoint import SHIPPED, load_indexers, load_record
from thresher.models.decoder import Decoder
from thresher.models.smollm2 import CONFIG, load_model, load_tokenizer

CONTROLS = ("random", "dsa_wide", "misa_static", "misa_random")


@dataclass
class Row:
    """What one way of choosing tokens did over all cases."""

    found: dict[tuple[int, float], bool] = field(default_factory=dict)
    answers: dict[tuple[int, float], str] = field(default_factory=dict)
    seconds_per_token: list[float] = field(default_factory=list)


def run_demo(
    out: str, lengths: Sequence[int], depths: Sequence[float], device: str = "cpu", overwrite: bool = False, weights: Path = SHIPPED
) -> str:
    """Ask the model about the planted fact at every length and depth under every selector, and write the run directory.

    The context's prefill is dense and shared; the question and the answer run under the selector. Recall and mass are measured at the
    longest length, on the question's tokens of the dense run, so that every selector is judged on the same queries.

    Args:
        out: run directory: ``config.json``, ``metrics.json``, ``table.txt``, ``needle.png``, ``recall.png``.
        lengths: tokens of context and question together.
        depths: where the fact is planted, fractions.
        device: "cpu" or "cuda".
        overwrite: replace an earlier run in ``out``.
        weights: the indexers.

    Returns:
        the table.
    """
    from tqdm import tqdm

    require(
        bool(lengths and depths), "the demo needs a length and a depth", f"{len(lengths)} and {len(depths)}", "name at least one of each"
    )
    require(all(0 <= depth <= 1 for depth in depths), "depth must be between 0 and 1", list(depths), "pass fractions of the text")
    limit = CONFIG.max_position_embeddings - ANSWER_TOKENS
    require(max(lengths) <= limit, f"lengths must leave room for the answer, at most {limit} tokens", max(lengths), "ask for less")
    require(max(lengths) > 2 * TOPK, f"the longest length must exceed {2 * TOPK} tokens, twice what is kept", max(lengths), "ask for more")
    record, indexers = load_record(weights), load_indexers(weights, device)
    known = len(record.get("head_weights", ())) == len(indexers)
    require(known, "the record must hold head_weights for each layer", weights, "take one that thresher train wrote")
    run = create_run_dir(out, overwrite=overwrite)
    # Not bf16: answers then hang on roundings that differ between devices and versions of PyTorch.
    tokenizer, model = load_tokenizer(), load_model(dtype=torch.float32, device=device)
    plans = {length: methods(length, record["head_weights"]) for length in lengths}
    longest = max(lengths)
    write_json(run / "config.json", _config(lengths, depths, device, record, plans))
    shown = [name for name in plans[longest] if name != "oracle"]
    rows = {name: Row() for name in shown}
    watched = {name: plan for name, plan in plans[longest].items() if name != "dense"}
    probe = Probe(watched)
    bar = tqdm(total=len(lengths) * len(depths) * (len(shown) + 1), unit="answer", dynamic_ncols=True)
    with torch.inference_mode(), bar:
        for length in lengths:
            for depth in depths:
                needle = build_needle(tokenizer, length, depth)
                bar.set_postfix_str(f"{length} tokens, depth {depth:.0%}, reading")
                decoder = Decoder(model, indexers)
                decoder.prefill(torch.tensor(needle.context_ids, device=device))
                bar.update()
                for name in shown:
                    bar.set_postfix_str(f"{length} tokens, depth {depth:.0%}, {name}")
                    watch = probe if name == "dense" and length == longest else None
                    _answer(decoder, plans[length][name], needle, rows[name], tokenizer, watch)
                    bar.update()
    config = model.config
    metrics = {
        "selectors": {
            name: _metrics(name, row, plans[longest][name], probe, longest, indexers[0].config)
            for name, row in rows.items()  # type: ignore[arg-type]
        },
        "recall_by_layer": {name: probe.recall_by_layer(name) for name in watched},
        "mass_by_layer": {name: probe.mass_by_layer(name) for name in watched},
        "cases": [
            {"selector": name, "length": length, "depth": depth, "found": hit, "answer": row.answers[length, depth]}
            for name, row in rows.items()
            for (length, depth), hit in row.found.items()
        ],
    }
    table = demo_table(metrics["selectors"], longest, config.num_hidden_layers, len(lengths) * len(depths))  # type: ignore[arg-type]
    write_json(run / "metrics.json", metrics)
    write_text(run / "table.txt", table + "\n")
    needle_heatmap(run / "needle.png", {name: row.found for name, row in rows.items()}, lengths, depths)
    lines = {name: probe.recall_by_layer(name) for name in shown if name not in ("dense", "dsa", "dsa_wide")}
    recall_by_layer(run / "recall.png", lines, TOPK / longest, f"Recall of DSA's {TOPK} tokens at {longest} tokens of context, by layer")
    return table


def _answer(decoder: Decoder, plan: list[OverRanks], needle: Needle, row: Row, tokenizer: Any, watch: Probe | None) -> None:
    """Let one plan answer, then put the decoder back to the end of the context."""
    start = decoder.length
    dealt = decoder if plan[0].placement == decoder.placement else decoder.dealt(plan[0].placement)
    ids: list[int] = []
    question = torch.tensor(needle.question_ids, device=decoder.model.device)
    moments = []
    for token in dealt.generate(question, plan, ANSWER_TOKENS, watch):
        moments.append(time.perf_counter())
        ids.append(token)
        answer = tokenizer.decode(ids)
        if found(needle.number, answer) and not answer[-1].isdigit():
            break  # nothing that follows can undo it
    answer = tokenizer.decode(ids)
    row.seconds_per_token += [later - earlier for earlier, later in pairwise(moments)]
    row.answers[needle.length, needle.depth] = answer
    row.found[needle.length, needle.depth] = found(needle.number, answer)
    if dealt is decoder:
        decoder.rollback(start)


def _metrics(name: str, row: Row, plan: list[OverRanks], probe: Probe, length: int, indexer: Any) -> dict[str, object]:
    """One selector's entry of ``metrics.json``; dense reads everything, so it keeps all mass and recalls all."""
    flops, moved = index_cost(plan, length, indexer.num_heads, indexer.head_dim)
    dense = name == "dense"
    by_layer = [1.0] if dense else probe.recall_by_layer(name)
    tokens = float(length) if dense else probe.tokens_read(name)
    return {
        "found": sum(row.found.values()),
        "total": len(row.found),
        "recall": sum(by_layer) / len(by_layer),
        "recall_worst_layer": min(by_layer),
        "chance": tokens / length,
        "mass": 1.0 if dense else sum(probe.mass_by_layer(name)) / len(plan),
        "tokens_read": tokens,
        "index_flops_ratio": flops,
        "index_bytes_ratio": moved,
        "time_per_token_ms": 1e3 * median(row.seconds_per_token) if row.seconds_per_token else None,
    }


def _config(
    lengths: Sequence[int], depths: Sequence[float], device: str, record: dict[str, Any], plans: dict[int, dict[str, list[OverRanks]]]
) -> dict[str, object]:
    commit, dirty = source_state()
    return {
        "commit": commit,
        "dirty": dirty,
        "lengths": list(lengths),
        "depths": list(depths),
        "device": device,
        "topk": TOPK,
        "indexers_sha256": record["sha256"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "selectors": {str(length): {name: describe(plan) for name, plan in ways.items()} for length, ways in plans.items()},
    }
