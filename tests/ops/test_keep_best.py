"""keep_best against sorting in Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.cache import Placement
from thresher.distributed import ExactMerge
from thresher.ops import keep_best
from thresher.selectors import DSA

from .candidates import CRUEL, INF, KINDS, NAN, kept, propose


def check(scores: torch.Tensor, positions: torch.Tensor, topk: int, granularity: int) -> None:
    ranks, num, _ = scores.shape
    for rank in range(ranks):
        got = keep_best(scores, positions, rank, topk, granularity)
        assert got.space == "local"
        assert got.indices.shape == got.scores.shape == (num, topk)
        assert (got.indices.dtype, got.lengths.dtype, got.scores.dtype) == (torch.int32, torch.int64, torch.float32)
        for query in range(num):
            columns = kept(scores, positions, query, rank, topk, granularity)
            padding = topk - len(columns)
            assert int(got.lengths[query]) == len(columns)
            assert got.indices[query].tolist() == positions[rank, query, columns].tolist() + [-1] * padding
            beside = torch.cat([scores[rank, query, columns], torch.full((padding,), -INF)])
            assert torch.equal(got.scores[query].view(torch.int32), beside.view(torch.int32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", range(1, 9))
def test_every_rank_s_part(ranks, kind):
    for granularity in (1, 4, 64):
        scores, positions = propose(kind, ranks, 4, 30, ranks)
        for topk in (1, 10, 30, 15 * ranks, 30 * ranks, 30 * ranks + 5):
            check(scores, positions, topk, granularity)


CANDIDATE = st.tuples(st.sampled_from(CRUEL.tolist()), st.integers(0, 12))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(CANDIDATE, max_size=6, unique_by=lambda c: c[1]), min_size=1, max_size=4),
    st.integers(1, 20),
    st.sampled_from([1, 2, 5]),
)
def test_cruel_candidates(of_ranks, topk, granularity):
    scores, positions = torch.full((len(of_ranks), 1, 6), NAN), torch.full((len(of_ranks), 1, 6), -1, dtype=torch.int32)
    for rank, held in enumerate(of_ranks):
        for column, (score, position) in enumerate(sorted(held, key=lambda c: c[1])):
            scores[rank, 0, column], positions[rank, 0, column] = score, position
    check(scores, positions, topk, granularity)


def test_an_order_by_hand():
    """Two ranks, token by token: rank 0 holds 0, 2, 4, 6 and rank 1 holds 1, 3, 5, 7."""
    scores = torch.tensor([[[0.0, NAN, 5.0, -INF]], [[-0.0, 1.0, NAN, INF]]])
    positions = torch.tensor([[[0, 1, 2, 3]], [[0, 1, 2, -1]]], dtype=torch.int32)
    # Best first: 4 (5.0), 3 (1.0), the zeros 0 and 1, 6 (-inf), the NaNs 2 and 5.
    order = [4, 3, 0, 1, 6, 2, 5]
    for topk in range(1, 9):
        for rank in (0, 1):
            got = keep_best(scores, positions, rank, topk)
            assert [p for p in got.indices[0].tolist() if p >= 0] == sorted(p // 2 for p in order[:topk] if p % 2 == rank)


@pytest.mark.parametrize("granularity", [1, 4, 64])
@pytest.mark.parametrize("kind", ["coarse", "cruel"])
def test_the_bits_of_the_whole_top_k_localised(kind, granularity):
    scores, positions = propose(kind, 3, 6, 40)
    logical = torch.stack([Placement(3, granularity).to_logical(rank, held.long()) for rank, held in enumerate(positions)]).int()
    for topk in (7, 40, 130):
        for rank in range(3):
            got = keep_best(scores, positions, rank, topk, granularity)
            want = ExactMerge(DSA(topk), 3, granularity).owned(scores, logical, rank)
            assert torch.equal(got.indices, want.indices)
            assert torch.equal(got.lengths, want.lengths)
            assert torch.equal(got.scores.view(torch.int32), want.scores.view(torch.int32))


def test_one_rank_keeps_all():
    scores, positions = propose("cruel", 1, 5, 20)
    got = keep_best(scores, positions, 0, 20)
    assert torch.equal(got.indices, positions[0])
    assert got.lengths.tolist() == (positions[0] >= 0).sum(1).tolist()


def test_what_comes_in_is_left_alone_and_may_be_strided():
    scores, positions = propose("cruel", 4, 3, 20)
    both = torch.stack([positions, scores.view(torch.int32)], 1)
    before = both.clone()
    got = keep_best(both[:, 1].view(torch.float32), both[:, 0], 2, 20, 4)
    assert torch.equal(both, before)
    assert torch.equal(got.indices, keep_best(scores, positions, 2, 20, 4).indices)


def test_the_largest_logical_position():
    last = 0x7F800000 // 2 - 1
    positions = torch.tensor([[[last - 1]], [[last - 1]]], dtype=torch.int32)
    assert [keep_best(torch.ones(2, 1, 1), positions, rank, 1).lengths.tolist() for rank in (0, 1)] == [[1], [0]]
