"""The check that comes before any time: some rows of a run against the reference on a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from thresher.bench.inputs import SCALE, AttendInputs, Inputs
from thresher.bench.work import Work, store_tokens
from thresher.cache import IndexKeyCache, LatentCache
from thresher.cache.fp8 import dequantize_fp8
from thresher.cache.index_keys import planes, visible_counts
from thresher.cache.latents import decode_records
from thresher.ops import keep_best, paged_index_score, select_topk, sparse_attend_mla, sparse_attend_mla_fp8, to_slots
from thresher.ops.dispatch import using
from thresher.types import IndexKeys, IndexQuery, PartialAttention, Selection

ROWS = 4
SIMILARITY, ROUNDED = 5e-6, 2e-5
# Bits that a matrix unit keeps of an FP8 dot product (docs/numerics.md).
BITS = {"cuda": 14, "cpu": 24}
# Share of a row's tokens that may differ. The bound on scores alone is too wide to tell a good kernel from a poor one.
ODD_SHARE = 0.01
STORED = 2e-3  # of the length of vectors, a few of whose dims are rounded to the next FP8 value


def check_work(work: Work) -> str | None:
    """Why a run is wrong, in one line, or None: rows spread over the case agree with the reference, and a second run has the same bits."""
    got = _seen(work, work.run())
    if not same_bits(got, _seen(work, work.run())):
        return "a second run gives other bits"
    rows = sample_rows(work.case.rows)
    with using("reference"):
        if work.op == "select_topk":
            assert work.scores is not None
            return _same_selection(_rows(got, rows), select_topk(work.scores[rows].cpu(), work.case.topk))
        if work.op == "keep_best":
            assert work.proposed is not None
            scores, positions = (x[:, rows].cpu() for x in work.proposed)
            return _same_selection(_rows(got, rows), keep_best(scores, positions, 0, work.case.topk))
        if work.op == "store":
            return _stores(work, got)
        if work.op == "to_slots":
            assert work.index is not None
            assert work.picked is not None
            return None if torch.equal(got.cpu(), _slots(work.picked, work.index)) else "slots are not the reference's"
        if work.op in ("sparse_attend_mla", "sparse_attend_mla_fp8"):
            assert work.attend is not None
            assert work.attend.slots is not None
            return attention_agrees(work.attend, _rows(got, rows), rows, work.attend.slots[rows])
        assert work.index is not None
        query, keys = rows_to_cpu(work.index.query, work.index.keys, rows)
        if work.op == "index_score":
            return scores_agree(_rows(got, rows), paged_index_score(query, keys))
        assert work.selector is not None
        picked = got
        if work.op == "layer":  # its attention is checked on its own selection, and that selection like any other
            picked = replace(work, op="select").run()
            assert work.attend is not None
            slots = _slots(picked, work.index)
            if picked.slots is not None and not torch.equal(picked.slots.cpu(), slots):
                return "slots are not the reference's"
            why = attention_agrees(work.attend, _rows(got, rows), rows, slots[rows].to(work.device))
            if why is not None:
                return why
        with using(work.impl):  # with scores, which the timed run does not make: they excuse near-ties
            scored = work.selector.select(work.index.query, work.index.keys, work.state)
        if not same_bits(picked, scored):
            return "beside scores other tokens are selected"
        picked, want = scored, work.selector.select(query, keys)
        bits = BITS["cuda" if work.index.query.q.is_cuda else "cpu"]
        return selections_agree(_rows(picked, rows), want, score_bound(query, keys, bits), query, keys)


def _slots(picked: Selection, index: Inputs) -> Tensor:
    """The reference's, on a CPU."""
    keys, requests = index.keys, index.query.requests
    return to_slots(picked.indices.cpu(), keys.page_table.cpu(), requests.cpu(), keys.page_size)


