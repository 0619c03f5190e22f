"""What a trained indexer is worth on text it has not seen: every selector's recall, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thresher.cache.index_keys import pack_keys
from thresher.eval.probe import Probe
from thresher.eval.settings import describe, methods
from thresher.models.indexer import indexer_at
from thresher.models.llama import LayerInput, Llama, causal_attention
from thresher.types import AttentionInputs

NUM_QUERIES = 32
COMPARED = ("dsa", "oracle", "misa", "misa_rerank", "hisa", "idsa", "misa_static", "misa_random", "random")


def mean_head_weights(model: Llama, indexers: nn.ModuleList, sequences: Sequence[Tensor]) -> list[list[float]]:
    """Per layer and head, the mean ``|w * q_scale|`` over all tokens of the sequences: what ``misa_static`` goes by."""
    sums = [torch.zeros(indexer_at(indexers, 0).config.num_heads, dtype=torch.float64) for _ in indexers]

    def look(given: LayerInput) -> None:
        query = indexer_at(indexers, given.layer).index_query(given.hidden, given.positions)
        sums[given.layer] += query.weights.double().abs().mean(0).cpu() / len(sequences)

    _watch(model, sequences, look)
    return [row.tolist() for row in sums]


def evaluate(
    model: Llama, indexers: nn.ModuleList, sequences: Sequence[Tensor], head_weights: Sequence[Sequence[float]]
) -> dict[str, dict[str, Any]]:
    """Recall and mass by layer on held-out sequences of one length, for each sequence's last ``NUM_QUERIES`` queries.

    Returns:
        ``{"methods": {selector: text}, "recall": {selector: [per layer]}, "mass": {selector: [per layer]}}``; recall against DSA,
        fractions; ``oracle``'s recall reads as the share of DSA's tokens that the oracle picks too.
    """
    length = len(sequences[0])
    ways = methods(length, head_weights)
    probe = Probe({name: ways[name] for name in COMPARED})

    def look(given: LayerInput) -> None:
        indexer = indexer_at(indexers, given.layer)
        keys = pack_keys([indexer.index_keys(given.hidden, given.positions)])
        query = indexer.index_query(given.hidden[-NUM_QUERIES:], given.positions[-NUM_QUERIES:])
        probe.look(given.layer, query, keys, AttentionInputs(given.q[-NUM_QUERIES:], lambda request: given.k, given.q.shape[-1] ** -0.5))

    _watch(model, sequences, look)
    return {
        "methods": {name: describe(ways[name]) for name in COMPARED},
        "recall": {name: probe.recall_by_layer(name) for name in COMPARED},
        "mass": {name: probe.mass_by_layer(name) for name in COMPARED},
    }


def _watch(model: Llama, sequences: Sequence[Tensor], look: Callable[[LayerInput], None]) -> None:
    """Run the dense model over the sequences with ``look`` called at each layer."""

    def attend(given: LayerInput) -> Tensor:
        look(given)
        return causal_attention(given)

    with torch.no_grad():
        for tokens in sequences:
            model(tokens.to(model.device), torch.arange(len(tokens), device=model.device), attend)
