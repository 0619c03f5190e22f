"""What a case must do at least, and how long that takes at the card's measured ceilings."""

from __future__ import annotations

from dataclasses import dataclass

from thresher.bench.cases import Case
from thresher.selectors.base import Selector

LATENT_DIM, VALUE_DIM = 576, 512
# op that attends -> bytes of one token in its latent cache (docs/formats.md).
LATENT_BYTES = {"sparse_attend_mla_fp8": 656, "sparse_attend_mla": 1152, "layer": 1152}


@dataclass(frozen=True)
class Ceiling:
    """Measured on the card, not from its data sheet: bytes a second (copy, read plus write) and FLOPs a second of matrix products."""

    copy: float
    fp8: float
    bf16: float


# Part of the device's name -> its ceilings. A card that is not here gets no floor.
CEILINGS = {"H200": Ceiling(copy=4.27e12, fp8=1331e12, bf16=729e12)}


def useful_work(case: Case, op: str, selector: Selector | None, lengths: list[int]) -> tuple[float, float]:
    """``(flops, bytes)`` of one run: what the method's definition asks for, each byte moved once.

    Args:
        case: the case.
        op: "select", "index_score", "select_topk", "sparse_attend_mla_fp8", "sparse_attend_mla" or "layer".
        selector: of "select" and "layer".
        lengths: ``case.lengths(seed)``.
    """
    flops = moved = 0.0
    if op in ("select", "index_score", "layer"):
        add = _index_work(case, selector, lengths)
        flops, moved = flops + add[0], moved + add[1]
    if op in ("index_score", "select_topk"):  # the scores between the two, written or read
        moved += 4.0 * sum(_contexts(case, lengths))
    if op in ("select", "select_topk", "layer"):
        moved += 4.0 * case.rows * case.topk
    if op in LATENT_BYTES:
        tokens = sum(min(case.topk, length) for length in _contexts(case, lengths))
        flops += 2.0 * case.attention_heads * (LATENT_DIM + VALUE_DIM) * tokens
        moved += float(LATENT_BYTES[op] * tokens + case.rows * case.attention_heads * (2 * LATENT_DIM + 4 * VALUE_DIM + 4))
    return flops, moved


def floor_us(gpu: str, op: str, flops: float, moved: float) -> float | None:
    """The longer of bytes over copy bandwidth and FLOPs over peak, in microseconds; None for a card without measured ceilings."""
    for part, ceiling in CEILINGS.items():
        if part in gpu:
            peak = ceiling.bf16 if op in LATENT_BYTES else ceiling.fp8
            return 1e6 * max(moved / ceiling.copy, flops / peak)
    return None


def _contexts(case: Case, lengths: list[int]) -> list[int]:
    """Tokens that each row sees."""
    return [lengths[0] - case.rows + 1 + row for row in range(case.rows)] if case.kind == "prefill" else lengths


def _index_work(case: Case, selector: Selector | None, lengths: list[int]) -> tuple[float, float]:
    """Of the indexer: a selector's own count, or every key with every head. The rows of a prefill share what they read."""
    heads, dim = case.heads, case.head_dim
    seen = _contexts(case, lengths)
    if selector is None:
        flops, moved = 2.0 * heads * dim * sum(seen), float((dim + 4) * sum(lengths))
    else:
        flops = sum(selector.index_flops(length, heads, dim) for length in seen)
        moved = sum(selector.index_bytes(length, heads, dim) for length in lengths)
    return flops, moved + case.rows * heads * (dim + 4)
