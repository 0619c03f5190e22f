"""Recall, mass and tokens read, all selectors looking at the same queries."""

import pytest
import torch

from thresher.cache.index_keys import pack_keys
from thresher.distributed import IDSA, Single
from thresher.eval.probe import Probe, attention_probabilities, kept_mass
from thresher.ops.quantize import quantize_fp8
from thresher.selectors import DSA, Dense, Oracle, Random
from thresher.types import AttentionInputs, IndexQuery, Selection

LENGTH, QUERIES, TOPK = 80, 6, 10


def case(seed=0, positions=None):
    made = torch.Generator().manual_seed(seed)
    q, scales = quantize_fp8(torch.randn(QUERIES, 4, 16, generator=made))
    positions = torch.arange(LENGTH - QUERIES, LENGTH) if positions is None else positions
    query = IndexQuery(q, torch.rand(QUERIES, 4, generator=made) * scales, positions, torch.zeros(QUERIES, dtype=torch.int64))
    keys = pack_keys([quantize_fp8(torch.randn(LENGTH, 16, generator=made))])
    k = torch.randn(LENGTH, 2, 8, generator=made) * 2
    return query, keys, AttentionInputs(torch.randn(QUERIES, 6, 8, generator=made), lambda request: k, 0.3)


def probe(layers=2, **methods):
    made = Probe({name: [method] * layers for name, method in {"dsa": Single(DSA(TOPK)), **methods}.items()})
    for layer in range(layers):
        made.look(layer, *case(layer))
    return made


def test_dsa_recalls_itself_and_dense_recalls_all():
    made = probe(dense=Single(Dense()), wide=Single(DSA(40)))
    for name in ("dsa", "dense", "wide"):
        assert made.recall_by_layer(name) == [1.0, 1.0]
    assert made.mass_by_layer("dense") == pytest.approx([1.0, 1.0])
    assert made.tokens_read("dsa") == TOPK
    assert made.tokens_read("wide") == 40
    assert made.tokens_read("dense") == LENGTH - (QUERIES - 1) / 2


def test_figures_by_hand():
    made = probe(oracle=Single(Oracle(TOPK)), random=Single(Random(TOPK)), idsa=IDSA(DSA(TOPK), 4, 4))
    for layer in range(2):
        query, keys, attention = case(layer)
        want = [set(row) for row in DSA(TOPK).select(query, keys).indices.tolist()]
        for name, method in (("oracle", Oracle(TOPK)), ("random", Random(TOPK)), ("idsa", IDSA(DSA(TOPK), 4, 4))):
            picked = method.select(query, keys, None, attention)
            rows = [{p for p in row if p >= 0} for row in picked.indices.tolist()]
            recall = sum(len(a & b) / TOPK for a, b in zip(rows, want, strict=True)) / QUERIES
            assert made.recall_by_layer(name)[layer] == pytest.approx(recall)
            mass = 0.0
            for row, chosen in enumerate(rows):
                seen = int(query.positions[row]) + 1
                for head in range(6):
                    k = attention.load_keys(0)[:seen, head // 3].double()
                    p = (k @ attention.q[row, head].double() * attention.scale).softmax(0)
                    mass += float(p[sorted(chosen)].sum()) / 6 / QUERIES
            assert made.mass_by_layer(name)[layer] == pytest.approx(mass, rel=1e-5)
        assert made.mass_by_layer("oracle")[layer] >= max(made.mass_by_layer(n)[layer] for n in ("dsa", "random"))


def test_queries_that_see_no_more_than_k_do_not_count():
    made = Probe({"dsa": [Single(DSA(TOPK))], "random": [Single(Random(TOPK))]})
    made.look(0, *case(positions=torch.tensor([0, 4, 8, 9, 40, 79])))
    # Positions 0, 4 and 8 see fewer than ten tokens; 9 sees exactly ten, all of them DSA's.
    assert [len(rows) for rows in made.recall["random"][0]] == [3]
    assert made.tokens_read("dsa") == (1 + 5 + 9 + 10 + 10 + 10) / 6


def test_looks_add_up():
    made = probe()
    made.look(1, *case(5))
    assert [sum(len(t) for t in rows) for rows in made.recall["dsa"].values()] == [QUERIES, 2 * QUERIES]


def test_kept_mass_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.1, 0.2, 0.3, 0.4]])
    picked = Selection(torch.tensor([[0, 2, -1], [-1, -1, -1]], dtype=torch.int32), torch.tensor([2, 0]))
    assert kept_mass(p, picked).tolist() == [0.75, 0.0]


def test_probabilities_are_causal_and_sum_to_one():
    query, _, attention = case(positions=torch.tensor([0, 1, 30, 50, 70, 79]))
    p = attention_probabilities(query, attention)
    torch.testing.assert_close(p.sum(1), torch.ones(QUERIES))
    assert (p[torch.arange(LENGTH) > query.positions[:, None]] == 0).all()
    assert p[0, 0] == 1
