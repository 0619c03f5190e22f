"""A small paged decoder: one request of a Llama with DSA, on one device or over ranks, simulated or processes of their own.

The context is prefilled densely; what follows runs under a plan that says, layer by layer, which tokens are attended to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from thresher.cache.index_keys import IndexKeyCache, load_keys
from thresher.cache.kv import KVCache
from thresher.cache.pages import PageTable
from thresher.cache.placement import Placement
from thresher.cache.state import LayerState
from thresher.distributed.collectives import Collectives, check_ranks, own_heads, share_heads
from thresher.distributed.ranks import run_on_rank
from thresher.distributed.shards import Shard
from thresher.distributed.simulate import OverRanks, run
from thresher.errors import require
from thresher.models.indexer import indexer_at
from thresher.models.llama import LayerInput, Llama, causal_attention
from thresher.ops import sparse_attend
from thresher.types import AttentionInputs, IndexKeys, IndexQuery, PartialAttention, Selection

PAGE_SIZE = 64


class Observer(Protocol):
    """Looks on at each layer of a step, changing nothing (see ``thresher.eval.probe``)."""

    def look(self, layer: int, query: IndexQuery, keys: IndexKeys, attention: AttentionInputs, state: LayerState | None = None) -> None: ...


@dataclass
class RankLayer:
    """One rank's piece of one layer: where its tokens lie, index keys, attention keys and values, and what selectors keep."""

    rank: int
    table: PageTable
    index: IndexKeyCache
    kv: KVCache
    state: LayerState


