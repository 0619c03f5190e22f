"""What one layer of a DSA model keeps of its tokens: as it is served, in FP8, or in fp32 with nothing quantised."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from thresher.cache.index_keys import IndexKeyCache
from thresher.cache.latents import LATENT_DIM, ROPE_DIM, LatentCache
from thresher.cache.pages import PageTable
from thresher.cache.state import LayerState
from thresher.errors import require
from thresher.models.dsa_config import DsaConfig
from thresher.models.dsa_layers import DsaInput
from thresher.ops import (
    index_score,
    select_topk,
    sparse_attend_mla,
    sparse_attend_mla_fp8,
    store_index_keys,
    store_latents,
    store_step,
)
from thresher.selectors import DSA, Dense, Oracle, Random, Selector, Shared, Window
from thresher.types import AttentionInputs, IndexKeys, IndexQuery, Selection

PAGE_SIZE = 64
PLAIN_ROPE = (1.0, 0, "half")
"""Base, dims and style for an operation whose input is rotated already."""


class DsaCache(ABC):
    """Latents of one layer and, where it has an indexer, index keys; the slot of a token is the same in every layer."""

    def __init__(self, config: DsaConfig, table: PageTable) -> None:
        self.config, self.table = config, table  # of the tokens that this rank holds
        self.factor = (config.index_n_heads * config.index_head_dim) ** -0.5

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held, whether written or not."""

    @abstractmethod
    def store(self, slots: Tensor, given: DsaInput) -> None:
        """Keep T tokens at ``slots`` (int64 ``[T]``, -1 for those that this rank does not hold)."""

    @abstractmethod
    def store_and_ask(self, slots: Tensor, given: DsaInput, positions: Tensor, requests: Tensor) -> IndexQuery:
        """``store``, and what the selectors score with, for T tokens at ``positions`` of ``requests`` (int64 ``[T]``)."""

    @abstractmethod
    def select(self, selector: Selector, query: IndexQuery, state: LayerState, attention: AttentionInputs | None) -> Selection:
        """What ``selector`` picks of this layer's index keys."""

    @abstractmethod
    def attend(self, q: Tensor, slots: Tensor, early: bool = True) -> Tensor:
        """Attention of absorbed queries ``[T, heads, 576]`` over ``slots`` (int32 ``[T, k]``): fp32 ``[T, heads, 512]``. ``early`` as for
        ``ops.sparse_attend_mla_fp8``."""

    @abstractmethod
    def load(self, slots: Tensor) -> Tensor:
        """Latents and RoPE parts at ``slots`` (int64 ``[n]``): fp32 ``[n, 576]``."""


