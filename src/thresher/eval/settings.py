"""The ways of choosing tokens that the demo and the training record compare, at the sizes the context asks for.

Budgets grow with the context, so that nothing equals DSA by construction: at 7680 tokens HISA and MISA-dagger look at a quarter of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from thresher.distributed import IDSA, Single
from thresher.distributed.simulate import OverRanks
from thresher.selectors import DSA, HISA, MISA, Dense, MISARandom, MISARerank, MISAStatic, Oracle, Random
from thresher.selectors.base import Selector
from thresher.selectors.parse import to_text

TOPK = 512
RANKS = 4
ACTIVE_HEADS = 8
RERANK_HEADS = 4
MISA_BLOCK = 64
HISA_BLOCK = 8


def candidates(length: int) -> int:
    """Tokens that HISA and MISA-dagger re-score: a quarter of the context, but at least ``2 * TOPK``; a multiple of 64."""
    return max(length // 4 // 64 * 64, 2 * TOPK)


def methods(length: int, head_weights: Sequence[Sequence[float]]) -> dict[str, list[OverRanks]]:
    """Name -> one placed selector a layer, in the order they are shown; ``dsa`` comes first after ``dense``.

    Args:
        length: tokens of context.
        head_weights: per layer and head, the mean absolute weight over held-out text (the record's ``head_weights``), which decides the
            heads of ``misa_static``.
    """
    num_layers = len(head_weights)
    local = IDSA(DSA(TOPK), RANKS)
    wide = local.width
    assert wide is not None
    everywhere: dict[str, Selector] = {
        "dense": Dense(),
        "dsa": DSA(TOPK),
        "misa": MISA(ACTIVE_HEADS, MISA_BLOCK, TOPK),
        "misa_rerank": MISARerank(RERANK_HEADS, MISA_BLOCK, candidates(length), TOPK),
        "hisa": HISA(HISA_BLOCK, candidates(length) // HISA_BLOCK, TOPK),
        "random": Random(TOPK),
        "dsa_wide": DSA(wide),
        "misa_random": MISARandom(ACTIVE_HEADS, topk=TOPK),
        "oracle": Oracle(TOPK),
    }
    out: dict[str, list[OverRanks]] = {name: [Single(selector)] * num_layers for name, selector in everywhere.items()}
    out["idsa"] = [local] * num_layers
    out["misa_static"] = [Single(MISAStatic(heaviest(weights, ACTIVE_HEADS), TOPK)) for weights in head_weights]
    order = ("dense", "dsa", "misa", "misa_rerank", "hisa", "idsa", "random", "dsa_wide", "misa_static", "misa_random", "oracle")
    return {name: out[name] for name in order}


def heaviest(weights: Sequence[float], count: int) -> tuple[int, ...]:
    """The ``count`` heads of the largest weight, ties to the smaller head, ascending."""
    return tuple(sorted(sorted(range(len(weights)), key=lambda head: (-weights[head], head))[:count]))


def describe(plan: Sequence[OverRanks]) -> str | list[str]:
    """A plan as text: one line where every layer has the same method, else one a layer."""
    texts = [_text(method) for method in plan]
    return texts[0] if len(set(texts)) == 1 else texts


def _text(method: OverRanks) -> str:
    inner = to_text(method.selector)
    return (
        inner
        if isinstance(method, Single)
        else f"{inner} @ idsa:ranks={method.placement.ranks},local_topk={(method.width or 0) // method.placement.ranks}"
    )
