"""Recall against plain Python sets, and the cases where a careless formula flatters."""

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.errors import ThresherError
from thresher.eval.recall import recall, recall_rows
from thresher.types import Selection


def make(rows, width=None, space="logical"):
    width = max((len(row) for row in rows), default=0) if width is None else width
    padded = [list(row) + [-1] * (width - len(row)) for row in rows]
    indices = torch.tensor(padded, dtype=torch.int32).reshape(len(rows), width)
    return Selection(indices, torch.tensor([len(row) for row in rows], dtype=torch.int64), space)


row = st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 30), max_size=12, unique=True)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(row, row), min_size=1, max_size=5))
def test_rows_are_shares_of_sets(pairs):
    ours, theirs = make([a for a, _ in pairs], 12), make([b for _, b in pairs], 12)
    want = [len(set(a) & set(b)) / len(b) if b else 1.0 for a, b in pairs]
    assert recall_rows(ours, theirs).tolist() == pytest.approx(want, abs=1e-15)
    full = [value for value, (_, b) in zip(want, pairs, strict=True) if len(b) == 12]
    got = recall(ours, theirs)
    assert got == pytest.approx(sum(full) / len(full)) if full else math.isnan(got)


def test_only_rows_full_to_the_width_count():
    theirs = make([[0], [0, 1], [0, 1, 2], [4, 5, 6]])
    ours = make([[0], [0, 1], [0, 1, 2], [6, 7, 8]])
    assert recall(ours, theirs) == pytest.approx((1 + 1 / 3) / 2)


def test_a_wider_selection_and_a_repeated_entry_do_not_score_above_one():
    assert recall(make([[0, 1, 2, 3, 4, 5]]), make([[1, 3]])) == 1.0
    assert recall(make([[1, 1, 1, 1]]), make([[1, 3]])) == 0.5


def test_order_and_padding_place_do_not_matter_and_padding_never_matches():
    ours = Selection(torch.tensor([[-1, 7, -1, 3]], dtype=torch.int32), torch.tensor([2]))
    assert recall(ours, make([[3, 5]])) == 0.5
    assert recall_rows(make([[]], 3), make([[]], 3)).tolist() == [1.0]
    assert recall_rows(make([[]], 3), make([[1]], 3)).tolist() == [0.0]


def test_inputs_are_left_as_they_were():
    ours, theirs = make([[2, 1]]), make([[1, 2]])
    recall(ours, theirs)
    assert ours.indices.tolist() == [[2, 1]]
    assert theirs.indices.tolist() == [[1, 2]]


def test_nothing_to_compare_is_nan_not_one():
    assert math.isnan(recall(make([[0]], 4), make([[0]], 4)))
    assert math.isnan(recall(make([], 4), make([], 4)))
    assert math.isnan(recall(make([[]], 0), make([[]], 0)))


def test_mistakes_are_named():
    with pytest.raises(ThresherError, match="index space"):
        recall(make([[0]], space="slot"), make([[0]]))
    with pytest.raises(ThresherError, match="rows"):
        recall(make([[0]]), make([[0], [1]]))


def test_it_is_fast_enough_for_every_layer_of_every_step():
    generator = torch.Generator().manual_seed(0)
    picks = [torch.stack([torch.randperm(7680, generator=generator)[:512] for _ in range(25)]).int() for _ in range(2)]
    ours, theirs = (Selection(p.sort(1).values, torch.full((25,), 512)) for p in picks)
    recall(ours, theirs)
    start = time.perf_counter()
    for _ in range(20):
        value = recall(ours, theirs)
    assert (time.perf_counter() - start) / 20 < 0.02
    assert value == pytest.approx(512 / 7680, abs=0.02)