class Fp8Cache(DsaCache):
    """656 bytes of latent and ``index_head_dim + 4`` of index key a token; Hadamard and FP8 in the indexer."""

    def __init__(self, config: DsaConfig, table: PageTable, has_indexer: bool) -> None:
        super().__init__(config, table)
        device = table.table.device
        self.latents = LatentCache(table.num_pages, table.page_size, device=device)
        self.keys = IndexKeyCache(table.num_pages if has_indexer else 0, config.index_head_dim, table.page_size, device)
        self._zeros = torch.zeros(0, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        return self.latents.data.nbytes + self.keys.pages.nbytes

    def store(self, slots: Tensor, given: DsaInput) -> None:
        store_latents(self.latents.data, slots, given.latent, given.rope)
        if given.index is not None:
            store_index_keys(self.keys.pages, slots, given.index.key, torch.zeros_like(slots), *PLAIN_ROPE)

    def store_and_ask(self, slots: Tensor, given: DsaInput, positions: Tensor, requests: Tensor) -> IndexQuery:
        return IndexQuery(*store_step(*self.step(slots, given)), positions, requests)

    def step(self, slots: Tensor, given: DsaInput) -> tuple[Any, ...]:
        """The arguments of ``ops.store_step`` for a layer with an indexer. All is rotated already: at position 0 nothing turns."""
        index = given.index
        assert index is not None
        if len(self._zeros) < len(slots):
            self._zeros = torch.zeros_like(slots)
        return (
            self.keys.pages, self.latents.data, slots, index.key, given.latent, given.rope, index.q, index.weights,
            self._zeros[: len(slots)], *PLAIN_ROPE, self.factor,
        )  # fmt: skip

    def view(self) -> IndexKeys:
        """The index keys held."""
        return self.keys.view(self.table.table, self.table.lengths)

    def select(self, selector: Selector, query: IndexQuery, state: LayerState, attention: AttentionInputs | None) -> Selection:
        return selector.select_indices(query, self.view(), state, attention)

    def attend(self, q: Tensor, slots: Tensor, early: bool = True) -> Tensor:
        return sparse_attend_mla_fp8(q.bfloat16(), self.latents.data, slots, self.config.softmax_scale, early=early).out

    def load(self, slots: Tensor) -> Tensor:
        return self.latents.load(slots)


class Fp32Cache(DsaCache):
    """Everything in fp32 through the reference path, for agreement with another program in fp32.

    DSA scores unquantised queries and keys; selectors that look at no index keys run as they are, others are refused.
    """

    RUNS = (DSA, Dense, Oracle, Random, Shared, Window)

    def __init__(self, config: DsaConfig, table: PageTable, has_indexer: bool) -> None:
        super().__init__(config, table)
        rows, device = table.num_pages * table.page_size, table.table.device
        self.latents = torch.zeros(rows, LATENT_DIM + ROPE_DIM, device=device)
        self.keys = torch.zeros(rows if has_indexer else 0, config.index_head_dim, device=device)

    @property
    def nbytes(self) -> int:
        return self.latents.nbytes + self.keys.nbytes

    def store(self, slots: Tensor, given: DsaInput) -> None:
        self.latents[slots] = torch.cat((given.latent, given.rope), dim=-1).float()
        if given.index is not None:
            self.keys[slots] = given.index.key

    def store_and_ask(self, slots: Tensor, given: DsaInput, positions: Tensor, requests: Tensor) -> IndexQuery:
        self.store(slots, given)
        assert given.index is not None
        return IndexQuery(given.index.q, given.index.weights * self.factor, positions, requests)

    def select(self, selector: Selector, query: IndexQuery, state: LayerState, attention: AttentionInputs | None) -> Selection:
        names = ", ".join(kind.__name__ for kind in self.RUNS)
        must = f"with precision fp32 a selector must be one of {names}"
        require(isinstance(selector, self.RUNS), must, type(selector).__name__, "pass precision='fp8'")
        if isinstance(selector, DSA):
            return self._topk(query, selector.topk)
        no_pages = torch.zeros(0, self.table.page_size, 1, self.config.index_head_dim + 4, dtype=torch.uint8, device=query.q.device)
        return selector.select_indices(query, IndexKeys(no_pages, self.table.table, self.table.lengths), state, attention)

    def _topk(self, query: IndexQuery, topk: int) -> Selection:
        """The keys of the requests that ask stand one after the other; each query scores the part that is its own."""
        asking = query.requests.unique()
        counts = self.table.lengths[asking]
        slots = [self.table.slots(int(r), torch.arange(int(n), device=asking.device)) for r, n in zip(asking, counts, strict=True)]
        keys = self.keys[torch.cat(slots)]
        starts = (counts.cumsum(0) - counts)[torch.searchsorted(asking, query.requests)]
        ones = torch.ones(len(keys), device=keys.device)
        scores = index_score(query.q, query.weights, keys, ones, starts, starts + query.positions + 1, impl="reference")
        picked = select_topk(scores, topk, impl="reference")
        positions = picked.indices - starts[:, None].int()
        return Selection(positions.masked_fill(picked.indices < 0, -1), picked.lengths, scores=picked.scores)

    def attend(self, q: Tensor, slots: Tensor, early: bool = True) -> Tensor:
        return sparse_attend_mla(q.float(), self.latents, slots, self.config.softmax_scale, impl="reference").out

    def load(self, slots: Tensor) -> Tensor:
        return self.latents[slots]


PRECISIONS: dict[str, type[Fp8Cache] | type[Fp32Cache]] = {"fp8": Fp8Cache, "fp32": Fp32Cache}