def _stores(work: Work, got: IndexQuery) -> str | None:
    """Why a layer's new tokens are not stored as the reference does on a CPU, or None. Roundings of RoPE may differ by a last place."""
    assert work.index is not None
    assert work.attend is not None
    assert work.tokens is not None
    slots, pages, num = work.tokens.slots, work.index.keys.pages, len(work.tokens.slots)
    at = torch.arange(num)
    tokens = replace(work.tokens, **{name: x.cpu() for name, x in vars(work.tokens).items()} | {"slots": at})
    keys, latents = IndexKeyCache(-(-num // 64), pages.shape[3] - 4), LatentCache(-(-num // 64))
    on_cpu = IndexQuery(*(x.cpu() for x in vars(work.index.query).values()))
    index = Inputs(on_cpu, keys.view(torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)))
    want = store_tokens(tokens, index, replace(work.attend, latents=latents.data))
    pairs = {
        "keys": (_keys_at(pages, slots), _keys_at(keys.pages, at)),
        "latents": (_latents_at(work.attend.latents, slots), _latents_at(latents.data, at)),
        "queries": tuple(q.q.cpu().float() * q.weights.cpu()[..., None] for q in (got, want)),
    }
    for name, (x, y) in pairs.items():
        off = float((x - y).norm() / y.norm())
        if not off <= STORED:
            return f"{name} are off by {off:.2g} of their length, over {STORED:.2g}"
    return None


def _keys_at(pages: Tensor, slots: Tensor) -> Tensor:
    """fp32 ``[n, D]``, on a CPU: the index keys in these slots."""
    values, scales = (plane.flatten(0, 1) for plane in planes(pages))
    return dequantize_fp8(values.view(torch.uint8)[slots].view(values.dtype).cpu(), scales[slots].cpu())


def _latents_at(data: Tensor, slots: Tensor) -> Tensor:
    """fp32 ``[n, 576]``, on a CPU: the latents in these slots."""
    return decode_records(data.flatten(0, 2)[slots].cpu())


def _seen(work: Work, got: Any) -> Any:
    """A run's result; where scores were left unfilled, what a row does not see is -inf."""
    if work.op != "index_score" or work.contiguous is not None:
        return got
    assert work.index is not None
    visible = visible_counts(work.index.query, work.index.keys)
    return got.masked_fill(torch.arange(got.shape[1], device=got.device) >= visible[:, None], -torch.inf)


def sample_rows(num: int) -> Tensor:
    """int64, at most ``ROWS`` of them: the first, the last and some between."""
    return torch.linspace(0, num - 1, min(num, ROWS)).round().long().unique()


def rows_of(query: IndexQuery, keys: IndexKeys, rows: Tensor) -> tuple[IndexQuery, IndexKeys]:
    """Some queries with only the pages of their requests."""
    some = query.rows(rows.to(query.q.device))
    requests, renumbered = some.requests.unique(return_inverse=True)
    table = keys.page_table[requests]
    pages, place = table.clamp(min=0).unique(return_inverse=True)
    few = IndexKeys(keys.pages[pages], place.int().masked_fill(table < 0, -1), keys.lengths[requests])
    return replace(some, requests=renumbered), few


def rows_to_cpu(query: IndexQuery, keys: IndexKeys, rows: Tensor) -> tuple[IndexQuery, IndexKeys]:
    """``rows_of``, on a CPU."""
    some, few = rows_of(query, keys, rows)
    return IndexQuery(*(x.cpu() for x in vars(some).values())), IndexKeys(*(x.cpu() for x in vars(few).values()))


def score_bound(query: IndexQuery, keys: IndexKeys, bits: int) -> Tensor:
    """fp64 ``[Q]``: e of docs/numerics.md, how far a kernel's score may be from the reference's, for dot products kept to ``bits`` bits."""
    pages = keys.pages.clone()
    planes(pages)[0].view(torch.uint8).bitwise_and_(0x7F)
    size = replace(query, q=query.q.float().abs(), weights=query.weights.abs())
    largest = paged_index_score(size, replace(keys, pages=pages)).amax(1).clamp(min=0).double()
    u, v, n = 2.0**-24, 2.0 ** (1 - bits), 2 * query.q.shape[2]
    delta, gamma = n * v / (1 - n * v), query.num_heads * u / (1 - query.num_heads * u)
    return (delta + u + gamma * (2 + delta + u)) * largest


def selections_agree(got: Selection, want: Selection, bound: Tensor, query: IndexQuery, keys: IndexKeys) -> str | None:
    """Why two selections of the same selector do not agree as docs/numerics.md defines it, or None.

    Args:
        got: Q rows, on a CPU, with its own scores.
        want: the reference's rows.
        bound: ``[Q]``, e of each row.
        query, keys: what was selected from.
    """
    if got.indices.shape != want.indices.shape:
        return f"the selection is {tuple(got.indices.shape)}, not {tuple(want.indices.shape)}"
    visible = torch.minimum(query.positions + 1, keys.lengths[query.requests])
    for row in range(len(got.indices)):
        mine = got.indices[row].tolist()
        kept = [p for p in mine if p >= 0]
        if mine != sorted(set(kept)) + [-1] * (len(mine) - len(kept)) or int(got.lengths[row]) != len(kept):
            return f"row {row}: not ascending, distinct and -1 padded with the right length"
        if kept and kept[-1] >= int(visible[row]):
            return f"row {row}: position {kept[-1]} is out of sight"
        theirs = [p for p in want.indices[row].tolist() if p >= 0]
        if len(kept) != len(theirs):
            return f"row {row}: {len(kept)} tokens, not {len(theirs)}"
        odd = len(set(kept) - set(theirs))
        if odd > max(1, int(ODD_SHARE * len(theirs))):
            return f"row {row}: {odd} of {len(theirs)} tokens differ"
        if odd and (got.scores is None or want.scores is None):
            return f"row {row}: {odd} tokens differ, and no scores to excuse it"
        if odd:
            far = _farthest(got, want, row, set(theirs) - set(kept), set(kept) - set(theirs))
            if not far <= 3 * float(bound[row]):
                return f"row {row}: a token that differs scores {far:.3g} from the k-th, over {3 * float(bound[row]):.3g}"
    return None


def _farthest(got: Selection, want: Selection, row: int, lost: set[int], extra: set[int]) -> float:
    """The largest distance from the reference's k-th score, each token by the score its own side gives it (so one e more than 2e)."""
    assert got.scores is not None
    assert want.scores is not None
    kth = float(want.scores[row][want.indices[row] >= 0].min())
    pairs = [(want, lost), (got, extra)]
    return max(
        abs(float(side.scores[row, column]) - kth)  # type: ignore[index]
        for side, tokens in pairs
        for column, token in enumerate(side.indices[row].tolist())
        if token in tokens
    )


def _same_selection(got: Selection, want: Selection) -> str | None:
    same = torch.equal(got.indices, want.indices) and torch.equal(got.lengths, want.lengths)
    return None if same else "the selection is not the reference's on the same scores"


def scores_agree(got: Tensor, want: Tensor, similarity: float = SIMILARITY) -> str | None:
    """Why scores differ from the reference's of the same rows, or None."""
    width = max(got.shape[1], want.shape[1])
    got, want = (torch.nn.functional.pad(x, (0, width - x.shape[1]), value=-torch.inf) for x in (got, want))
    if not torch.equal(got == -torch.inf, want == -torch.inf):
        return "other keys are masked than the reference masks"
    x, y = (s.double().masked_fill(want == -torch.inf, 0.0).flatten() for s in (got, want))
    off = 1 - float(2 * (x @ y) / (x @ x + y @ y)) if bool(y.any()) else float(x.abs().max())
    return None if off <= similarity else f"scores are off by {off:.2g}, over {similarity:.2g}"


def attention_agrees(attend: AttendInputs, got: PartialAttention, rows: Tensor, slots: Tensor, rounded: bool = False) -> str | None:
    """Why rows of an attention differ from the reference's, or None, by FlashMLA's own tolerances: lse 8.01/65536 relative, and those of
    ``outputs_agree``.

    Args:
        attend: the queries and latents.
        got: those rows, on a CPU.
        rows: int64, which.
        slots: int32, theirs.
        rounded: as for ``outputs_agree``.
    """
    want = reference_attention(attend, rows, slots)
    if not torch.equal(got.lse == -torch.inf, want.lse == -torch.inf):
        return "other rows are empty than the reference's"
    full = want.lse != -torch.inf
    if not torch.allclose(got.lse[full], want.lse[full], rtol=8.01 / 65536, atol=1e-6):
        return f"lse is off by {float((got.lse[full] - want.lse[full]).abs().max()):.2g}"
    return outputs_agree(got.out, want.out, rounded)


def reference_attention(attend: AttendInputs, rows: Tensor, slots: Tensor) -> PartialAttention:
    """Rows of an attention by the reference, on a CPU; arguments as for ``attention_agrees``."""
    used, place = slots.clamp(min=0).long().unique(return_inverse=True)
    local = place.int().masked_fill(slots < 0, -1).cpu()
    q, held = attend.q[rows.to(slots.device)].cpu(), attend.latents
    if held.dtype == torch.uint8:
        tokens = held.flatten(0, 1)[used].cpu()
        return sparse_attend_mla_fp8(q, tokens[:, None], local, SCALE, impl="reference")
    return sparse_attend_mla(q, held[used].cpu(), local, SCALE, impl="reference")


def outputs_agree(got: Tensor, want: Tensor, rounded: bool = False) -> str | None:
    """Why outputs ``[Q, N, D]`` differ, or None: by 1e-3 and 2.01/128 of a value, and over all of them 5e-6 of cosine.

    Where ranks' parts are ``rounded`` to bf16, weighted, and once more in their sum, by 1/128 of a head's largest value, not 1e-3, since
    parts may be that much larger than their sum, and by 2e-5.
    """
    similarity, near = (ROUNDED, want.abs().amax(-1, keepdim=True) / 128) if rounded else (SIMILARITY, 1e-3)
    if not bool(((got - want).abs() <= near + 2.01 / 128 * want.abs()).all()):
        return f"outputs are off by {float((got - want).abs().max()):.2g}"
    x, y = got.double().flatten(), want.double().flatten()
    off = 1 - float(2 * (x @ y) / (x @ x + y @ y).clamp(min=1e-30)) if bool(y.any()) else 0.0
    return None if off <= similarity else f"outputs are off by {off:.2g} of cosine, over {similarity:.2g}"


def _rows(result: Any, rows: Tensor) -> Any:
    """The rows of a result, on a CPU."""
    if isinstance(result, Tensor):
        return result[rows.to(result.device)].cpu()
    if isinstance(result, PartialAttention):
        return PartialAttention(_rows(result.out, rows), _rows(result.lse, rows))
    scores = None if result.scores is None else _rows(result.scores, rows)
    return Selection(_rows(result.indices, rows), _rows(result.lengths, rows), result.space, scores)


def same_bits(one: Any, two: Any) -> bool:
    """Whether two results of a run are the same, bit for bit."""
    if isinstance(one, Tensor):
        bits = {torch.float32: torch.int32, torch.float8_e4m3fn: torch.uint8}.get(one.dtype, one.dtype)
        return torch.equal(one.view(bits), two.view(bits))
    names = {PartialAttention: ("out", "lse"), IndexQuery: ("q", "weights"), Selection: ("indices", "lengths")}[type(one)]
    return all(same_bits(getattr(one, name), getattr(two, name)) for name in names)
