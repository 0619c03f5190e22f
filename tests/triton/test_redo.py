"""Rows done again, interpreted: the two steps' bits wherever a row is marked, and not a byte touched elsewhere.

Inputs are small integers, as in ``test_index_score``: only so do the interpreter's dot products not depend on the tile.
"""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from thresher.ops.select.triton import select_topk
from thresher.types import IndexKeys, IndexQuery, Selection

from .test_index_score import bits, world
from .test_score_select import LEAST, sampled

kernels = importlib.import_module("thresher.ops.score_select.triton")
scores_of = importlib.import_module("thresher.ops.index_score.triton")
pytestmark = pytest.mark.skipif(not kernels.INTERPRET, reason="the kernels were imported before the interpreter was asked for")
UNTOUCHED = -7


def cruel_world(num: int, heads: int, dim: int, lengths: list[int], page_size: int) -> tuple[IndexQuery, IndexKeys]:
    """Shuffled pages and holes; rows that see nothing or less than topk, with NaN and infinities, or of requests that are not there."""
    query, keys = world(num, heads, dim, lengths, page_size)
    gen = torch.Generator().manual_seed(num)
    order = torch.randperm(len(keys.pages), generator=gen)
    pages = torch.empty_like(keys.pages)
    pages[order] = keys.pages
    table = order.int()[keys.page_table.clamp(min=0).long()].masked_fill(keys.page_table < 0, -1)
    table[0, 1], table[-1, 0], table[-1, 2] = -1, 10**6, -(2**31)
    query.weights[0], query.weights[3], query.weights[5, 0] = math.nan, 0.0, math.inf
    query.weights[7, 0] = -math.inf
    query.q[9, 0, 0] = math.nan
    query.positions[:10], query.requests[:10] = max(lengths), 0
    query.positions[1], query.positions[2], query.positions[4] = -1, 5, 2**62
    query.requests[6], query.requests[8] = len(lengths), -(2**40)
    return query, IndexKeys(pages, table, keys.lengths)


def untouched(num: int, topk: int, with_scores: bool) -> Selection:
    beside = torch.full((num, topk), math.nan) if with_scores else None
    return Selection(torch.full((num, topk), UNTOUCHED, dtype=torch.int32), torch.full((num,), UNTOUCHED), scores=beside)


@pytest.mark.parametrize("with_scores", [True, False])
@pytest.mark.parametrize(
    ("num", "heads", "dim", "lengths", "page_size", "topk", "programs"),
    [(23, 5, 64, [300, 0, 430], 64, 70, 3), (12, 32, 128, [300, 90], 64, 200, 132), (13, 64, 64, [300, 140], 61, 33, 1)],
)
def test_marked_rows_are_the_two_steps(monkeypatch, num, heads, dim, lengths, page_size, topk, programs, with_scores):
    query, keys = cruel_world(num, heads, dim, lengths, page_size)
    scores = scores_of.paged_index_score(query, keys)
    want = select_topk(scores, topk)
    assert scores.isnan().any()
    assert (want.lengths < topk).any()
    assert want.scores[0].isnan().any(), "NaN is selected where numbers are too few"
    monkeypatch.setattr(kernels, "REDO_TILE", 128)  # several to a row
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: programs)
    for marks in (torch.rand(num, generator=torch.Generator().manual_seed(topk)) < 0.6, torch.ones(num) > 0, torch.ones(num) < 0):
        got = untouched(num, topk, with_scores)
        kernels.do_again(query, keys, marks.int(), got)
        assert torch.equal(got.indices, torch.where(marks[:, None], want.indices, UNTOUCHED))
        assert torch.equal(got.lengths, torch.where(marks, want.lengths, UNTOUCHED))
        if with_scores:
            assert torch.equal(bits(got.scores), bits(torch.where(marks[:, None], want.scores, math.nan)))


