"""A model's step of decoding, whole and in parts, as ``thresher bench-model`` times it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from thresher.distributed.attend import attend_merged
from thresher.distributed.collectives import share_heads
from thresher.models.dsa_cache import PAGE_SIZE, Fp8Cache
from thresher.models.dsa_decoder import DsaDecoder
from thresher.models.dsa_layers import Attend, DsaInput, DsaLayer, DsaModel
from thresher.models.dsa_rope import rotation
from thresher.ops import to_slots
from thresher.selectors import Dense, Selector


class ModelStep:
    """The last token of every request once more: nothing is appended, so that a step may be repeated, and recorded in a CUDA graph.

    With ``Dense`` the slots of all tokens are found here, once for all steps and layers, as an engine of a dense model finds them; run it
    inside ``without_indexers``.

    Args:
        decoder: filled, every request with as many tokens.
        selector: of the layers that have an indexer.
        ids: int64 ``[requests]``, the tokens.
    """

    def __init__(self, decoder: DsaDecoder, selector: Selector, ids: Tensor) -> None:
        model, config = decoder.model, decoder.model.config
        self.model, self.layers, self.ids = model, layers_of(model), ids
        self.positions, slots, requests = decoder.last()
        if isinstance(selector, Dense):
            self.attend = to_all(decoder, slots, all_slots(decoder))
        else:
            self.attend = decoder.attending(config.plan(selector), self.positions, slots, requests)
        self.turn = rotation(config.rope, config.qk_rope_head_dim, self.positions)
        self.x = model.embedded(ids)
        with torch.no_grad():
            self.given = [block.given(layer, self.x, self.turn) for layer, block in enumerate(self.layers)]

    @torch.no_grad()
    def whole(self) -> Tensor:
        """Embedding, layers, head: fp32 ``[requests, vocab]``."""
        return self.model.logits(self.model(self.ids, self.positions, self.attend))

    @torch.no_grad()
    def attention(self, layer: int) -> Tensor:
        """The attention block of a layer: norm, projections, indexer, selection, attention over the cache, output projection."""
        return self.layers[layer].attended(layer, self.x, self.turn, self.attend)

    @torch.no_grad()
    def inner(self, layer: int) -> Tensor:
        """Of that block what lies between the projections: quantise and store, select, positions to slots, attend."""
        return self.attend(self.given[layer])

    @torch.no_grad()
    def mlp(self, layer: int) -> Tensor:
        """What follows in that layer: norm, and a dense MLP or experts."""
        return self.layers[layer].fed_forward(self.x)


def to_all(decoder: DsaDecoder, slots: Tensor, held: Tensor) -> Attend:
    """Attention of a layer's token, stored at ``slots`` (int64 ``[T]``), to all that its request holds here (int32 ``[T, n]``)."""
    config, ranks = decoder.model.config, decoder.ranks
    shares = share_heads(config.num_attention_heads, ranks.ranks)

    def attend(given: DsaInput) -> Tensor:
        cache = decoder.caches[given.layer]
        cache.store(slots, given)
        if not decoder.dealt:
            return cache.attend(given.q, held)
        assert isinstance(cache, Fp8Cache)
        every = ranks.gather_heads(given.q.bfloat16(), shares)
        return attend_merged(ranks, every, cache.latents.data, held, config.softmax_scale, shares).out

    return attend


def all_slots(decoder: DsaDecoder) -> Tensor:
    """int32 ``[B, n]``: slots of all tokens that every request holds on this rank, as many each."""
    table = decoder.table
    device = table.table.device
    every = torch.arange(table.length(0), dtype=torch.int32, device=device).expand(table.num_requests, -1)
    return to_slots(every, table.table, torch.arange(table.num_requests, device=device), PAGE_SIZE)


def layers_of(model: DsaModel) -> list[DsaLayer]:
    """Its layers, by their type."""
    return [layer for layer in model.layers if isinstance(layer, DsaLayer)]


@contextmanager
def without_indexers(model: DsaModel) -> Iterator[None]:
    """Inside, the layers have none, as those of a dense model."""
    held = [layer.attention.indexer for layer in layers_of(model)]
    try:
        for layer in layers_of(model):
            layer.attention.indexer = None
        yield
    finally:
        for layer, indexer in zip(layers_of(model), held, strict=True):
            layer.attention.indexer = indexer
