"""Selections without scores: the same indices, whoever asks."""

from __future__ import annotations

import pytest
import torch

from thresher.bench.cases import parse_case
from thresher.bench.inputs import make_inputs
from thresher.cache.state import LayerState
from thresher.selectors import DSA, HISA, MISA, MISARerank, Window

WITHOUT = [DSA(40), MISA(4, 16, 40), MISARerank(4, 16, 80, 40), HISA(16, 8, 40)]


@pytest.mark.parametrize("case", ["prefill-6x300-h8-d64-k40", "decode-3x300-h8-d64-k40"])
@pytest.mark.parametrize("selector", WITHOUT, ids=lambda selector: type(selector).__name__)
def test_the_same_indices_and_no_scores(selector, case):
    made = make_inputs(parse_case(case), "normal", 5, torch.device("cpu"))
    for state in (None, LayerState(0)):
        got, want = (pick(made.query, made.keys, state) for pick in (selector.select_indices, selector.select))
        assert torch.equal(got.indices, want.indices)
        assert torch.equal(got.lengths, want.lengths)
        assert got.scores is None
        assert want.scores is not None


def test_a_selector_of_its_own_needs_no_second_method():
    made = make_inputs(parse_case("decode-3x300-h8-d64-k40"), "normal", 5, torch.device("cpu"))
    window = Window(30, 10)
    got, want = (pick(made.query, made.keys) for pick in (window.select_indices, window.select))
    assert torch.equal(got.indices, want.indices)
