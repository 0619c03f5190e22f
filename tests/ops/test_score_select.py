"""Which way score_select goes: kernels that do both steps at once, or the two steps, each by its own choice."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from thresher import ops
from thresher.cache import pack_keys
from thresher.errors import ThresherError
from thresher.ops import dispatch
from thresher.types import IndexQuery

from .stand_ins import put_in, stand_in

ROOM = 128


def world(num: int) -> tuple:
    gen = torch.Generator().manual_seed(num)
    (k, scales), (q, _) = (ops.quantize_fp8(torch.randn(*shape, generator=gen)) for shape in ((ROOM - 20, 64), (num, 3, 64)))
    zeros = torch.zeros(num, dtype=torch.int64)
    return IndexQuery(q, torch.randn(num, 3, generator=gen), torch.arange(num) * 9, zeros), pack_keys([(k, scales)])


@pytest.fixture
def module(monkeypatch):
    """A stand-in for the kernels; ``module.step`` is one for a step of decoding."""
    made = stand_in("score_select", "triton", lambda heads, num, *rest: num > 4, "from the kernels")
    made.step = stand_in("score_select", "cuda", lambda heads, num, *rest: num > 6, "in one launch")
    put_in(monkeypatch, "score_select", {"triton": made, "cuda": made.step})
    return made


def two_steps(query, keys, topk):
    return ops.select_topk(ops.paged_index_score(query, keys), topk)


def test_auto_takes_the_kernels_where_they_can_run_and_are_faster(module):
    query, keys = world(5)
    assert ops.score_select(query, keys, 7) == "from the kernels"
    assert module.asked == module.step.asked == [(3, 5, 1, ROOM, True)]
    assert ops.score_select(query, keys, 7, with_scores=False) == "from the kernels"
    assert [given[2:] for given in module.seen] == [(7, True, None), (7, False, None)]
    assert all(given[0] is query and given[1] is keys for given in module.seen)
    query, keys = world(7)
    assert ops.score_select(query, keys, 7) == "in one launch"
    for topk, with_scores, scored in ((ROOM, False, False), (ROOM, True, True), (ROOM - 1, False, True)):
        ops.score_select(query, keys, topk, with_scores=with_scores)
        assert module.step.asked[-1] == (3, 7, 1, ROOM, scored)
    module.step.why = "the moon is full"
    assert ops.score_select(query, keys, 7) == "from the kernels"


def test_auto_takes_the_two_steps_elsewhere(module):
    query, keys = world(4)
    for why in (None, "the moon is full"):
        module.why = why
        got, want = ops.score_select(query, keys, 7), two_steps(query, keys, 7)
        assert torch.equal(got.indices, want.indices)
        assert torch.equal(got.scores, want.scores)
        assert torch.equal(got.lengths, want.lengths)
        query, keys = world(5)
    assert module.seen == []


def test_a_name_is_kept(module):
    query, keys = world(4)
    assert ops.score_select(query, keys, 7, impl="triton") == "from the kernels"
    assert module.asked == [], "whoever names them wants them"
    assert torch.equal(ops.score_select(query, keys, 7, impl="reference").indices, two_steps(query, keys, 7).indices)
    module.why = "the moon is full"
    with pytest.raises(ThresherError, match=r'impl="triton" of score_select must be able to run; got: the moon is full'):
        ops.score_select(query, keys, 7, impl="triton")


def test_inside_using(module):
    """A name there is one for the two steps; the kernels are another way to run them as "triton"."""
    query, keys = world(5)
    with dispatch.using("reference"):
        assert torch.equal(ops.score_select(query, keys, 7).indices, two_steps(query, keys, 7).indices)
    assert module.seen == []
    with dispatch.using("triton"):
        assert ops.score_select(*world(7), 7) == "from the kernels"
        module.why = "the moon is full"
        with pytest.raises(ThresherError, match='impl="triton" of paged_index_score'):
            ops.score_select(query, keys, 7)
    module.why, query = None, world(4)[0]
    with dispatch.using("cuda"):
        assert ops.score_select(query, keys, 7) == "in one launch"
        module.step.why = "the moon is full"
        with pytest.raises(ThresherError, match='impl="cuda" of score_select'):
            ops.score_select(query, keys, 7)
    assert dispatch.meaning() == "auto"


@pytest.mark.parametrize("weight", [1.0, -math.inf, math.inf, math.nan, -3e38])
def test_a_query_that_sees_no_more_than_topk_selects_all_of_it(weight):
    """Whatever its scores are."""
    query, keys = world(7)
    query.weights[:] = weight
    query.positions[:] = torch.tensor([-1, 3, 64, 70, 90, 99, 10**9])
    got = ops.score_select(query, keys, ROOM - 20)
    ends = [0, 4, 65, 71, 91, 100, ROOM - 20]
    assert [row[row >= 0].tolist() for row in got.indices] == [list(range(end)) for end in ends]
    assert got.lengths.tolist() == ends


def test_worthwhile_for_a_step_of_decoding():
    kernel = importlib.import_module("thresher.ops.score_select.cuda")
    assert kernel.worthwhile(64, 1, 1, 8192, True)
    assert not kernel.worthwhile(64, 3, 3, 8128, True)
    assert kernel.worthwhile(64, 4, 4, 4096, True)
    assert not kernel.worthwhile(64, 32, 32, 4032, True)
    assert kernel.worthwhile(64, 128, 128, 4096, True)
    assert kernel.worthwhile(64, 32, 8, 131072, True)
    assert not kernel.worthwhile(64, 1024, 1, 2**20, True), "a prefill"
    assert kernel.worthwhile(64, 1024, 1, 2048, False), "nothing to score"
