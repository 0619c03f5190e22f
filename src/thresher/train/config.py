"""Settings of the dense warm-up."""

from __future__ import annotations

from dataclasses import dataclass

from thresher.errors import require

STARTS = ("random", "attention")


@dataclass(frozen=True)
class WarmupConfig:
    """The run's settings; the defaults are the ones the shipped indexers were trained with.

    Attributes:
        steps: optimiser steps.
        sequences: sequences of ``length`` tokens a step.
        length: tokens in a sequence.
        queries: positions a sequence is learnt from, one at random in each of that many equal parts.
        lr: peak learning rate (Adam), after ``warmup_steps`` of linear growth, falling as a cosine to a twentieth.
        active_heads: heads that ``spread`` may concentrate on.
        spread: weight of the share of head mass outside them.
        balance: weight of the imbalance of head use.
        planted: share of sequences that get planted copies of earlier passages (``data.plant_copies``), in [0, 1].
        copies: how many such a sequence gets.
        numbers: share of copies whose source first gets a random number written into it, in [0, 1].
        start: "random" weights, or "attention": the slow RoPE pairs of the attention's own projections (``initial``).
        rotary_dim: dims of the index heads that RoPE turns.
        seed: of data order, query places and initial weights.
    """

    steps: int = 1500
    sequences: int = 1
    length: int = 8192
    queries: int = 1024
    lr: float = 1e-3
    warmup_steps: int = 100
    active_heads: int = 6
    spread: float = 3.0
    balance: float = 0.5
    planted: float = 0.5
    copies: int = 24
    numbers: float = 0.0
    start: str = "random"
    rotary_dim: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "sequences", "queries", "warmup_steps", "active_heads"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name), f"raise --{name.replace('_', '-')}")
        require(self.queries <= self.length, f"queries must be at most the length, {self.length}", self.queries, "lower --queries")
        require(0 < self.lr < float("inf"), "lr must be a positive number", self.lr, "1e-3 is the default")
        for name in ("planted", "numbers"):
            require(0 <= getattr(self, name) <= 1, f"{name} must be between 0 and 1", getattr(self, name), "pass a share")
        require(self.start in STARTS, f"start must be one of {', '.join(STARTS)}", repr(self.start), "name a start")
