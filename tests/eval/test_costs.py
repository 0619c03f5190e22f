"""Indexer costs next to DSA's, worked out by hand."""

import pytest

from thresher.distributed import IDSA, ExactMerge, Single
from thresher.eval.costs import index_cost
from thresher.selectors import DSA, HISA, MISA, Dense, MISARandom, MISARerank, MISAStatic, Oracle, Random, Window

LENGTH, HEADS, DIM = 7680, 32, 64


@pytest.mark.parametrize(
    ("method", "flops", "moved"),
    [
        (Single(DSA(512)), 1, 1),
        (Single(DSA(9999)), 1, 1),
        (Single(Dense()), 0, 0),
        (Single(Window(512)), 0, 0),
        (Single(Random(512)), 0, 0),
        (Single(Oracle(512)), 0, 0),
        # 8 of 32 heads over 7680 keys, all 32 over the 120 means
        (Single(MISA(8, 64, 512)), (8 * 7680 + 32 * 120) / (32 * 7680), (7680 + 120) / 7680),
        (Single(MISA(8, 7, 512)), (8 * 7680 + 32 * 1098) / (32 * 7680), (7680 + 1098) / 7680),
        (Single(MISARerank(4, 64, 1920, 512)), (4 * 7680 + 32 * 120 + 32 * 1920) / (32 * 7680), (7680 + 120 + 1920) / 7680),
        (Single(HISA(16, 120, 512)), (480 + 1920) / 7680, (480 + 1920) / 7680),
        (Single(MISAStatic((1, 2, 30), 512)), 3 / 32, 1),
        (Single(MISARandom(8, topk=512)), 8 / 32, 1),
        (IDSA(DSA(512), 4), 1, 1),
        (IDSA(DSA(512), 4, 512), 1, 1),
        (ExactMerge(DSA(512), 4), 1, 1),
        (IDSA(Dense(), 4), 0, 0),
        # four ranks of 1920 keys and 30 means each
        (IDSA(MISA(8, 64, 512), 4), (8 * 7680 + 32 * 120) / (32 * 7680), (7680 + 120) / 7680),
        # each rank looks into min(120 / 4 + 1, 120) blocks of its own, 31 * 16 tokens
        (ExactMerge(HISA(16, 120, 496), 4), 4 * (120 + 33 * 16) / 7680, 4 * (120 + 33 * 16) / 7680),
    ],
    ids=str,
)
def test_ratios_by_hand(method, flops, moved):
    for layers in (1, 30):
        assert index_cost([method] * layers, LENGTH, HEADS, DIM) == pytest.approx((flops, moved))


def test_layers_are_added_up():
    plan = [Single(DSA(512)), Single(Dense()), Single(HISA(16, 120, 512)), Single(DSA(512))]
    share = (2 + 2400 / 7680) / 4
    assert index_cost(plan, LENGTH, HEADS, DIM) == pytest.approx((share, share))


@pytest.mark.parametrize("dim", [32, 64, 128])
def test_ratios_of_dsa_do_not_depend_on_sizes(dim):
    assert index_cost([IDSA(DSA(2048), 8)], 131072, 64, dim) == (1.0, 1.0)
