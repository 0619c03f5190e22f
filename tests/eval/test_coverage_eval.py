"""Whether IDSA's local sets hold the global top-k: counts against IDSA itself, and a broken rule is seen for what it is."""

import dataclasses

import pytest
import torch

from thresher.cache import pack_keys
from thresher.cache.placement import Placement
from thresher.distributed import IDSA, expected_coverage, local_topk, miss_probability
from thresher.errors import ThresherError
from thresher.eval.coverage import counted, measure, rank_counts, rows_missing, share_held, smallest_enough
from thresher.eval.coverage_error import local_budgets, relative_error
from thresher.eval.coverage_table import findings
from thresher.eval.recall import recall_rows
from thresher.ops.quantize import quantize_fp8
from thresher.selectors import DSA
from thresher.types import IndexQuery, Selection

LENGTH, QUERIES, TOPK = 90, 12, 16
RANKS, GRANULARITY = (1, 2, 3, 8), (1, 4)


def case(plateaus: bool, positions=None):
    made = torch.Generator().manual_seed(5)
    q, scales = quantize_fp8(torch.randn(QUERIES, 4, 16, generator=made))
    positions = torch.arange(LENGTH - QUERIES, LENGTH) if positions is None else positions
    query = IndexQuery(q, torch.randn(QUERIES, 4, generator=made) * scales, positions, torch.zeros(QUERIES, dtype=torch.int64))
    k = torch.randn(5, 16, generator=made)[torch.arange(LENGTH) // 3 % 5] if plateaus else torch.randn(LENGTH, 16, generator=made)
    return query, pack_keys([quantize_fp8(k)])


def chosen(rows):
    indices = torch.tensor(rows, dtype=torch.int32)
    return Selection(indices, (indices >= 0).sum(1))


@pytest.mark.parametrize("plateaus", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITY)
@pytest.mark.parametrize("ranks", RANKS)
def test_counts_say_what_idsa_holds(ranks, granularity, plateaus):
    """For every m, with ties and with contexts shorter than k."""
    for positions in (None, torch.tensor([0, 3, 14, 15, 16, 17, 30, 31, 40, 57, 80, 89])):
        query, keys = case(plateaus, positions)
        wanted = DSA(TOPK).select(query, keys)
        counts = rank_counts(wanted, Placement(ranks, granularity))
        assert torch.equal(counts.sum(1), wanted.lengths)
        for m in range(-(-TOPK // ranks), TOPK + 1):
            union = IDSA(DSA(TOPK), ranks, m, granularity).select(query, keys)
            held = recall_rows(union, wanted)
            torch.testing.assert_close(share_held(counts, m), held)
            assert torch.equal(rows_missing(counts, m), held < 1)


def test_counts_by_hand():
    picked = chosen([[0, 1, 2, 9], [4, 5, 8, -1], [-1, -1, -1, -1]])
    assert rank_counts(picked, Placement(4)).tolist() == [[1, 2, 1, 0], [2, 1, 0, 0], [0, 0, 0, 0]]
    assert rank_counts(picked, Placement(2, 4)).tolist() == [[4, 0], [1, 2], [0, 0]]
    assert rank_counts(picked, Placement(2, kind="contiguous", capacity=10)).tolist() == [[3, 1], [1, 2], [0, 0]]
    assert share_held(rank_counts(picked, Placement(2, 4)), 2).tolist() == [0.5, 1, 1]
    with pytest.raises(ThresherError, match="picked must be logical"):
        rank_counts(dataclasses.replace(picked, space="local"), Placement(2))


def test_the_smallest_m_by_trying_all():
    made = torch.Generator().manual_seed(1)
    for rows, promise in ((1, 0.0), (40, 0.0), (40, 0.1), (200, 0.005), (100, 0.29), (30, 0.9)):
        picked = chosen([sorted(torch.randperm(100, generator=made)[:20].tolist()) for _ in range(rows)])
        counts = rank_counts(picked, Placement(5))
        # Counted in whole rows: 100 * 0.29 is 28.999... to a computer.
        enough = [m for m in range(4, 21) if int(rows_missing(counts, m).sum()) <= round(promise * rows, 6)]
        assert smallest_enough(counts, promise) == min(enough)
    for bad, words in ((torch.zeros(0, 3, dtype=torch.int64), "rows to count"), (counts, "probability must lie in")):
        with pytest.raises(ThresherError, match=words):
            smallest_enough(bad, 1.0)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_period_of_r_breaks_the_rule_and_only_k_would_do(ranks):
    """All tokens that matter on one rank: the worst there is."""
    k, length = 64, 512
    one_rank = [[ranks * i for i in range(k)]] * 50
    result = measure([chosen(one_rank), chosen(one_rank)], Placement(ranks), length)
    m = local_topk(k, ranks, 1e-4, length)
    assert (result.local_topk, result.needed, result.obeys) == (m, k, False)
    assert result.missing == 1
    assert result.held == result.worst == m / k
    assert result.expected == expected_coverage(k, ranks, m, length) > 0.9999
    # Where the period says nothing about the rank, the same tokens are spread evenly.
    assert measure([chosen(one_rank)], Placement(ranks, kind="contiguous", capacity=k * ranks), length).needed == k // ranks


def test_a_few_bad_rows_in_one_layer_are_seen():
    """1 row in 200 loses tokens: over 1e-4, under 1e-2; the m reported is that row's, or that of the others."""
    even = [list(range(32))] * 100
    uneven = [*even[:-1], [*range(0, 56, 2), 1, 3, 5, 7]]  # 28 on one rank of two
    for promise, needed in ((1e-4, 28), (1e-2, 16)):
        result = measure([chosen(even), chosen(uneven)], Placement(2), 400, promise)
        assert result.needed == needed
        assert result.obeys == (needed <= result.local_topk)
    result = measure([chosen(even), chosen(uneven)], Placement(2), 400, 0.2)
    lost = 28 - result.local_topk
    assert lost > 0
    assert result.missing_by_layer == (0, 1)
    assert result.missing == 1 / 200
    assert result.held_by_layer == pytest.approx((1, 1 - lost / 32 / 100))
    assert result.worst == min(result.held_by_layer)
    assert result.obeys, "one row of 200 is fewer than promised"


def test_tokens_dealt_by_chance_do_as_the_rule_says():
    made = torch.Generator().manual_seed(0)
    k, ranks, length, promise = 32, 4, 256, 0.05
    layers = [chosen([torch.randperm(length, generator=made)[:k].tolist() for _ in range(1000)]) for _ in range(3)]
    result = measure(layers, Placement(ranks), length, promise)
    bound = miss_probability(k, ranks, result.local_topk, length)
    assert bound * 0.7 < result.missing < bound * 1.3
    assert result.held == pytest.approx(result.expected, abs=1e-3)


def test_what_cannot_be_measured_is_refused():
    for layers in ([chosen([[1, 2, -1]])], [chosen([[1, 2]]), chosen([[1, 2, 3]])], [Selection(torch.zeros(0, 3).int(), torch.zeros(0))]):
        with pytest.raises(ThresherError, match="each layer must have rows of"):
            measure(layers, Placement(2), 10)
    with pytest.raises(ThresherError, match="there must be a layer"):
        measure([], Placement(2), 10)


def test_only_contexts_longer_than_k_count():
    query, _ = case(False, torch.tensor([0, 3, 14, 15, 16, 17, 30, 31, 40, 57, 80, 89]))
    assert counted(query, TOPK).positions.tolist() == [16, 17, 30, 31, 40, 57, 80, 89]  # position 15 sees 16 tokens, all of them kept


def test_what_is_said_names_the_worst():
    row = [measure([chosen([list(range(16))] * 3)], Placement(ranks), 100) for ranks in (1, 2, 4)]
    every = [measure([chosen([list(range(0, 64, 4))] * 3)], Placement(ranks), 100) for ranks in (1, 2, 4)]
    said = findings({"prose": {"g=1": row}, "rows": {"g=1": every}})
    assert said[0] == "prose, g=1: holds for R = 1, 2, 4"
    assert said[1] == "rows, g=1: holds for R = 1; BROKEN for R = 2, 4 (R = 4: 1.0000 of rows lose a token, m = 11 had to be 16)"


def test_budgets_reach_from_end_to_end():
    assert local_budgets(256, 8, 54, 4) == [32, 54, 64, 128, 256]
    assert local_budgets(7, 1, 7) == [7]
    assert local_budgets(3, 8, 2)[0] == 1


def test_relative_error_by_hand():
    of = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])
    assert relative_error(of + torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]]), of) == pytest.approx((1 / 5 + 1 / 2) / 2)
    assert relative_error(of, of) == 0
