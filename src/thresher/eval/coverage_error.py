"""What the extra tokens of IDSA do to the attention's output and to the next token, as m grows from ``ceil(k / R)`` to k.

IDSA's hypothesis (OpenReview s3kae9DXni): what the ranks keep beyond the global top-k barely moves a softmax. The error of DSA itself,
against attention to every token, is the scale to read these errors by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thresher.cache.placement import Placement
from thresher.distributed import IDSA, Single
from thresher.distributed.simulate import OverRanks
from thresher.errors import require
from thresher.models.decoder import Decoder
from thresher.models.llama import LayerInput
from thresher.ops import sparse_attend
from thresher.selectors import DSA, Dense
from thresher.types import IndexKeys, IndexQuery

DSA_ROW, DENSE_ROW = "dsa", "dense"


def local_budgets(topk: int, ranks: int, rule: int, steps: int = 6) -> list[int]:
    """Values of m, ascending: ``steps`` from ``ceil(topk / ranks)`` to ``topk``, evenly spaced by factor, and the rule's own.

    Raises:
        ThresherError: fewer than two steps.
    """
    require(steps >= 2, "steps must be at least 2", steps, "name both ends")
    least = -(-topk // ranks)
    return sorted({rule, *(round(least * (topk / least) ** (step / (steps - 1))) for step in range(steps))})


def error_methods(topk: int, ranks: int, budgets: list[int]) -> dict[str, OverRanks]:
    """``dense``, ``dsa`` and, for each m, ``m=...``: the same selector over ranks."""
    local = {f"m={m}": IDSA(DSA(topk), ranks, m) for m in budgets}
    return {DENSE_ROW: Single(Dense()), DSA_ROW: Single(DSA(topk)), **local}


@dataclass
class OutputError:
    """Collects, layer by layer, how far each method's attention output is from DSA's and from dense attention's.

    Every method sees the inputs of one dense pass, so that a layer's error is its own and none is carried on.

    Attributes:
        methods: name -> what picks the tokens, ``dsa`` and ``dense`` among them.
        from_dsa: name -> per layer, the relative L2 error against DSA, ``|o - o_dsa| / |o_dsa|`` over all heads, mean over queries.
        from_dense: the same against dense attention.
        tokens: name -> per layer, tokens attended to, mean over queries.
        following: name -> int64 ``[T]``, the most likely token after each of the last ones (``next_tokens``).
    """

    methods: Mapping[str, OverRanks]
    from_dsa: dict[str, list[float]] = field(default_factory=dict)
    from_dense: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, list[float]] = field(default_factory=dict)
    following: dict[str, Tensor] = field(default_factory=dict)

    def look(self, given: LayerInput, query: IndexQuery, keys: IndexKeys) -> None:
        """Attend with every method.

        Args:
            given: a layer's input of a whole context, from position 0.
            query: the index queries of its last tokens.
            keys: the index keys of all its tokens, as request 0.
        """
        q = given.q[-query.num_queries :]
        outputs: dict[str, Tensor] = {}
        for name, method in self.methods.items():
            picked = method.select(query, keys)  # type: ignore[attr-defined]
            # The keys of the context stand in the order of their positions: a logical position is a slot.
            outputs[name] = sparse_attend(q, given.k, given.v, picked.indices, q.shape[-1] ** -0.5).out
            self.tokens.setdefault(name, []).append(float(picked.lengths.double().mean()))
        for name, out in outputs.items():
            self.from_dsa.setdefault(name, []).append(relative_error(out, outputs[DSA_ROW]))
            self.from_dense.setdefault(name, []).append(relative_error(out, outputs[DENSE_ROW]))

    def agreeing(self, name: str, of: str) -> int:
        """How many of a method's next tokens are those of another."""
        return int((self.following[name] == self.following[of]).sum())


def relative_error(out: Tensor, of: Tensor) -> float:
    """Mean over queries of ``|out - of| / |of|``, both ``[Q, N, Dv]``, the norm over all heads."""
    size = of.double().flatten(1).norm(dim=1)
    return float(((out.double() - of.double()).flatten(1).norm(dim=1) / size.clamp_min(torch.finfo(torch.float64).tiny)).mean())


def next_tokens(
    decoder: Decoder, ids: Tensor, methods: Mapping[str, OverRanks], done: Callable[[], object] = lambda: None
) -> dict[str, Tensor]:
    """The most likely token after each of the last ones, under each method in every layer.

    Args:
        decoder: a one-rank decoder that holds the context before ``ids``, and is left so.
        ids: int64 ``[T]``, read in one step by each method in turn.
        methods: name -> what picks the tokens.
        done: called after each method.

    Returns:
        name -> int64 ``[T]``.
    """
    dealt: dict[Placement, Decoder] = {decoder.placement: decoder}
    start = decoder.length
    out = {}
    for name, method in methods.items():
        place = method.placement
        if place not in dealt:
            dealt[place] = decoder.dealt(place)
        runner = dealt[place]
        out[name] = runner.step(ids, [method] * len(runner.layers)).argmax(-1)
        runner.rollback(start)
        done()
    return out
