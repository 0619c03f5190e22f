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

from thresher.errors import require
from thresher.eval.rundir import write_text
from thresher.models.indexer import indexer_at
from thresher.models.llama import LayerInput, Llama, causal_attention
from thresher.train.config import WarmupConfig
from thresher.train.data import Corpus
from thresher.train.loss import layer_loss

LOGGED_EVERY = 20
SAVED_EVERY = 500


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

    Writes ``run/state.safetensors`` (weights and Adam moments) every ``SAVED_EVERY`` steps and at the end of the call, and
    ``run/log.jsonl``: a line every ``LOGGED_EVERY`` steps and at the end of the call, with step, lr, and kl, spread and imbalance by layer,
    means over the steps since the line before.

    Returns:
        the number of steps done so far, earlier calls included.

    Raises:
        ThresherError: the state in ``run`` is of another configuration.
    """
    run.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.Adam(indexers.parameters(), lr=config.lr, betas=(0.9, 0.99), fused=model.device.type == "cuda")
    step = load_state(run, indexers, optimizer, config)
    log = RunLog(run / "log.jsonl", step)
    batches = corpus.batches()
    rng = np.random.default_rng(config.seed + 1)
    for _ in range(step * config.sequences):  # the data goes on where it stopped
        next(batches)
        sample_queries(config, rng)
    began = time.monotonic()
    while step < config.steps and time.monotonic() - began < seconds:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.zero_grad(set_to_none=True)
        for _ in range(config.sequences):
            log.add(accumulate(model, indexers, next(batches), sample_queries(config, rng), config))
        optimizer.step()
        step += 1
        if step % LOGGED_EVERY == 0:
            kl, spread = log.write(step, learning_rate(config, step - 1))
            report(Progress(step, kl, spread, time.monotonic() - began))
        if step % SAVED_EVERY == 0:
            save_state(run, indexers, optimizer, step, config)
    if log.waiting:
        log.write(step, learning_rate(config, step - 1))
    save_state(run, indexers, optimizer, step, config)
    return step


class RunLog:
    """``log.jsonl``: what was measured, averaged from line to line. Lines past ``step``, of a run that was cut short, are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.waiting: list[Tensor] = []
        if path.exists():
            whole = [line for line in path.read_text().splitlines() if line.endswith("}")]  # a crash may have cut the last one
            kept = [line for line in whole if json.loads(line)["step"] <= step]
            write_text(path, "".join(line + "\n" for line in kept))

    def add(self, measured: Tensor) -> None:
        """``measured [3, layers]``: kl, spread, imbalance of one sequence."""
        self.waiting.append(measured)

    def write(self, step: int, lr: float) -> tuple[float, float]:
        """Write a line; returns kl and spread, means over layers."""
        kl, spread, imbalance = torch.stack(self.waiting).mean(0).tolist()
        self.waiting.clear()
        line = {"step": step, "lr": lr, "kl": kl, "spread": spread, "imbalance": imbalance}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        return float(np.mean(kl)), float(np.mean(spread))


def accumulate(model: Llama, indexers: nn.ModuleList, tokens: Tensor, queries: Tensor, config: WarmupConfig) -> Tensor:
    """Add one sequence's gradients to the indexers; returns ``[3, layers]``: kl, spread, imbalance."""
    out: list[Tensor] = []
    tokens, queries = tokens.to(model.device), queries.to(model.device)

    def attend(given: LayerInput) -> Tensor:
        indexer = indexer_at(indexers, given.layer)
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


def load_state(run: Path, indexers: nn.ModuleList, optimizer: torch.optim.Optimizer, config: WarmupConfig) -> int:
    """Go on from ``run/state.safetensors`` if it is there; returns the step it was written at, else 0."""
    from safetensors import safe_open

    path = run / "state.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        same = json.loads(metadata["config"]) == asdict(config)
        require(same, "a run goes on with the settings it began with", f"other ones than in {path}", "give the same, or another --out")
        names = set(file.keys())
        for name, p in indexers.named_parameters():
            p.data.copy_(file.get_tensor(f"weight.{name}"))
            state = {
                key: file.get_tensor(f"adam.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq") if f"adam.{key}.{name}" in names
            }
            if state:
                optimizer.state[p] = {key: value.to(p.device) for key, value in state.items()}
        return int(metadata["step"])


def sample_queries(config: WarmupConfig, rng: np.random.Generator) -> Tensor:
    """int64 ``[config.queries]``, ascending: one random position in each equal part of a sequence."""
    part = config.length // config.queries
    return torch.from_numpy(np.arange(config.queries) * part + rng.integers(0, part, config.queries))
