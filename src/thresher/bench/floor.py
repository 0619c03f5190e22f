"""What a case must do at least, and how long that takes at ceilings measured on the card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch

from thresher.bench.cases import Case
from thresher.selectors.base import Selector

LATENT_DIM, VALUE_DIM = 576, 512
# op that attends -> bytes of one token in its latent cache (docs/formats.md).
LATENT_BYTES = {"sparse_attend_mla_fp8": 656, "sparse_attend_mla": 1152, "layer": 656}


COPIED = 2**30  # bytes
SIDE = 8192  # of a square product
WARM_UPS, SAMPLES = 10, 21


@dataclass(frozen=True)
class Ceilings:
    """What a card does in large library calls: bytes a second of a copy (read plus write), FLOPs a second of matrix products."""

    copy: float
    fp8: float
    bf16: float


@cache
def measure_ceilings(device: torch.device) -> Ceilings | None:
    """Measured once a process, at the clocks that the card keeps under such work (medians); None without FP8 matrix units."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return None
    source, target = (torch.empty(COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    a, b = (torch.randn(SIDE, SIDE, device=device) for _ in range(2))
    wide, narrow, one = (a.bfloat16(), b.bfloat16()), (a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()), a.new_ones(())
    copied = _seconds(lambda: target.copy_(source))
    bf16 = _seconds(lambda: torch.mm(*wide))
    fp8 = _seconds(lambda: torch._scaled_mm(*narrow, one, one, out_dtype=torch.bfloat16, use_fast_accum=True))
    return Ceilings(copy=2 * COPIED / copied, fp8=2 * SIDE**3 / fp8, bf16=2 * SIDE**3 / bf16)


def _seconds(run: Callable[[], object]) -> float:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(SAMPLES + 1)]
    for _ in range(WARM_UPS):
        run()
    for event in events:
        event.record()
        run()
    events[-1].synchronize()
    took = sorted(first.elapsed_time(second) for first, second in pairwise(events))
    return 1e-3 * took[len(took) // 2]


def useful_work(case: Case, op: str, selector: Selector | None, lengths: list[int]) -> tuple[float, float]:
    """``(flops, bytes)`` of one run: what the method's definition asks for, each byte moved once.

    Args:
        case: the case.
        op: a key of ``OPS``.
        selector: of "select" and of layers.
        lengths: ``case.lengths(seed)``.
    """
    flops = moved = 0.0
    if op in ("select", "index_score", "layer"):
        add = _index_work(case, selector, lengths, 0 if op == "index_score" else case.topk)
        flops, moved = flops + add[0], moved + add[1]
    if op in ("index_score", "select_topk"):  # the scores between the two, written or read
        moved += 4.0 * sum(_contexts(case, lengths))
    if op == "keep_best":  # all ranks' scores and positions read, one's own tokens and their scores written
        moved += 8.0 * sum(_contexts(case, lengths)) + 8.0 * case.rows * case.topk
    if op in ("select", "select_topk", "layer"):
        moved += 4.0 * case.rows * case.topk
    if op in ("store", "layer"):  # bf16 read, FP8 written; a layer reads the query again
        key, query = case.head_dim, case.heads * case.head_dim
        moved += float(case.rows * (2 * (key + LATENT_DIM + query + case.heads) + key + 4 + LATENT_BYTES["layer"] + query + 4 * case.heads))
    if op == "to_slots":
        moved += 8.0 * case.rows * case.topk
    if op in LATENT_BYTES:
        tokens = sum(min(case.topk, length) for length in _contexts(case, lengths))
        flops += 2.0 * case.attention_heads * (LATENT_DIM + VALUE_DIM) * tokens
        moved += float(LATENT_BYTES[op] * tokens + case.rows * case.attention_heads * (2 * LATENT_DIM + 4 * VALUE_DIM + 4))
    return flops, moved


def floor_us(ceilings: Ceilings | None, op: str, flops: float, moved: float) -> float | None:
    """The longer of bytes over copy bandwidth and FLOPs over peak, in microseconds; None without ceilings."""
    if ceilings is None:
        return None
    return 1e6 * max(moved / ceilings.copy, flops / (ceilings.bf16 if op in LATENT_BYTES else ceilings.fp8))


def _contexts(case: Case, lengths: list[int]) -> list[int]:
    """Tokens that each row sees."""
    return [length - case.each + 1 + row for length in lengths for row in range(case.each)]


def _index_work(case: Case, selector: Selector | None, lengths: list[int], whole: int) -> tuple[float, float]:
    """Of the indexer: a selector's own count, or every key with every head. The rows of a prefill share what they read. Contexts of up to
    ``whole`` tokens need no scores."""
    heads, dim = case.heads, case.head_dim
    seen = [length for length in _contexts(case, lengths) if length > whole]
    lengths = [length for length in lengths if length > whole]
    if selector is None:
        flops, moved = 2.0 * heads * dim * sum(seen), float((dim + 4) * sum(lengths))
    else:
        flops = sum(selector.index_flops(length, heads, dim) for length in seen)
        moved = sum(_bytes_read(case, selector, length) for length in lengths)
    return flops, moved + case.rows * heads * (dim + 4)


def _bytes_read(case: Case, selector: Selector, length: int) -> float:
    """Of one request's keys and block means: what a query reads, nothing twice. A prefill finds no means, and makes them of every key."""
    block = getattr(selector, "block_size", None)
    held = float((case.head_dim + 4) * (length + (0 if block is None else -(-length // block))))
    if block is not None and case.kind == "prefill":
        return held
    return min(selector.index_bytes(length, case.heads, case.head_dim), held)
