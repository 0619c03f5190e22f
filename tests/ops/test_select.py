"""select_topk against sorting in Python, ties and NaN included."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.cache import PageTable
from thresher.errors import ThresherError
from thresher.ops import select_topk, select_topk_slots

INF, NAN = math.inf, math.nan
CRUEL = [0.0, -0.0, 1.0, 1.0000001, -1.0, NAN, -INF, INF, 1e-45, -1e-45, 3.4028235e38, -3.4028235e38]


def expected(row: list[float], topk: int) -> list[int]:
    """Columns by (number before NaN, score descending, column), -inf left out."""
    candidates = [c for c, s in enumerate(row) if s != -INF]
    candidates.sort(key=lambda c: (math.isnan(row[c]), 0.0 if math.isnan(row[c]) else -row[c], c))
    return sorted(candidates[:topk])


def check(scores: torch.Tensor, topk: int) -> None:
    got = select_topk(scores, topk)
    assert got.indices.shape == got.scores.shape == (len(scores), topk)
    assert got.lengths.dtype == torch.int64
    for i, row in enumerate(scores.tolist()):
        want = expected(row, topk)
        assert got.indices[i].tolist() == want + [-1] * (topk - len(want))
        assert int(got.lengths[i]) == len(want)
        beside = scores[i][want]
        torch.testing.assert_close(got.scores[i, : len(want)], beside, rtol=0, atol=0, equal_nan=True)
        assert (got.scores[i, len(want) :] == -INF).all()


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 12).flatmap(lambda n: st.lists(st.lists(st.sampled_from(CRUEL), min_size=n, max_size=n), min_size=1, max_size=4)),
    st.integers(1, 14),
)
def test_cruel_rows(rows, topk):
    check(torch.tensor(rows), topk)


@pytest.mark.parametrize("topk", [1, 7, 64, 299, 300, 301])
def test_random_rows(topk):
    check(torch.randn(4, 300, generator=torch.Generator().manual_seed(topk)), topk)


@pytest.mark.parametrize("topk", [1, 5, 50, 200])
def test_plateaus_of_zeros(topk):
    scores = torch.randn(6, 200, generator=torch.Generator().manual_seed(topk)).relu()
    scores[::2] = scores[::2].round()
    check(scores, topk)


@pytest.mark.parametrize("value", [0.0, -3.5, INF, NAN])
def test_all_equal_keeps_the_first(value):
    got = select_topk(torch.full((2, 1000), value), 10)
    assert got.indices.tolist() == [list(range(10))] * 2


def test_all_minus_inf_keeps_nothing():
    got = select_topk(torch.full((3, 20), -INF), 5)
    assert (got.indices == -1).all()
    assert got.lengths.tolist() == [0, 0, 0]


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 40])
def test_lengths_around_topk(length):
    scores = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    scores[:, length:] = -INF
    check(scores, 8)
    assert select_topk(scores, 8).lengths.tolist() == [min(length, 8)] * 2


def test_zeros_of_both_signs_tie():
    got = select_topk(torch.tensor([[0.0, -0.0, -0.0, 0.0], [-0.0, 0.0, 0.0, -0.0]]), 2)
    assert got.indices.tolist() == [[0, 1], [0, 1]]


def test_nan_of_either_sign_is_last_but_a_candidate():
    negative_nan = torch.tensor([-1], dtype=torch.int32).view(torch.float32)
    scores = torch.cat([torch.tensor([NAN]), negative_nan, torch.tensor([-3.4028235e38, -INF, 5.0])])[None]
    assert select_topk(scores, 2).indices.tolist() == [[2, 4]]
    assert select_topk(scores, 3).indices.tolist() == [[0, 2, 4]]
    assert select_topk(scores, 5).indices.tolist() == [[0, 1, 2, 4, -1]]


def test_a_row_is_the_same_alone_and_again():
    scores = torch.randn(16, 500, generator=torch.Generator().manual_seed(0)).relu().round(decimals=1)
    together = select_topk(scores, 64)
    for _ in range(5):
        assert torch.equal(select_topk(scores, 64).indices, together.indices)
    for i in range(16):
        assert torch.equal(select_topk(scores[i : i + 1], 64).indices[0], together.indices[i])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_name_the_columns(dtype):
    gen = torch.Generator().manual_seed(1)
    full = torch.randn(5, 90, generator=gen).relu()
    positions = torch.full((5, 40), -1)
    masked = torch.full((5, 90), -INF)
    for i, count in enumerate([0, 1, 11, 39, 40]):
        some = torch.randperm(90, generator=gen)[:count].sort().values
        positions[i, :count] = some
        masked[i, some] = full[i, some]
    # what stands beside -1 must not count, whatever it is
    scores = torch.where(positions < 0, INF, full.gather(1, positions.clamp(min=0)))
    got = select_topk(scores, 12, space="local", positions=positions.to(dtype))
    want = select_topk(masked, 12)
    assert got.space == "local"
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.scores, want.scores)
    assert torch.equal(got.lengths, want.lengths)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_what_stands_past_a_row_s_end_is_no_candidate(dtype):
    ends = torch.tensor([0, 1, 7, 8, 9, 40], dtype=dtype)
    scores = torch.randn(6, 40, generator=torch.Generator().manual_seed(4))
    past = torch.arange(40) >= ends[:, None]
    spoilt = torch.where(past, torch.tensor([INF, NAN, 9.0, -INF])[torch.arange(40) % 4], scores)
    got, want = select_topk(spoilt, 8, ends=ends), select_topk(scores.masked_fill(past, -INF), 8)
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.scores, want.scores)
    assert got.lengths.tolist() == [0, 1, 7, 8, 8, 8]
    positions = torch.arange(0, 120, 3).repeat(6, 1)
    assert torch.equal(select_topk(spoilt, 8, positions=positions, ends=ends).indices, want.indices * 3 + (want.indices < 0) * 2)
    table, requests = torch.tensor([[7, 0, 3, 9, 1]], dtype=torch.int32), torch.zeros(6, dtype=torch.int64)
    got = select_topk_slots(spoilt, 8, table, requests, 8, ends=ends)
    assert torch.equal(got.indices, select_topk_slots(scores.masked_fill(past, -INF), 8, table, requests, 8).indices)


def test_empty_shapes():
    assert select_topk(torch.zeros(0, 5), 3).indices.shape == (0, 3)
    assert select_topk(torch.zeros(2, 0), 3).indices.tolist() == [[-1] * 3] * 2
    assert select_topk(torch.zeros(2, 0), 3, positions=torch.zeros(2, 0).long()).lengths.tolist() == [0, 0]


def test_the_input_is_left_alone():
    scores = torch.tensor([[1.0, -0.0, NAN, -INF]])
    before = scores.clone()
    select_topk(scores, 2, positions=torch.tensor([[0, 1, -1, -1]]))
    assert torch.equal(scores.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize(
    ("scores", "topk", "positions"),
    [
        (torch.zeros(5), 1, None),
        (torch.zeros(2, 5).double(), 1, None),
        (torch.zeros(2, 5), 0, None),
        (torch.zeros(1, 3), 1, torch.zeros(1, 2).long()),
        (torch.zeros(1, 3), 1, torch.tensor([[5, 4, -1]])),
        (torch.zeros(1, 3), 1, torch.tensor([[4, 4, -1]])),
        (torch.zeros(1, 3), 1, torch.tensor([[1, -1, 2]])),
        (torch.zeros(1, 3), 1, torch.tensor([[1.0, 2.0, 3.0]])),
    ],
)
def test_refuses(scores, topk, positions):
    with pytest.raises(ThresherError, match="must"):
        select_topk(scores, topk, positions=positions)


def page_world():
    """Scores of three rows, two requests of 3 pages of 4 tokens; the second has no third page."""
    scores = torch.tensor([[5.0, 1, 4, 0, 3, 2, 9, -INF, 8, 7], [1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10], [-INF] * 10])
    return scores, torch.tensor([[7, 0, 2], [3, 1, -1]], dtype=torch.int32), torch.tensor([0, 1, 1])


def test_slots_go_through_the_page_table_of_each_row():
    got = select_topk_slots(page_world()[0], 4, *page_world()[1:], 4)
    # positions 0, 6, 8, 9 of request 0 and 6, 7, 8, 9 of request 1, which holds no page for the last two
    assert got.indices.tolist() == [[28, 2, 8, 9], [6, 7, -1, -1], [-1] * 4]
    assert got.indices.dtype == torch.int32
    assert got.lengths.tolist() == [4, 4, 0]
    assert got.space == "slot"
    assert got.scores is None


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_slots_of_named_positions(dtype):
    _, table, _ = page_world()
    positions = torch.tensor([[1, 5, 11, 12, 2**30], [0, 4, 8, -1, -1]], dtype=dtype)
    got = select_topk_slots(torch.zeros(2, 5), 5, table, torch.tensor([0, 1]), 4, positions)
    assert got.indices.tolist() == [[29, 1, 11, -1, -1], [12, 4, -1, -1, -1]]
    assert got.lengths.tolist() == [5, 3]


def test_slots_agree_with_a_page_table():
    pages = PageTable(3, 40, page_size=3)
    for request, count in ((1, 20), (0, 7), (2, 31), (1, 13)):
        pages.append(request, count)
    lengths = [7, 33, 31]
    requests = torch.tensor([2, 0, 1, 1])
    scores = torch.randn(4, 33, generator=torch.Generator().manual_seed(3))
    for row, request in enumerate(requests.tolist()):
        scores[row, lengths[request] :] = -INF
    picked = select_topk(scores, 9)
    got = select_topk_slots(scores, 9, pages.table, requests, 3)
    for row, request in enumerate(requests.tolist()):
        assert got.indices[row].tolist() == pages.slots(request, picked.indices[row]).tolist()
