"""What one rank of a layer case holds: the whole context, or the tokens dealt to it; and how ranks fail together.

Every rank draws the same whole context from the seed and keeps its share. On CPUs one of them draws it for all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from thresher.bench.cases import Case
from thresher.bench.inputs import AttendInputs, Inputs, NewTokens, make_attend_inputs, make_inputs, make_new_tokens
from thresher.bench.work import store_tokens
from thresher.cache import IndexKeyCache, LatentCache, LayerState, PageTable, Placement
from thresher.cache.index_keys import planes
from thresher.distributed import IDSA, ExactMerge, Replicated, own_heads, share_heads
from thresher.distributed.collectives import Collectives
from thresher.errors import ThresherError
from thresher.ops import to_slots
from thresher.ops.dispatch import using
from thresher.selectors import DSA
from thresher.selectors.base import Selector
from thresher.types import IndexKeys, IndexQuery

# Ways to decode over ranks -> how their tokens are placed. Public ones do DSA's work whatever the selector.
PLACED = {"idsa": IDSA, "exact": ExactMerge, "replicated": Replicated, "public_exact": ExactMerge, "public_replicated": Replicated}
OURS = ("idsa", "exact", "replicated")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Held:
    """What a rank holds of one layer, and what a step adds to it.

    Attributes:
        index: the queries, of logical positions, and the keys that are held.
        attend: the queries of the rank's own heads, and the latents that are held, FP8.
        tokens: the new ones, with slots here; -1 for those of other ranks.
        positions: int64 ``[Q]``, the queries', counted among the tokens held: an engine finds them once a step for all layers.
    """

    index: Inputs
    attend: AttendInputs
    tokens: NewTokens
    positions: Tensor

    def local(self, query: IndexQuery) -> IndexQuery:
        """Queries as the keys held are asked them."""
        return replace(query, positions=self.positions)

    @property
    def cache_bytes(self) -> int:
        """Of index keys and latents."""
        return self.index.keys.pages.numel() + self.attend.latents.numel()


@dataclass(frozen=True)
class RankWork:
    """One copy of what a rank has to do in one way.

    Attributes:
        case: the case.
        way: a key of ``PLACED``.
        over: how tokens are placed, and the selector inside.
        impl: of every operation of ours.
        ranks: the ranks.
        held: what this one holds.
        state: what its selector finds from the steps before.
    """

    case: Case
    way: str
    over: IDSA | ExactMerge | Replicated
    impl: str
    ranks: Collectives
    held: Held
    state: LayerState

    @property
    def shares(self) -> list[int]:
        """Attention heads of each rank."""
        return share_heads(self.case.attention_heads, self.ranks.ranks)

    @property
    def dealt(self) -> bool:
        """Whether a token lies on one rank alone."""
        return self.over.placement.kind != "replicated"


def draw_whole(
    case: Case, impl: str, inputs: str, seed: int, device: torch.device, recorded: Path | None = None, copy: int = 0
) -> Held:
    """The whole context with the new tokens stored, and the queries of all heads; arguments as for ``make_work``."""
    index = make_inputs(case, inputs, seed, device, recorded, copy)
    attend = make_attend_inputs(case, seed, device, copy, fp8=True)
    tokens = make_new_tokens(case, index, seed, copy)
    with using(impl):
        query = store_tokens(tokens, index, attend)
    return Held(Inputs(query, index.keys), attend, tokens, query.positions)


def make_whole(
    case: Case, impl: str, inputs: str, seed: int, device: torch.device, ranks: Collectives, recorded: Path | None = None, copy: int = 0
) -> Held:
    """``draw_whole``, with the queries of the rank's own heads alone."""
    return _with_own_heads(draw_whole(case, impl, inputs, seed, device, recorded, copy), case, ranks)


