"""Selectors that score every visible key do it through ``score_select``, and cut queries up only where that holds a matrix of scores."""

from __future__ import annotations

import pytest
import torch

from thresher.ops.score_select import score_select
from thresher.selectors import DSA, MISA, MISARandom, MISARerank, scan
from thresher.selectors import rows as row_tools
from thresher.types import IndexQuery, Selection

from .worlds import make_world

# selector -> heads and topk that its scan has
SCANS = {
    DSA(7): (4, 7),
    MISA(active_heads=2, block_size=32, topk=7): (2, 7),
    MISARerank(active_heads=1, block_size=32, candidates=8, topk=7): (1, 8),
    MISARandom(active_heads=3, topk=7): (3, 7),
}


@pytest.mark.parametrize("selector", SCANS, ids=repr)
def test_queries_stay_together_where_no_matrix_is_held(monkeypatch, selector):
    world = make_world([60, 40], seed=1)
    pairs = world.every_pair()
    query, keys = world.query(pairs), world.view()
    asked, scanned = set(), []

    def counted(rows, *given, **options):
        scanned.append(rows.num_queries)
        return score_select(rows, *given, **options)

    def able(rows, _, topk):
        asked.add((rows.num_heads, topk))
        return "kernels"

    monkeypatch.setattr(scan, "score_select", counted)
    monkeypatch.setattr(row_tools, "CPU_ELEMENTS", 1200)
    want = selector.select(query, keys)
    assert max(scanned) <= 1200 // 60
    assert sum(scanned) == 100
    scanned.clear()
    for module in (scan, row_tools):
        monkeypatch.setattr(module, "one_pass", able)
    got = selector.select(query, keys)
    assert scanned == [100]
    assert asked == {SCANS[selector]}
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.scores, want.scores)


@pytest.mark.parametrize("selector", SCANS, ids=repr)
def test_nobody_looks_for_the_longest_request_without_need(monkeypatch, selector):
    """A look waits for the device."""
    world = make_world([60, 40], seed=1)
    query, keys = world.query(world.every_pair()), world.view()
    monkeypatch.setattr(row_tools, "longest", lambda keys: pytest.fail("it was looked for"))
    assert selector.select(query, keys).topk == 7


def test_chunks_are_all_but_equal(monkeypatch):
    """1024 rows of which 1023 would fit are two halves, and not one row that is left over."""
    monkeypatch.setattr(row_tools, "CPU_ELEMENTS", 1023 * 7)
    query, seen = IndexQuery(torch.zeros(1024, 1, 4), torch.zeros(1024, 1), torch.arange(1024), torch.zeros(1024, dtype=torch.int64)), []

    def select_rows(rows: IndexQuery, where: slice) -> Selection:
        seen.append((where.start, where.stop, rows.num_queries))
        return Selection(rows.positions[:, None].int(), torch.ones(rows.num_queries, dtype=torch.int64))

    got = row_tools.in_chunks(query, 7, select_rows)
    assert seen == [(0, 512, 512), (512, 1024, 512)]
    assert torch.equal(got.indices[:, 0], torch.arange(1024, dtype=torch.int32))