class Decoder:
    """One request and its caches.

    Args:
        model: the dense model.
        indexers: one ``Indexer`` a layer.
        placement: where tokens live.
        capacity: tokens the request may reach; the model's own limit if None.
        ranks: the ranks, of which this process is one and holds one's tokens alone; None to simulate all of them.
    """

    def __init__(
        self,
        model: Llama,
        indexers: nn.ModuleList,
        placement: Placement | None = None,
        capacity: int | None = None,
        ranks: Collectives | None = None,
    ) -> None:
        config = model.config
        capacity = capacity or config.max_position_embeddings
        self.model, self.indexers, self.capacity = model, indexers, capacity
        self.placement, self.ranks = placement or Placement(1), ranks
        if ranks is not None:
            check_ranks(self.placement.ranks, ranks)
        self.length = 0
        per_rank = int(self.placement.local_length(torch.tensor([capacity]), 0)[0])
        pages = -(-per_rank // PAGE_SIZE)
        held = range(self.placement.ranks) if ranks is None else [ranks.rank]
        self.tables = {rank: PageTable(1, pages, PAGE_SIZE, model.device) for rank in held}
        selections: dict[int, dict[int, Selection]] = {rank: {} for rank in held}
        self.shares = share_heads(config.num_key_value_heads, self.placement.ranks)
        dim = indexer_at(indexers, 0).config.head_dim
        self.layers = [
            [
                RankLayer(
                    rank,
                    self.tables[rank],
                    IndexKeyCache(pages, dim, PAGE_SIZE, model.device),
                    KVCache(pages, config.num_key_value_heads, config.head_dim, config.head_dim, model.dtype, PAGE_SIZE, model.device),
                    LayerState(layer, selections[rank]),
                )
                for rank in held
            ]
            for layer in range(config.num_hidden_layers)
        ]

    def prefill(self, ids: Tensor) -> Tensor:
        """Run a whole context densely and fill the caches.

        Args:
            ids: int64 ``[T]``, the request's first tokens.

        Returns:
            fp32 ``[vocab]``: logits after the last token.

        Raises:
            ThresherError: the request has tokens already, or the context is empty or longer than the capacity.
        """
        require(self.length == 0, "prefill starts a request", f"{self.length} tokens held", "call rollback(0) first")
        require(len(ids) > 0, "the context must hold a token", 0, "pass a text")

        def attend(given: LayerInput, slots: dict[int, Tensor]) -> Tensor:
            self._store(given, slots)
            return causal_attention(given)

        return self.model.logits(self._grow(ids, attend)[-1])

    def step(self, ids: Tensor, plan: Sequence[OverRanks], observer: Observer | None = None) -> Tensor:
        """Run T further tokens, each attending to what ``plan[layer]`` picks for it.

        Args:
            ids: int64 ``[T]``.
            plan: per layer, a placement (``Single``, ``Replicated``, ``IDSA``, ``ExactMerge``) around a selector, made for this decoder's
                ranks.
            observer: looks on at each layer (one rank only).

        Returns:
            fp32 ``[T, vocab]`` logits.
        """
        require(len(plan) == len(self.layers), f"the plan must name {len(self.layers)} layers", len(plan), "use LayerPlan.uniform")
        for method in plan:
            same = method.placement == self.placement
            require(same, f"the plan's placement must be the decoder's, {self.placement}", method.placement, "make the decoder for it")
        for piece in self.layers[0]:
            piece.state.selections.clear()  # one dict serves all layers of a rank

        def attend(given: LayerInput, slots: dict[int, Tensor]) -> Tensor:
            self._store(given, slots)
            query = indexer_at(self.indexers, given.layer).index_query(given.hidden, given.positions)
            load_keys = self._whole_keys(given.layer) if self.ranks is None else self._own_keys(given.layer)
            attention = AttentionInputs(given.q, load_keys, given.q.shape[-1] ** -0.5)
            if observer is not None:
                piece = self.layers[given.layer][0]
                observer.look(given.layer, query, self._keys(piece), attention, piece.state)
            shards = self._shards(given)
            if self.ranks is None:
                part, _ = run(plan[given.layer], query, shards, attention)
            else:
                (own,), alike = shards, given.q.shape[1] // given.k.shape[1]
                part, _ = run_on_rank(plan[given.layer], query, own, self.ranks, [alike * share for share in self.shares], attention)
            return part.out

        return self.model.logits(self._grow(ids, attend))

    def generate(self, ids: Tensor, plan: Sequence[OverRanks], max_tokens: int, observer: Observer | None = None) -> Iterator[int]:
        """Run ``ids [T]``, the ``observer`` looking on, and then decode greedily.

        Yields token ids until the end-of-sequence token or ``max_tokens`` of them.
        """
        logits = self.step(ids, plan, observer)[-1]
        for count in range(max_tokens):
            token = int(logits.argmax())
            if token == self.model.config.eos_token_id:
                return
            yield token
            if count + 1 < max_tokens:
                logits = self.step(torch.tensor([token], device=ids.device), plan)[-1]

    def rollback(self, length: int) -> None:
        """Forget every token past the first ``length``."""
        require(0 <= length <= self.length, f"rollback length must lie in [0, {self.length}]", length, "use step to grow")
        for rank, table in self.tables.items():
            table.rollback(0, self._local_length(length, rank))
        for layer in self.layers:
            for piece in layer:
                piece.state.rollback(0, self._local_length(length, piece.rank))
        self.length = length

    def dealt(self, placement: Placement) -> Decoder:
        """A copy of this one-rank decoder with its tokens dealt over ``placement``'s ranks."""
        require(self.placement.ranks == 1, "only a one-rank decoder can be dealt out", self.placement.ranks, "start from one rank")
        other = Decoder(self.model, self.indexers, placement, self.capacity)
        slots = other._append(self.length)
        every = torch.arange(self.length, device=self.model.device)
        source = self.tables[0].slots(0, every)
        for layer, (mine,) in enumerate(self.layers):
            values, scales = load_keys(self._keys(mine), 0)
            other._store_tokens(layer, slots, every, values, scales, mine.kv.k[source], mine.kv.v[source])
        return other

    def _grow(self, ids: Tensor, attend: Callable[[LayerInput, dict[int, Tensor]], Tensor]) -> Tensor:
        """Hidden states ``[T, hidden]`` of the next T tokens; ``attend`` also gets their slots. A failure leaves nothing behind."""
        start = self.length
        slots = self._append(len(ids))
        try:
            return self.model(ids, torch.arange(start, self.length, device=ids.device), lambda given: attend(given, slots))
        except BaseException:
            self.rollback(start)
            raise

    def _append(self, num_tokens: int) -> dict[int, Tensor]:
        """Slots of the next tokens on each rank that is here (each rank gets its own tokens only)."""
        end = self.length + num_tokens
        require(
            end <= self.capacity,
            f"the text must fit the model's {self.capacity} tokens",
            f"{end} tokens",
            "shorten the prompt or generate less",
        )
        slots = {rank: table.append(0, self._local_length(end, rank) - table.length(0)) for rank, table in self.tables.items()}
        self.length = end
        return slots

    def _local_length(self, length: int, rank: int) -> int:
        return int(self.placement.local_length(torch.tensor([length]), rank)[0])

    def _store(self, given: LayerInput, slots: dict[int, Tensor]) -> None:
        values, scales = indexer_at(self.indexers, given.layer).index_keys(given.hidden, given.positions)
        self._store_tokens(given.layer, slots, given.positions, values, scales, given.k, given.v)

    def _store_tokens(
        self, layer: int, slots: dict[int, Tensor], positions: Tensor, values: Tensor, scales: Tensor, k: Tensor, v: Tensor
    ) -> None:
        for piece in self.layers[layer]:
            mine = slice(None) if self.placement.ranks == 1 else self.placement.holds(positions, piece.rank)
            piece.index.store(slots[piece.rank], values.view(torch.uint8)[mine].view(values.dtype), scales[mine])
            piece.kv.store(slots[piece.rank], k[mine], v[mine])

    def _keys(self, piece: RankLayer) -> IndexKeys:
        return piece.index.view(piece.table.table, piece.table.lengths)

    def _shards(self, given: LayerInput) -> list[Shard]:
        shards = []
        for piece in self.layers[given.layer]:

            def attend(picked: Selection, piece: RankLayer = piece) -> PartialAttention:
                piece.state.selections[piece.state.layer] = picked
                slots = piece.table.slots(0, picked.indices).to(torch.int32)
                q, k, v = self._heads(piece, given.q)
                if not q.shape[1]:  # more ranks than there are heads of keys
                    return PartialAttention(torch.zeros_like(q, dtype=torch.float32), torch.zeros_like(q[..., 0], dtype=torch.float32))
                return sparse_attend(q, k, v, slots, given.q.shape[-1] ** -0.5)

            shards.append(Shard(self._keys(piece), piece.state, attend))
        return shards

    def _heads(self, piece: RankLayer, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``q [T, N, D]``, keys and values of the heads that a rank attends for: all where it holds some of the tokens."""
        k, v = piece.kv.k, piece.kv.v
        if self.placement.kind != "replicated":
            return q, k, v
        own = own_heads(self.shares, piece.rank)
        return q.unflatten(1, (k.shape[1], -1))[:, own].flatten(1, 2), k[:, own], v[:, own]

    def _whole_keys(self, layer: int) -> Callable[[int], Tensor]:
        """``load_keys`` for ``AttentionInputs``: the request's attention keys in position order, from every rank."""

        def load(request: int) -> Tensor:
            every = torch.arange(self.length, device=self.model.device)
            local = self.placement.to_local(every)
            first = self.layers[layer][0].kv.k
            keys = first.new_empty(self.length, *first.shape[1:])
            for piece in self.layers[layer]:
                mine = self.placement.holds(every, piece.rank)
                keys[mine] = piece.kv.k[piece.table.slots(request, local[mine])]
            return keys

        return load

    def _own_keys(self, layer: int) -> Callable[[int], Tensor]:
        """The same of what this rank alone holds, in the order of local positions."""
        (piece,) = self.layers[layer]

        def load(request: int) -> Tensor:
            return piece.kv.k[piece.table.slots(request, torch.arange(piece.table.length(request), device=self.model.device))]

        return load
