"""Budgets that grow with the context, so that no way of choosing equals DSA by construction."""

import json

import pytest

from thresher.distributed import IDSA, Single, miss_probability
from thresher.eval import settings
from thresher.eval.needle import LENGTHS
from thresher.eval.settings import ACTIVE_HEADS, RANKS, TOPK, candidates, describe, heaviest, methods
from thresher.models.checkpoint import SHIPPED
from thresher.selectors import DSA, HISA, MISA, Dense, MISARandom, MISARerank, MISAStatic, Random

WEIGHTS = [[float(head * (layer + 1) % 7) for head in range(32)] for layer in range(3)]


@pytest.mark.parametrize("length", LENGTHS)
def test_nothing_equals_dsa_by_construction(length):
    plans = {name: plan[0].selector for name, plan in methods(length, WEIGHTS).items()}
    assert plans["dsa"] == DSA(TOPK)
    assert TOPK <= candidates(length) < length
    assert candidates(length) % 64 == 0
    assert plans["misa_rerank"].candidates == candidates(length)
    assert plans["hisa"].num_blocks * plans["hisa"].block_size == candidates(length)
    assert plans["misa"].active_heads < 32
    assert length // plans["misa"].block_size >= 32, "routing sees blocks enough to tell heads apart"


def test_a_quarter_at_the_longest_length():
    length = max(LENGTHS)
    assert length == 7680
    plans = methods(length, WEIGHTS)
    assert 4 * plans["misa_rerank"][0].selector.candidates <= length
    assert 4 * plans["hisa"][0].selector.num_blocks * plans["hisa"][0].selector.block_size <= length
    assert 4 * ACTIVE_HEADS <= 32, "a quarter of the heads"


@pytest.mark.parametrize("length", [1, 513, 1024, 2048, 4096, 4100, 7680, 8192, 131072])
def test_candidates_hold_topk_at_every_length(length):
    assert candidates(length) >= 2 * TOPK
    assert candidates(length) <= max(length // 4, 2 * TOPK)
    methods(length, WEIGHTS)  # every selector takes its sizes


def test_every_way_and_its_kind():
    plans = methods(7680, WEIGHTS)
    kinds = {
        "dense": Dense,
        "dsa": DSA,
        "misa": MISA,
        "misa_rerank": MISARerank,
        "hisa": HISA,
        "idsa": DSA,
        "random": Random,
        "dsa_wide": DSA,
        "misa_static": MISAStatic,
        "misa_random": MISARandom,
    }
    assert list(plans)[:2] == ["dense", "dsa"]
    for name, kind in kinds.items():
        assert [type(method.selector) for method in plans[name]] == [kind] * 3, name
    assert all(isinstance(method, Single) for name, plan in plans.items() if name != "idsa" for method in plan)


def test_idsa_misses_rarely_and_dsa_wide_reads_as_much():
    plans = methods(7680, WEIGHTS)
    (idsa, *_), wide = plans["idsa"], plans["dsa_wide"][0].selector
    assert isinstance(idsa, IDSA)
    assert idsa.ranks == RANKS == 4
    assert miss_probability(TOPK, RANKS, idsa.budget) < 1e-4
    assert wide.topk == RANKS * idsa.budget == idsa.width


def test_static_heads_are_each_layers_heaviest():
    plans = methods(7680, WEIGHTS)
    for method, weights in zip(plans["misa_static"], WEIGHTS, strict=True):
        heads = method.selector.heads
        assert len(heads) == ACTIVE_HEADS
        assert min(weights[h] for h in heads) >= max(weights[h] for h in range(32) if h not in heads)


@pytest.mark.parametrize(
    ("weights", "count", "want"),
    [
        ([1.0, 1.0, 1.0, 1.0], 2, (0, 1)),
        ([0.0, 3.0, 3.0, 5.0], 2, (1, 3)),
        ([5.0, 1.0, 2.0], 3, (0, 1, 2)),
        ([0.1], 1, (0,)),
        ([-1.0, -2.0, -0.5], 1, (2,)),
    ],
)
def test_heaviest_ties_go_to_the_smaller_head(weights, count, want):
    assert heaviest(weights, count) == want


def test_plans_as_text_say_what_is_needed_to_repeat_them():
    plans = methods(7680, WEIGHTS)
    assert describe(plans["dsa"]) == "dsa:topk=512"
    budget = plans["idsa"][0].budget
    assert describe(plans["idsa"]) == f"dsa:topk=512 @ idsa:ranks=4,local_topk={budget}"
    static = describe(plans["misa_static"])
    assert isinstance(static, list)
    assert len(static) == 3
    assert static[0].startswith("misa_static:heads=")


def test_the_shipped_record_gives_every_layer_its_heads():
    record = json.loads(SHIPPED.with_suffix(".json").read_text())
    plans = methods(7680, record["head_weights"])
    assert len(plans["misa_static"]) == 30
    assert settings.heaviest(record["head_weights"][0], 1)[0] == max(range(32), key=record["head_weights"][0].__getitem__)
