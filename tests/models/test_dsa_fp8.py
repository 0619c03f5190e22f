"""The FP8 path: caches and indexer as they are served, beside a reference that rounds at the same places, and beside fp32."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from thresher.models.dsa_decoder import DsaDecoder
from thresher.ops import hadamard, index_score, quantize_fp8
from thresher.selectors import DSA

from .dsa_peer import FAMILIES, TOPK, rows, text, tiny_folder, tiny_model, watch
from .dsa_reference import Reference

LENGTH = 200
pytestmark = pytest.mark.parametrize("family", FAMILIES)


@dataclass(frozen=True)
class Scored(DSA):
    """DSA that keeps its scores."""

    def select_indices(self, query, keys, state=None, attention=None):
        return self.select(query, keys, state, attention)


def recall(mine: list[set[int]], theirs: list[set[int]]) -> float:
    """Over the tokens that see more than k."""
    pairs = list(zip(mine, theirs, strict=True))[TOPK:]
    return sum(len(a & b) for a, b in pairs) / sum(len(b) for _, b in pairs)


def ran(family: str, seed: int, precision: str = "fp8"):
    made = DsaDecoder(tiny_model(family), 256, precision=precision)
    with watch(made.model) as watched:
        hidden = made.run(text(LENGTH, seed), Scored(TOPK) if precision == "fp8" else None)
    return made, watched, hidden


def test_each_layer_beside_a_reference_that_emulates_fp8(family):
    """Each layer of the reference is given what the decoder's layer read, so that a number on the edge between two e4m3 values, which fp32
    and fp64 round differently, counts once and not in all layers after it."""
    reference = Reference(tiny_folder(family), fp8=True)
    hits = []
    for seed in range(3):
        made, watched, _ = ran(family, seed)
        for layer, source in enumerate(made.model.config.index_layers):
            hidden = watched.hidden[layer][0].double()
            mine = rows(made.selections[layer])
            if source == layer:
                hits.append(recall(mine, reference.select(layer, hidden)))
            out = watched.attended[layer][0].double()
            expected = reference.attend(layer, hidden, mine)
            assert (out - expected).norm() < 3e-3 * expected.norm()
    assert sum(hits) / len(hits) >= 0.999, hits
    assert min(hits) >= 0.998, hits


def test_scores_have_the_bits_of_the_definition(family):
    """Of one pass and of decoding, over pages: what a selection scored is the definition's score of the quantised queries and keys."""
    made, ids = DsaDecoder(tiny_model(family), 256, num_requests=2), text(LENGTH, 5)
    with watch(made.model) as watched:
        made.run(ids[:140], Scored(TOPK), torch.ones(140, dtype=torch.int64))
        picked = {layer: [made.selections[layer]] for layer in watched.index}
        for token in ids[140:].split(1):
            made.run(token, Scored(TOPK), torch.ones(1, dtype=torch.int64))
            for layer, parts in picked.items():
                parts.append(made.selections[layer])
    for layer, parts in picked.items():
        q, weights, keys = watched.whole(layer)
        (q8, q_scales), (k8, k_scales) = quantize_fp8(hadamard(q)), quantize_fp8(hadamard(keys))
        heads, dim = q.shape[1:]
        ends = torch.arange(1, LENGTH + 1)
        scores = index_score(q8, weights * (heads * dim) ** -0.5 * q_scales, k8, k_scales, torch.zeros_like(ends), ends)
        indices, kept = (torch.cat([getattr(part, name) for part in parts]) for name in ("indices", "scores"))
        there = indices >= 0
        assert there.sum() == sum(min(t, TOPK) for t in range(1, LENGTH + 1))
        assert torch.equal(kept[there], scores.gather(1, indices.clamp(min=0).long())[there])
        assert torch.equal(kept.min(1).values[TOPK:], scores.topk(TOPK).values[TOPK:, -1])


def test_beside_fp32(family):
    """FP8 changes what random weights select (docs/checkpoints.md has figures): most of it must stay, and not all."""
    (made, _, hidden), (exact, _, other) = ran(family, 0), ran(family, 0, "fp32")
    first = recall(rows(made.selections[0]), rows(exact.selections[0]))
    assert 0.95 < first < 1
    assert 1e-4 < (hidden - other).norm() / other.norm() < 0.5


def test_the_kept_latents_are_the_layer_s(family):
    made, _, _ = ran(family, 0)
    exact, _, _ = ran(family, 0, "fp32")
    slots = made.table.slots(0, torch.arange(LENGTH))
    held, plain = made.caches[0].load(slots), exact.caches[0].load(slots)
    assert held.shape == (LENGTH, 576)
    assert ((held - plain).abs() <= plain.abs() * 2**-4 + 2**-9).all()
    assert not torch.equal(held, plain)