def share_whole(
    case: Case, impl: str, inputs: str, seed: int, device: torch.device, ranks: Collectives, recorded: Path | None = None, copy: int = 0
) -> Held:
    """``make_whole`` on a CPU, whose memory ranks share: rank 0 draws it to a file that all map; a page that one writes becomes its own.

    All ranks call this together, on one host.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(tell(ranks, device, folder)[0]) / "whole.safetensors"
        draw = partial(draw_whole, case, impl, inputs, seed, device, recorded, copy)
        together(ranks, device, lambda: _write(draw(), file) if ranks.rank == 0 else None)
        whole = together(ranks, device, lambda: _map(file))
    return _with_own_heads(whole, case, ranks)


def _write(whole: Held, file: Path) -> None:
    from safetensors.torch import save_file

    parts = {"query": whole.index.query, "keys": whole.index.keys, "attend": whole.attend, "tokens": whole.tokens}
    named = {f"{part}.{name}": x for part, held in parts.items() for name, x in vars(held).items() if x is not None}
    save_file({name: x.contiguous() for name, x in named.items()}, file)


def _map(file: Path) -> Held:
    """What ``_write`` wrote, mapped rather than read."""
    from safetensors import safe_open

    parts: dict[str, dict[str, Any]] = {"query": {}, "keys": {}, "attend": {"slots": None}, "tokens": {}}
    with safe_open(file, framework="pt") as held:
        for name in held.keys():  # noqa: SIM118
            part, _, field = name.partition(".")
            parts[part][field] = held.get_tensor(name)
    query = IndexQuery(**parts["query"])
    return Held(Inputs(query, IndexKeys(**parts["keys"])), AttendInputs(**parts["attend"]), NewTokens(**parts["tokens"]), query.positions)


def _with_own_heads(whole: Held, case: Case, ranks: Collectives) -> Held:
    mine = own_heads(share_heads(case.attention_heads, ranks.ranks), ranks.rank)
    return replace(whole, attend=replace(whole.attend, q=whole.attend.q[:, mine].contiguous()))


def deal(whole: Held, placement: Placement, rank: int) -> Held:
    """The tokens of ``rank`` alone, in pages of their own, bits as they are."""
    query, keys, size = whole.index.query, whole.index.keys, whole.index.keys.page_size
    device, lengths = query.q.device, keys.lengths.cpu()
    counts = placement.local_length(lengths, rank).tolist()
    table = PageTable(len(counts), sum(-(-count // size) for count in counts), size, device)
    cache, latents = IndexKeyCache(table.num_pages, keys.head_dim, size, device), LatentCache(table.num_pages, size, device=device)
    values, scales = planes(keys.pages)
    for request, count in enumerate(counts):
        logical = placement.to_logical(rank, torch.arange(count, device=device))
        page, offset = keys.page_table[request, logical // size].long(), logical % size
        here = table.append(request, count)
        cache.store(here, values.view(torch.uint8)[page, offset].view(values.dtype), scales[page, offset])
        latents.data[here // size, here % size] = whole.attend.latents[page, offset]
    own = placement.to_local(query.positions).masked_fill(~placement.holds(query.positions, rank), -1)
    slots = to_slots(own[:, None].int(), table.table, query.requests, size)[:, 0].long()
    return Held(
        Inputs(query, cache.view(table.table, table.lengths)),
        replace(whole.attend, latents=latents.data),
        replace(whole.tokens, slots=slots),
        placement.local_end(query.positions, rank),
    )


def make_works(case: Case, ways: Sequence[str], selector: Selector, impl: str, ranks: Collectives, whole: Held) -> dict[str, RankWork]:
    """Way -> one copy of its work. Ways that place tokens alike share what they hold, but not their states."""
    held: dict[str, Held] = {"replicated": whole}
    works = {}
    for way in ways:
        over = PLACED[way](selector if way in OURS else DSA(topk=case.topk), ranks=ranks.ranks)
        kind = over.placement.kind
        if kind not in held:
            held[kind] = deal(whole, over.placement, ranks.rank)
        works[way] = RankWork(case, way, over, impl, ranks, held[kind], LayerState(0))
    return works


def together(group: Collectives, device: torch.device, do: Callable[[], Made]) -> Made:
    """Do something on every rank, or fail on all of them alike.

    Args:
        group: the ranks, which all call this.
        device: where it takes tensors.
        do: what to do; exchanges in it must fail on all ranks or on none.

    Raises:
        ThresherError: one line, where any rank could not; says which.
    """
    if group.ranks == 1:
        return do()
    made: list[Made] = []
    why = ""
    try:
        made.append(do())
    except Exception as error:  # whatever it is, the others wait to be told
        why = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    failed = {rank: text for rank, text in enumerate(tell(group, device, why)) if text}
    if failed:
        rank, text = next(iter(failed.items()))
        raise ThresherError(text if len(failed) == group.ranks else f"rank {rank} of {group.ranks}: {text}")
    return made[0]


def tell(group: Collectives, device: torch.device, text: str) -> list[str]:
    """Every rank's text, in rank order."""
    mine = text.encode()
    sizes = group.gather(torch.tensor([len(mine)], device=device)).flatten().tolist()
    padded = torch.tensor(list(mine.ljust(max(sizes), b" ")), dtype=torch.uint8, device=device)
    return [bytes(row[:size].tolist()).decode() for row, size in zip(group.gather(padded).cpu(), sizes, strict=True)]
