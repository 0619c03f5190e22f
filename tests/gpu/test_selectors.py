"""Whole selectors on kernels alone against the reference on a CPU: their sets agree as docs/numerics.md says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from thresher.bench.cases import Case
from thresher.bench.check import BITS, score_bound, selections_agree
from thresher.bench.inputs import CRUEL, make_inputs
from thresher.ops import head_mass, route_heads
from thresher.ops.dispatch import using
from thresher.ops.hisa_select.reference import choose_blocks
from thresher.selectors import DSA, HISA, MISA, MISARerank
from thresher.selectors.base import Selector
from thresher.selectors.scan import block_means
from thresher.types import IndexKeys, IndexQuery, Selection

from .compare import fail_on
from .machine import DEVICE, sized

PREFILL = sized(Case("prefill", 4, 32768, 64), Case("prefill", 3, 330, 16, 64, 32))
DECODE = sized(Case("decode", 3, 5000, 64), Case("decode", 2, 300, 8, 64, 32))
TOPK = sized(2048, 32)
SELECTORS = sized(
    [DSA(), MISA(), MISARerank(), HISA(), MISA(16, 128)],
    [DSA(32), MISA(4, 16, 32), MISARerank(4, 16, 64, 32), HISA(16, 6, 32)],
)


def first_stage(selector: Selector, query: IndexQuery, keys: IndexKeys) -> torch.Tensor | None:
    """What a selector decides before it ranks tokens, int64 ``[Q, n]``: heads or blocks."""
    if isinstance(selector, DSA):
        return None
    if isinstance(selector, HISA):
        return choose_blocks(query, keys, block_means(keys, selector.block_size, None), selector.num_blocks, selector.block_size)
    means = block_means(keys, selector.block_size, None)
    return route_heads(head_mass(query, means, keys, selector.block_size), selector.active_heads)


def rows_of(picked: Selection, keep: torch.Tensor) -> Selection:
    return Selection(picked.indices.cpu()[keep], picked.lengths.cpu()[keep], picked.space, picked.scores.cpu()[keep])


@pytest.mark.parametrize("inputs", ["normal", *CRUEL])
@pytest.mark.parametrize("selector", SELECTORS, ids=lambda selector: repr(selector).replace(" ", ""))
@pytest.mark.parametrize("case", [PREFILL, DECODE], ids=lambda case: case.name)
def test_sets_agree(case, selector, inputs, record_property):
    made = make_inputs(case, inputs, 7, torch.device("cpu"))
    query, keys = made.query, made.keys
    if case.kind == "prefill":  # also a query early in the context, and one with fewer keys than are kept
        query = replace(query, positions=query.positions.clone())
        query.positions[:2] = torch.tensor([case.length // 2, TOPK // 2])
    moved = IndexQuery(*(x.to(DEVICE) for x in (query.q, query.weights, query.positions, query.requests)))
    there = IndexKeys(keys.pages.to(DEVICE), keys.page_table.to(DEVICE), keys.lengths.to(DEVICE))
    with using("triton"):
        got = selector.select(moved, there)
        bare = selector.select_indices(moved, there)
        mine = first_stage(selector, moved, there)
    with using("reference"):
        want = selector.select(query, keys)
        theirs = first_stage(selector, query, keys)
        bound = score_bound(query, keys, sized(BITS["cuda"], BITS["cpu"] - 1))
    same = torch.ones(query.num_queries, dtype=torch.bool)
    problems = []
    if mine is not None:
        # Heads or blocks on the edge may fall either way, one at a time and seldom; such a row ranks other candidates. Among plateaus
        # whole groups of blocks score alike, and there an edge may move a group.
        odd = [len(set(a) - set(b)) for a, b in zip(mine.tolist(), theirs.tolist(), strict=True)]
        same = torch.tensor(odd) == 0
        record_property("measured", f"{case.name}, {inputs}, {selector}: heads or blocks that differ {odd}")
        if inputs != "cruel-plateaus" and (max(odd) > 1 or int((~same).sum()) > 1):
            problems.append(f"heads or blocks that differ, by row: {odd}")
    problems.append(selections_agree(rows_of(got, same), rows_of(want, same), bound[same], query.rows(same), keys))
    with using("triton"):
        again = selector.select(moved, there)
        last = query.num_queries - 1
        alone = selector.select(moved.rows(slice(last, last + 1)), there)
    problems.append(None if torch.equal(again.indices, got.indices) else "a second run has another set")
    problems.append(None if torch.equal(bare.indices, got.indices) and bare.scores is None else "without scores it has another set")
    width = alone.topk
    problems.append(None if torch.equal(alone.indices[0], got.indices[last, :width]) else "a query alone has another set than in the batch")
    fail_on(problems)
