"""Top-k of scores, the same set run after run.

```python
indices = torch.full((Q, topk), -1)
for i, row in enumerate(scores.tolist()):
    candidates = [p for p in range(ends[i]) if row[p] != -torch.inf]
    candidates.sort(key=lambda p: (row[p] != row[p], -row[p] if row[p] == row[p] else 0.0, p))  # NaN after every number
    kept = sorted(candidates[:topk])
    indices[i, : len(kept)] = torch.tensor(kept)
```
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from thresher.checks import FP32, INDEX, INT32, INT64, check_count, check_kind, check_tensor
from thresher.errors import require
from thresher.ops.arguments import check_paged, check_values
from thresher.ops.dispatch import AUTO, checks_values, choose, device_of
from thresher.ops.select.reference import (
    select_blocks_reference,
    select_in_blocks_reference,
    select_reference,
    select_slots_reference,
)
from thresher.types import SPACES, IndexKeys, IndexQuery, Selection


def select_topk(
    scores: Tensor,
    topk: int,
    space: str = "logical",
    positions: Tensor | None = None,
    ends: Tensor | None = None,
    impl: str = "auto",
    *,
    with_scores: bool = True,
) -> Selection:
    """Keep the topk best candidates of each row: score descending, ties to the smaller position.

    -inf marks "not a candidate" and is never kept, so a row may hold fewer than topk. NaN ranks below every number. -0.0 equals 0.0.

    Args:
        scores: fp32 ``[Q, N]``.
        topk: how many to keep, at least 1.
        space: the index space of the columns (or of ``positions``).
        positions: int32 or int64 ``[Q, N]``, ascending and -1 padded: column c stands for ``positions[:, c]``, -1 for no candidate.
            None: column c is position c.
        ends: int32 or int64 ``[Q]``, each in 0..N: the candidates of row i are among its columns ``0 .. ends[i] - 1``, whatever the others
            hold. None: all columns.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.
        with_scores: whether scores are returned beside.

    Returns:
        Selection with indices int32 ``[Q, topk]`` ascending and -1 padded, lengths, and scores beside (-inf where padded) or None.

    Raises:
        ThresherError: a shape, dtype or device that does not fit, topk below 1, an unknown space, with_scores no bool, positions out of
            order, an end outside 0..N, or an impl that cannot run. Where values are not checked (``ops.dispatch.checks_values``) ends are
            clamped.
    """
    device = _check(scores, topk, positions, ends)
    require(space in SPACES, f"space must be one of {', '.join(SPACES)}", repr(space), "name the index space")
    if ends is not None:
        check_values(("ends", ends, 0, scores.shape[1], "clamp them to the columns"))
    check_kind("with_scores", with_scores, bool, "pass True or False")
    return _select(scores, topk, space, positions, ends, impl, device, with_scores)


def select_visible(scores: Tensor, topk: int, ends: Tensor, impl: str, with_scores: bool) -> Selection:
    """``select_topk`` for a caller that knows its ends to be in bounds: the host reads no value, and so waits for nothing."""
    return _select(scores, topk, "logical", None, ends, impl, _check(scores, topk, None, ends), with_scores)


def select_topk_slots(
    scores: Tensor,
    topk: int,
    page_table: Tensor,
    requests: Tensor,
    page_size: int,
    positions: Tensor | None = None,
    ends: Tensor | None = None,
    impl: str = "auto",
) -> Selection:
    """``select_topk``, each selected position as the slot where its request's page table has it.

    Args:
        scores: fp32 ``[Q, N]``.
        topk: how many to keep, at least 1.
        page_table: int32 ``[B, max_pages]``, -1 where unused.
        requests: int64 ``[Q]``, the row of ``page_table`` that each row of scores belongs to.
        page_size: tokens in a page, at least 1.
        positions: int32 or int64 ``[Q, N]``, as for ``select_topk``: a column, or its entry here, is a position of the row's request.
        ends: int32 or int64 ``[Q]``, as for ``select_topk``.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Returns:
        Selection in the space "slot", without scores: int32 ``[Q, topk]`` in the order of the positions, so slots need not ascend;
        -1 padded at the end, and -1 in place where the table has no page for a position. ``lengths`` counts those in place too.

    Raises:
        ThresherError: what ``select_topk`` refuses, a page_table, requests or page_size that does not fit, a request outside 0..B - 1,
            or an impl that cannot run. Where values are not checked a kernel gives -1 for a request outside.
    """
    device = _check(scores, topk, positions, ends)
    check_tensor("page_table", page_table, INT32, ("requests", "max_pages"), "take PageTable.table")
    check_tensor("requests", requests, INT64, (scores.shape[0],), "pass one per row of scores, as .long()")
    check_count("page_size", page_size, 1, do="64 is usual")
    device_of(scores=scores, page_table=page_table, requests=requests)
    check_values(("requests", requests, 0, page_table.shape[0] - 1, "name a row of page_table"))
    if ends is not None:
        check_values(("ends", ends, 0, scores.shape[1], "clamp them to the columns"))
    kernel = choose("select_topk_slots", impl, device, lambda module: module.unsupported(*scores.shape, topk))
    if kernel is not None:
        picked: Selection = kernel(scores, topk, page_table, requests, page_size, positions, ends)
        return picked
    return select_slots_reference(scores, topk, page_table, requests, page_size, positions, ends)


def select_topk_in_blocks(
    scores: Tensor, topk: int, blocks: Tensor, block_size: int, space: str = "logical", impl: str = AUTO, *, with_scores: bool = True
) -> Selection:
    """``select_topk`` among the tokens of chosen blocks, whose scores stand block after block.

    Args:
        scores: fp32 ``[Q, m * block_size]``, of ``block_index_score``: column c is token ``c % block_size`` of block ``c // block_size``
            of the row.
        topk: how many to keep, at least 1.
        blocks: int32 ``[Q, m]``, ascending and -1 padded; the tokens of -1 are no candidates.
        block_size: tokens in a block, at least 1.
        space: the index space of the tokens.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.
        with_scores: whether scores are returned beside.

    Returns:
        Selection with indices int32 ``[Q, topk]``, the positions ``block * block_size + offset`` ascending and -1 padded, lengths, and
        scores beside (-inf where padded) or None.

    Raises:
        ThresherError: a shape, dtype or device that does not fit, topk or block_size below 1, an unknown space, with_scores no bool, blocks
            out of order, or an impl that cannot run.
    """
    check_count("topk", topk, 1, do="ask for at least one token")
    check_count("block_size", block_size, 1, do="pass tokens per block")
    check_tensor("blocks", blocks, INT32, ("num_queries", "m"), "pass a row of block numbers per query, as .int()")
    check_tensor("scores", scores, FP32, (blocks.shape[0], blocks.shape[1] * block_size), "take block_index_score of these blocks")
    require(space in SPACES, f"space must be one of {', '.join(SPACES)}", repr(space), "name the index space")
    device = device_of(scores=scores, blocks=blocks)
    _check_ascending("blocks", blocks, device)
    check_kind("with_scores", with_scores, bool, "pass True or False")
    kernel = choose("select_topk_in_blocks", impl, device, lambda module: module.unsupported(*scores.shape, topk))
    if kernel is None:
        return _beside(select_in_blocks_reference(scores, topk, blocks, block_size, space), with_scores)
    picked: Selection = kernel(scores, topk, blocks, block_size, space, with_scores=with_scores)
    return picked


def select_blocks(scores: Tensor, num_blocks: int, query: IndexQuery, keys: IndexKeys, block_size: int, impl: str = AUTO) -> Tensor:
    """The blocks of tokens that each query looks into: its request's first, its own, and those between with the best scores.

    Scores rank as in ``select_topk``: ties to the smaller block, NaN below every number, -inf never chosen. Block 0 and the own one need
    no score; what stands there, or behind, is not looked at.

    Args:
        scores: fp32 ``[Q, M]``, each query's score of the blocks of its request.
        num_blocks: how many to keep, at least 2; with only one block in sight, that one.
        query: Q queries; query i sees the tokens at ``0..positions[i]`` of its request, and its own block is that of the last one held.
        keys: the paged index keys; only lengths and sizes matter.
        block_size: tokens in a block, at least 1.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Returns:
        int32 ``[Q, min(num_blocks, M + 1)]``, ascending and -1 padded; -1 alone for a query that sees nothing.

    Raises:
        ThresherError: as for ``paged_index_score``, or scores of another shape, dtype or device, num_blocks below 2, block_size below 1, or
            an impl that cannot run.

    Source: HISA (arXiv 2603.28458), the first stage.
    """
    device = check_paged(query, keys)
    check_tensor("scores", scores, FP32, (query.num_queries, "num_blocks"), "pass a row of block scores per query")
    check_count("num_blocks", num_blocks, 2, do="keep the first and the query's own at least")
    check_count("block_size", block_size, 1, do="pass tokens per block")
    device_of(query=query.q, scores=scores)
    kernel = choose("select_blocks", impl, device, lambda module: module.unsupported_blocks(scores.shape[1]))
    if kernel is None:
        return select_blocks_reference(scores, num_blocks, query, keys, block_size)
    blocks: Tensor = kernel(scores, num_blocks, query, keys, block_size)
    return blocks


def _select(
    scores: Tensor, topk: int, space: str, positions: Tensor | None, ends: Tensor | None, impl: str, device: torch.device, with_scores: bool
) -> Selection:
    kernel = choose("select_topk", impl, device, lambda module: module.unsupported(*scores.shape, topk))
    if kernel is None:
        return _beside(select_reference(scores, topk, space, positions, ends), with_scores)
    picked: Selection = kernel(scores, topk, space, positions, ends, with_scores=with_scores)
    return picked


def _beside(picked: Selection, with_scores: bool) -> Selection:
    return picked if with_scores else replace(picked, scores=None)


def _check(scores: Tensor, topk: int, positions: Tensor | None, ends: Tensor | None) -> torch.device:
    check_tensor("scores", scores, FP32, ("num_queries", "n"), "convert them")
    check_count("topk", topk, 1, do="ask for at least one token")
    if positions is not None:
        check_tensor("positions", positions, INDEX, tuple(scores.shape), "pass one per score")
    if ends is not None:
        check_tensor("ends", ends, INDEX, (scores.shape[0],), "pass one per row of scores")
    device = device_of(scores=scores, positions=positions, ends=ends)
    if positions is not None:
        _check_ascending("positions", positions, device)
    return device


def _check_ascending(name: str, rows: Tensor, device: torch.device) -> None:
    if checks_values(device):
        before, after = rows[:, :-1], rows[:, 1:]
        ordered = torch.where(before < 0, after < 0, (after > before) | (after < 0))
        require(bool(ordered.all()), f"{name} must ascend strictly, with -1 at the end", "another order", "sort each row")
