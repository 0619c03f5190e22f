"""A model's step of decoding, whole and in parts, as ``thresher bench-model`` times it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from thresher.cache.latents import LATENT_DIM
from thresher.models.dsa_cache import PAGE_SIZE
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
        model, table = decoder.model, decoder.table
        config = model.config
        self.model, self.layers, self.ids = model, layers_of(model), ids
        self.positions, requests = table.lengths - 1, torch.arange(len(ids), device=ids.device)
        every = torch.arange(decoder.length(), dtype=torch.int32, device=ids.device).expand(len(ids), -1)
        held = to_slots(every, table.table, requests, PAGE_SIZE)
        slots = held[:, -1].long()
        dense = isinstance(selector, Dense)
        self.attend = to_all(decoder, slots, held) if dense else decoder.attending(config.plan(selector), self.positions, slots, requests)
        self.turn = rotation(config.rope, config.qk_rope_head_dim, self.positions)
        self.x = model.embed(ids)
        self.given = [self._given(layer) for layer in range(len(self.layers))]

    @torch.no_grad()
    def whole(self) -> Tensor:
        """Embedding, layers, head: fp32 ``[requests, vocab]``."""
        return self.model.logits(self.model(self.ids, self.positions, self.attend))

    @torch.no_grad()
    def attention(self, layer: int) -> Tensor:
        """The attention block of a layer: norm, projections, indexer, selection, attention over the cache, output projection."""
        block = self.layers[layer]
        out: Tensor = block.attention(layer, block.input_norm(self.x), self.turn, self.attend)
        return out

    @torch.no_grad()
    def inner(self, layer: int) -> Tensor:
        """Of that block what lies between the projections: quantise and store, select, positions to slots, attend."""
        return self.attend(self.given[layer])

    @torch.no_grad()
    def mlp(self, layer: int) -> Tensor:
        """What follows in that layer: norm, and a dense MLP or experts."""
        block = self.layers[layer]
        out: Tensor = block.mlp(block.mlp_norm(self.x))
        return out

    @torch.no_grad()
    def _given(self, layer: int) -> DsaInput:
        """What the projections of a layer make of the tokens."""
        held: list[DsaInput] = []

        def keep(given: DsaInput) -> Tensor:
            held.append(given)
            return given.q[..., :LATENT_DIM]

        block = self.layers[layer]
        block.attention(layer, block.input_norm(self.x), self.turn, keep)
        return held[0]


def to_all(decoder: DsaDecoder, slots: Tensor, held: Tensor) -> Attend:
    """Attention of a layer's token, stored at ``slots`` (int64 ``[T]``), to all that its request holds (int32 ``[T, n]``)."""

    def attend(given: DsaInput) -> Tensor:
        cache = decoder.caches[given.layer]
        cache.store(slots, given)
        return cache.attend(given.q, held)

    return attend


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