def test_marks_that_a_program_does_not_see_at_once(monkeypatch):
    """One program, for want of memory, and more rows than it looks at together."""
    query, keys = world(300, 1, 64, [70], 64)
    marks = torch.zeros(300, dtype=torch.int32)
    marks[[0, 127, 128, 255, 256, 299]] = 1
    monkeypatch.setattr(kernels, "SCRATCH", 0)
    got = untouched(300, 9, True)
    kernels.do_again(query, keys, marks, got)
    want = select_topk(scores_of.paged_index_score(query.rows(marks.nonzero()[:, 0]), keys), 9)
    assert torch.equal(got.lengths >= 0, marks > 0)
    assert torch.equal(got.indices[marks > 0], want.indices)


def test_the_keys_that_a_row_sees_are_those_the_scores_see():
    """Wild positions, requests and lengths; a key that is seen has a score, and one that is not has none."""
    query, keys = cruel_world(23, 5, 64, [300, 0, 430], 64)
    query.weights.copy_(query.weights.nan_to_num(1.0, 1.0, 1.0))
    query.q.view(torch.uint8)[9, 0, 0] = 0
    keys = IndexKeys(keys.pages, keys.page_table.clamp(0, len(keys.pages) - 1), torch.tensor([300, -3, 2**62]))
    scores = scores_of.paged_index_score(query, keys, width=448)
    ends, levels, level_keys = torch.full((23,), -7), torch.zeros(23), torch.zeros(23, dtype=torch.int32)
    plan = kernels.make_plan(23, 5, 448, 50, 132)
    kernels.find_levels(query, keys, plan, ends, levels, level_keys)
    assert torch.equal(ends, (scores > -math.inf).sum(1))
    assert levels.tolist() == [LEAST] * 23
    assert level_keys.tolist() == [-1] * 23


def test_levels_are_those_of_the_sample():
    """All launches before collecting, in a row: of two requests with holes, a page that is not there, and rows of neither."""
    room, stride, generator = 640, 2, torch.Generator().manual_seed(3)
    query, keys = world(20, 3, 64, [640, 500], 64)
    keys.page_table[0, 3], keys.page_table[1, 2] = -1, 2**31 - 1
    query.requests[:] = torch.arange(20) % 2
    query.requests[[4, 9]] = torch.tensor([2, -1])
    query.positions[:] = torch.randint(300, 700, (20,), generator=generator)
    query.weights.abs_()
    scores = scores_of.paged_index_score(query, keys, width=room)
    plan = kernels.Plan(stride, 40, 3, 1, 32, 16, 32 * 16 + kernels.PAST)
    ends, levels, level_keys = torch.full((20,), -7), torch.zeros(20), torch.zeros(20, dtype=torch.int32)
    kernels.find_levels(query, keys, plan, ends, levels, level_keys)
    assert torch.equal(ends, torch.minimum(query.positions + 1, torch.tensor([640, 500, 0, 0])[query.requests]))
    short = ends <= plan.lists * plan.room
    assert 0 < short.sum() < 18
    assert (levels[short] == LEAST).all()
    assert (level_keys[short] == -1).all()
    key = sampled(room // stride, stride)
    for row in (~short).nonzero()[:, 0]:
        sample = scores[row, key[key < ends[row]]]
        assert 40 <= (sample >= levels[row]).sum() <= 43


def test_the_scratch_stays_small():
    """At 1M keys a row 24 programs hold 96 MB; short rows have one for each multiprocessor, and a row too long for that one in all."""
    assert kernels.scratch_rows(132, 2**20) == 24
    assert kernels.scratch_rows(132, 2**17) == 132
    assert kernels.scratch_rows(132, 2**26) == 1
    assert kernels.scratch_rows(132, 0) == 132


def test_the_memory_of_1024_rows_over_1m_keys():
    """What is alive at once, by the plan: the lists and beside them the sample; when these are gone, the scratch."""
    num, keys, topk, programs = 1024, 2**20, 2048, 132
    plan = kernels.make_plan(num, 64, keys, topk, programs)
    lists = num * (plan.row * 8 + plan.lists * 4)
    sample = num * 4 * (keys // plan.stride) + kernels.SAMPLES_BYTES
    scratch = 4 * keys * kernels.scratch_rows(programs, keys)
    selection = num * topk * 8
    assert selection + max(lists + sample, scratch) < 256 * 10**6
