"""Which rank holds which token, and the step between logical and local positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thresher.errors import require

KINDS = ("interleaved", "contiguous", "replicated")


@dataclass(frozen=True)
class Placement:
    """Tokens of a request dealt over ranks; local positions keep the logical order.

    Interleaved: position s lives on rank ``(s // granularity) % ranks``. Contiguous: rank r holds ``[r * c, (r + 1) * c)`` with
    ``c = ceil(capacity / ranks)``; granularity plays no part. Replicated: every rank holds every position, as its own. Tensors are int64 of
    any shape; -1 (no token) maps to -1.

    Args:
        ranks: R.
        granularity: neighbours kept together.
        kind: ``"interleaved"``, ``"contiguous"`` or ``"replicated"``.
        capacity: tokens a request may reach; needed by contiguous, where positions past it are an error.

    Raises:
        ThresherError: a number under 1, an unknown kind, or contiguous without a capacity.
    """

    ranks: int
    granularity: int = 1
    kind: str = "interleaved"
    capacity: int | None = None

    def __post_init__(self) -> None:
        require(self.ranks >= 1, "ranks must be at least 1", self.ranks, "pass the number of ranks")
        require(self.granularity >= 1, "granularity must be at least 1", self.granularity, "1 deals token by token")
        require(self.kind in KINDS, f"kind must be one of {', '.join(KINDS)}", repr(self.kind), "name the placement")
        if self.kind == "contiguous":
            enough = self.capacity is not None and self.capacity >= 1
            require(enough, "contiguous placement needs a capacity of at least 1", self.capacity, "pass the longest context")

    def owner(self, positions: Tensor) -> Tensor:
        """Rank that holds each logical position, where only one does."""
        require(self.kind != "replicated", "a token must live on one rank to have an owner", "every rank holds it", "ask holds")
        self._check(positions, self.capacity)
        rank = positions // self._run if self.kind == "contiguous" else positions // self.granularity % self.ranks
        return rank.masked_fill(positions < 0, -1)

    def holds(self, positions: Tensor, rank: int) -> Tensor:
        """bool: whether ``rank`` holds each logical position."""
        self._check_rank(rank)
        return positions >= 0 if self.kind == "replicated" else self.owner(positions) == rank

    def to_local(self, positions: Tensor) -> Tensor:
        """Local position, on a rank that holds it, of each logical position."""
        self._check(positions, self.capacity)
        g = self._run
        return (positions // (g * self._dealt) * g + positions % g).masked_fill(positions < 0, -1)

    def to_logical(self, rank: int, local: Tensor) -> Tensor:
        """Logical position of each local position of ``rank``."""
        self._check_rank(rank)
        self._check(local, self._run if self.kind == "contiguous" else None)
        g = self._run
        return ((local // g * self._dealt + rank % self._dealt) * g + local % g).masked_fill(local < 0, -1)

    def local_length(self, lengths: Tensor, rank: int) -> Tensor:
        """How many of the first ``lengths`` positions ``rank`` holds."""
        self._check_rank(rank)
        self._check(lengths - 1, self.capacity)
        g, dealt = self._run, self._dealt
        base = lengths // (g * dealt) * g
        return base + (lengths - base * dealt - rank % dealt * g).clamp(0, g)

    def local_end(self, positions: Tensor, rank: int) -> Tensor:
        """The last local position on ``rank`` that is not after each logical position; -1 where there is none."""
        return self.local_length(positions + 1, rank) - 1

    @property
    def _dealt(self) -> int:
        """Ranks that tokens are dealt over."""
        return 1 if self.kind == "replicated" else self.ranks

    @property
    def _run(self) -> int:
        # A contiguous placement is an interleaved one whose first round is never finished.
        if self.kind == "contiguous":
            assert self.capacity is not None
            return -(-self.capacity // self.ranks)
        return self.granularity

    def _check_rank(self, rank: int) -> None:
        require(0 <= rank < self.ranks, f"rank must lie in [0, {self.ranks})", rank, "pass one of the ranks")

    def _check(self, positions: Tensor, limit: int | None) -> None:
        require(positions.dtype == torch.int64, "positions must be int64", positions.dtype, "convert it")
        if limit is not None and positions.numel():
            high = int(positions.max())
            require(high < limit, f"positions must be below {limit}", high, "make the placement's capacity larger")
