"""Dense warm-up: train a lightning indexer on every layer of a frozen dense model, by KL to its head-summed attention."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from thresher.models.indexer import Indexer
from thresher.models.llama import LayerInput, Llama, causal_attention
from thresher.train.config import WarmupConfig
from thresher.train.data import Corpus
from thresher.train.loss import layer_loss


@dataclass(frozen=True)
class Progress:
    """What is shown now and then: steps done, KL in nats and spread as a fraction (means over layers), seconds since the call."""

    step: int
    kl: float
    spread: float
    seconds: float


def learning_rate(config: WarmupConfig, step: int) -> float:
    """Learning rate at ``step`` (0-based)."""
    grown = min(1.0, (step + 1) / config.warmup_steps)
    done = step / max(1, config.steps)
    return config.lr * grown * (0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * done)))


def train(
    model: Llama,
    indexers: nn.ModuleList,
    corpus: Corpus,
    config: WarmupConfig,
    run: Path,
    report: Callable[[Progress], None],
    seconds: float = float("inf"),
) -> int:
    """Train until ``config.steps`` or for about ``seconds``; go on from ``run/state.safetensors`` where it exists.

    Writes ``run/log.jsonl`` (one line every 20 steps: step, lr, kl/spread/imbalance per layer, means over those steps) and, at the end
    of the call, ``run/state.safetensors`` (weights and Adam moments). Returns the number of steps done so far.
    """
    run.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.Adam(indexers.parameters(), lr=config.lr, betas=(0.9, 0.99), fused=model.device.type == "cuda")
    step = load_state(run, indexers, optimizer)
    batches = corpus.batches()
    rng = np.random.default_rng(config.seed + 1)
    for _ in range(step * config.sequences):  # the data goes on where it stopped
        next(batches)
        sample_queries(config, rng)
    began, log = time.monotonic(), []
    while step < config.steps and time.monotonic() - began < seconds:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.zero_grad(set_to_none=True)
        for _ in range(config.sequences):
            log.append(accumulate(model, indexers, next(batches), sample_queries(config, rng), config))
        optimizer.step()
        step += 1
        if step % 20 == 0 or step == config.steps:
            kl, spread, imbalance = torch.stack(log).mean(0).tolist()
            log.clear()
            line = {"step": step, "lr": learning_rate(config, step - 1), "kl": kl, "spread": spread, "imbalance": imbalance}
            with open(run / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            report(Progress(step, float(np.mean(kl)), float(np.mean(spread)), time.monotonic() - began))
    save_state(run, indexers, optimizer, step, config)
    return step


def accumulate(model: Llama, indexers: nn.ModuleList, tokens: Tensor, queries: Tensor, config: WarmupConfig) -> Tensor:
    """Add one sequence's gradients to the indexers; returns ``[3, layers]``: kl, spread, imbalance."""
    out: list[Tensor] = []
    tokens, queries = tokens.to(model.device), queries.to(model.device)

    def attend(given: LayerInput) -> Tensor:
        indexer = indexers[given.layer]
        assert isinstance(indexer, Indexer)
        with torch.enable_grad():  # layers share nothing, so each is done with as soon as its backward has run
            loss = layer_loss(indexer, given, queries, config.active_heads)
            total = loss.kl + config.spread * loss.spread + config.balance * loss.imbalance
            (total / config.sequences).backward()
        out.append(torch.stack([loss.kl, loss.spread, loss.imbalance]).detach())
        return causal_attention(given)

    with torch.no_grad():
        model(tokens, torch.arange(len(tokens), device=tokens.device), attend)
    return torch.stack(out, 1)


def save_state(run: Path, indexers: nn.ModuleList, optimizer: torch.optim.Optimizer, step: int, config: WarmupConfig) -> None:
    """Write weights, Adam moments and the step to ``run/state.safetensors`` (temporary name, then rename)."""
    from safetensors.torch import save_file

    tensors = {f"weight.{name}": p.detach() for name, p in indexers.named_parameters()}
    for name, p in indexers.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"adam.{key}.{name}"] = value.detach().float()
    temporary = run / "state.safetensors.tmp"
    save_file(tensors, temporary, metadata={"step": str(step), "config": json.dumps(asdict(config))})
    os.replace(temporary, run / "state.safetensors")


def load_state(run: Path, indexers: nn.ModuleList, optimizer: torch.optim.Optimizer) -> int:
    """Go on from ``run/state.safetensors`` if it is there; returns the step it was written at, else 0."""
    from safetensors import safe_open

    path = run / "state.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        for name, p in indexers.named_parameters():
            p.data.copy_(file.get_tensor(f"weight.{name}"))
            state = {
                key: file.get_tensor(f"adam.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq") if f"adam.{key}.{name}" in names
            }
            if state:
                optimizer.state[p] = {key: value.to(p.device) for key, value in state.items()}
        return int(file.metadata()["step"])


def sample_queries(config: WarmupConfig, rng: np.random.Generator) -> Tensor:
    """int64 ``[config.queries]``, ascending: one random position in each equal part of a sequence."""
    part = config.length // config.queries
    return torch.from_numpy(np.arange(config.queries) * part + rng.integers(0, part, config.queries))
