"""A small paged decoder: one request of a Llama with DSA, on one device or dealt over simulated ranks.

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
    """One rank's piece of one layer: index keys, attention keys and values, and what selectors keep."""

    index: IndexKeyCache
    kv: KVCache
    state: LayerState


class Decoder:
    """One request and its caches.

    Args:
        model: the dense model.
        indexers: one ``Indexer`` a layer.
        placement: how tokens are dealt over ranks; every rank is simulated in this process.
        capacity: tokens the request may reach; the model's own limit if None.
    """

    def __init__(self, model: Llama, indexers: nn.ModuleList, placement: Placement | None = None, capacity: int | None = None) -> None:
        config = model.config
        capacity = capacity or config.max_position_embeddings
        self.model, self.indexers, self.capacity = model, indexers, capacity
        self.placement = placement or Placement(1)
        self.length = 0
        per_rank = int(self.placement.local_length(torch.tensor([capacity]), 0)[0])
        pages = -(-per_rank // PAGE_SIZE)
        self.tables = [PageTable(1, pages, PAGE_SIZE, model.device) for _ in range(self.placement.ranks)]
        selections: list[dict[int, Selection]] = [{} for _ in self.tables]
        dim = indexer_at(indexers, 0).config.head_dim
        self.layers = [
            [
                RankLayer(
                    IndexKeyCache(pages, dim, PAGE_SIZE, model.device),
                    KVCache(pages, config.num_key_value_heads, config.head_dim, config.head_dim, model.dtype, PAGE_SIZE, model.device),
                    LayerState(layer, selections[rank]),
                )
                for rank in range(self.placement.ranks)
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

        def attend(given: LayerInput, slots: list[Tensor]) -> Tensor:
            self._store(given, slots)
            return causal_attention(given)

        return self.model.logits(self._grow(ids, attend)[-1])

    def step(self, ids: Tensor, plan: Sequence[OverRanks], observer: Observer | None = None) -> Tensor:
        """Run T further tokens, each attending to what ``plan[layer]`` picks for it.

        Args:
            ids: int64 ``[T]``.
            plan: per layer, a placement (``Single``, ``IDSA``, ``ExactMerge``) around a selector, made for this decoder's ranks.
            observer: looks on at each layer (one rank only).

        Returns:
            fp32 ``[T, vocab]`` logits.
        """
        require(len(plan) == len(self.layers), f"the plan must name {len(self.layers)} layers", len(plan), "use LayerPlan.uniform")
        for method in plan:
            same = method.placement == self.placement
            require(same, f"the plan's placement must be the decoder's, {self.placement}", method.placement, "make the decoder for it")
        for rank in self.layers[0]:
            rank.state.selections.clear()  # one dict serves all layers of a rank

        def attend(given: LayerInput, slots: list[Tensor]) -> Tensor:
            self._store(given, slots)
            query = indexer_at(self.indexers, given.layer).index_query(given.hidden, given.positions)
            attention = AttentionInputs(given.q, self._whole_keys(given.layer), given.q.shape[-1] ** -0.5)
            if observer is not None:
                rank = self.layers[given.layer][0]
                observer.look(given.layer, query, self._keys(0, rank), attention, rank.state)
            part, _ = run(plan[given.layer], query, self._shards(given), attention)
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
        for rank, table in enumerate(self.tables):
            local = self._local_length(length, rank)
            table.rollback(0, local)
            for layer in self.layers:
                layer[rank].state.rollback(0, local)
        self.length = length

    def dealt(self, placement: Placement) -> Decoder:
        """A copy of this one-rank decoder with its tokens dealt over ``placement``'s ranks."""
        require(self.placement.ranks == 1, "only a one-rank decoder can be dealt out", self.placement.ranks, "start from one rank")
        other = Decoder(self.model, self.indexers, placement, self.capacity)
        slots = other._append(self.length)
        every = torch.arange(self.length, device=self.model.device)
        source = self.tables[0].slots(0, every)
        for layer, (mine,) in enumerate(self.layers):
            values, scales = load_keys(self._keys(0, mine), 0)
            other._store_tokens(layer, slots, every, values, scales, mine.kv.k[source], mine.kv.v[source])
        return other

    def _grow(self, ids: Tensor, attend: Callable[[LayerInput, list[Tensor]], Tensor]) -> Tensor:
        """Hidden states ``[T, hidden]`` of the next T tokens; ``attend`` also gets their slots. A failure leaves nothing behind."""
        start = self.length
        slots = self._append(len(ids))
        try:
            return self.model(ids, torch.arange(start, self.length, device=ids.device), lambda given: attend(given, slots))
        except BaseException:
            self.rollback(start)
            raise

    def _append(self, num_tokens: int) -> list[Tensor]:
        """Slots of the next tokens on each rank (each rank gets its own tokens only)."""
        end = self.length + num_tokens
        require(
            end <= self.capacity,
            f"the text must fit the model's {self.capacity} tokens",
            f"{end} tokens",
            "shorten the prompt or generate less",
        )
        slots = []
        for rank, table in enumerate(self.tables):
            slots.append(table.append(0, self._local_length(end, rank) - table.length(0)))
        self.length = end
        return slots

    def _local_length(self, length: int, rank: int) -> int:
        return int(self.placement.local_length(torch.tensor([length]), rank)[0])

    def _store(self, given: LayerInput, slots: list[Tensor]) -> None:
        values, scales = indexer_at(self.indexers, given.layer).index_keys(given.hidden, given.positions)
        self._store_tokens(given.layer, slots, given.positions, values, scales, given.k, given.v)

    def _store_tokens(
        self, layer: int, slots: list[Tensor], positions: Tensor, values: Tensor, scales: Tensor, k: Tensor, v: Tensor
    ) -> None:
        owner = self.placement.owner(positions)
        for rank, piece in enumerate(self.layers[layer]):
            mine = slice(None) if len(slots) == 1 else owner == rank
            piece.index.store(slots[rank], values.view(torch.uint8)[mine].view(values.dtype), scales[mine])
            piece.kv.store(slots[rank], k[mine], v[mine])

    def _keys(self, rank: int, piece: RankLayer) -> IndexKeys:
        table = self.tables[rank]
        return piece.index.view(table.table, table.lengths)

    def _shards(self, given: LayerInput) -> list[Shard]:
        shards = []
        for rank, piece in enumerate(self.layers[given.layer]):

            def attend(picked: Selection, rank: int = rank, piece: RankLayer = piece) -> PartialAttention:
                piece.state.selections[piece.state.layer] = picked
                slots = self.tables[rank].slots(0, picked.indices).to(torch.int32)
                return sparse_attend(given.q, piece.kv.k, piece.kv.v, slots, given.q.shape[-1] ** -0.5)

            shards.append(Shard(self._keys(rank, piece), piece.state, attend))
        return shards

    def _whole_keys(self, layer: int) -> Callable[[int], Tensor]:
        """``load_keys`` for ``AttentionInputs``: the request's attention keys in position order, from every rank."""

        def load(request: int) -> Tensor:
            every = torch.arange(self.length, device=self.model.device)
            owner, local = self.placement.owner(every), self.placement.to_local(every)
            first = self.layers[layer][0].kv.k
            keys = first.new_empty(self.length, *first.shape[1:])
            for rank, piece in enumerate(self.layers[layer]):
                mine = owner == rank
                keys[mine] = piece.kv.k[self.tables[rank].slots(request, local[mine])]
            return keys

        return load
