"""Settings of the dense warm-up."""

from __future__ import annotations

from dataclasses import dataclass


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
        copies: planted copies of earlier passages in each sequence (see ``data.plant_copies``).
        seed: of data order, query places and initial weights.
    """

    steps: int = 2600
    sequences: int = 1
    length: int = 8192
    queries: int = 512
    lr: float = 4e-3
    warmup_steps: int = 100
    active_heads: int = 6
    spread: float = 3.0
    balance: float = 0.5
    copies: int = 100
    seed: int = 0
