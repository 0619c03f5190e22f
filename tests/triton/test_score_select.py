"""Levels, interpreted, and the choice from lists, on a CPU; what lies between runs on a GPU alone, so it is spelt out here in Python."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace

import pytest
import torch

from thresher.ops import select_topk
from thresher.ops.score_select.marks import keeping_marks
from thresher.types import Selection

from ..cuda.threads import in_order, library, needs_compiler
from .test_index_score import world

kernels = importlib.import_module("thresher.ops.score_select.triton")
parts = importlib.import_module("thresher.ops.score_select.triton_kernels")
settling = importlib.import_module("thresher.ops.score_select.settle")
collecting = importlib.import_module("thresher.ops.score_select.gluon_lists")
pytestmark = pytest.mark.skipif(not kernels.INTERPRET, reason="the kernels were imported before the interpreter was asked for")
WHOLE = 200  # keys, up to which a row has no level
LEAST = torch.finfo(torch.float32).min
ROWS = ("normal", "rounded", "equal", "relu", "nan", "ascending", "descending", "zeros", "some least", "least", "short", "empty")


def rows_of(width: int, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of each kind, and how much of it is seen. Collecting sees -inf where the least score is meant."""
    scores = torch.randn(len(ROWS), width, generator=torch.Generator().manual_seed(width))
    scores[1], scores[2] = scores[1].round(), 1.5
    scores[3].relu_()
    scores[4, ::3] = math.nan
    scores[5], scores[6] = scores[5].sort().values, scores[6].sort(descending=True).values
    scores[7] = 0.0
    scores[7, ::2] = -0.0
    scores[8, ::4], scores[8, 1::8] = -math.inf, LEAST
    scores[9, topk // 2 :], scores[9, -9:] = -math.inf, LEAST
    return scores, torch.tensor([width] * 3 + [width - 5] + [width] * 6 + [topk - 3, 0])


def sampled(columns: int, stride: int) -> torch.Tensor:
    """The key of each of the sample's columns, by ``sampled_key`` in Python's numbers."""

    def drawn(x: int) -> int:
        return (x * 0x9E3779B1 + 2**31) % 2**32 - 2**31

    return torch.tensor([at * stride + (drawn(drawn(at) ^ drawn(at) >> 15) >> 16) % stride for at in range(columns)])


def find_levels(scores, ends, plan):
    width = kernels.sampled_columns(scores.shape[1], plan.stride)
    key = sampled(width, plan.stride)
    sample = scores[:, key.clamp(max=scores.shape[1] - 1)].clamp(min=LEAST).masked_fill(key >= ends[:, None], -math.inf)
    levels, level_keys = torch.full(ends.shape, LEAST), torch.full(ends.shape, -1, dtype=torch.int32)
    parts.level_kernel[(len(ends),)](
        sample, ends, levels, level_keys, width, plan.stride, plan.want, plan.slack, WHOLE, sample.stride(0),
        BLOCK=1 << (width - 1).bit_length(), WARPS=1,
    )  # fmt: skip
    return levels, level_keys


def collect(scores, ends, levels, level_keys, plan):
    """``found`` and ``counts`` as of ``collect_kernel``: each (run, place in a tile) has a list, which is counted on where it is full."""
    found = torch.full((len(ends), plan.lists, plan.room), -7)
    counts, places = torch.zeros(len(ends), plan.lists, dtype=torch.int32), plan.lists // plan.runs
    for row in range(len(ends)):
        mine = scores[row, : ends[row]]
        key = torch.arange(len(mine))
        passes = (mine > levels[row]) | ((mine == levels[row]) & (key <= level_keys[row]))
        for n in key[passes].tolist():
            which = n // 64 % plan.runs * places + n % places
            if counts[row, which] < plan.room:
                found[row, which, counts[row, which]] = (int(mine[n].view(torch.int32)) << 32) | n
            counts[row, which] += 1
    return found, counts


@pytest.fixture
def settle(monkeypatch):
    """``settle(found, counts, ends, topk, with_scores)``: the kernel, whose threads take turns, run in three orders."""

    def run(found, counts, ends, topk, with_scores, held=None):
        num, lists, room = found.shape
        plan = kernels.Plan(2, 30, 2, 1, lists, room, lists * room)
        found = torch.cat((found.flatten(1), torch.full((num, 5), -7)), 1)
        if held is not None:
            shared = settling.shared_memory(plan, topk, 2**17)
            small = settling.Memory(1, settling.LEAST_WORDS, held, shared.size)  # and a mask in parts
            monkeypatch.setattr(settling, "shared_memory", lambda *_: small)
        results = []
        for order in (0, 1, 7):
            monkeypatch.setattr(settling.launch, "launch", in_order(order))
            results.append(settling.settle(found, counts, ends, plan, topk, 2**17, with_scores))
        for picked, redo in results[1:]:
            assert torch.equal(picked.indices, results[0][0].indices)
            assert torch.equal(redo, results[0][1])
        picked, redo = results[0]
        return picked.indices, picked.lengths, picked.scores, redo

    return run


@needs_compiler
@pytest.mark.parametrize(("with_scores", "held"), [(True, None), (False, None), (True, 100)])
@pytest.mark.parametrize(("runs", "lists", "room"), [(2, 128, 16), (3, 96, 24), (1, 64, 40)])
@pytest.mark.parametrize(("width", "topk", "stride"), [(1500, 200, 2), (2050, 200, 4), (180, 64, 2)])
def test_levels_and_lists_hold_the_answer(width, topk, stride, runs, lists, room, with_scores, held, settle):
    """Every row but those with NaN or too many of the least score is settled at once, plateaus included, and as two steps would have it."""
    hits = topk / stride
    plan = kernels.Plan(stride, math.ceil(hits + 6 * math.sqrt(hits) + 4), 2, runs, lists, room, lists * room)
    scores, ends = rows_of(width, topk)
    levels, level_keys = find_levels(scores, ends, plan)
    assert (levels[0] > LEAST) == (width > WHOLE)
    assert levels[9] == LEAST
    found, counts = collect(scores, ends, levels, level_keys, plan)
    indices, lengths, beside, redo = settle(found, counts, ends, topk, with_scores, held)
    want = select_topk(scores.clamp(min=LEAST).masked_fill(torch.arange(width) >= ends[:, None], -math.inf), topk, impl="reference")
    for row, name in enumerate(ROWS):
        if redo[row]:
            assert name in ("nan", "least")
            assert lengths[row] == 0
            assert (indices[row] == -1).all()
            continue
        assert name != "least"
        assert torch.equal(indices[row], want.indices[row]), name
        assert lengths[row] == want.lengths[row], name
        assert not with_scores or torch.equal(beside[row], want.scores[row]), name


@needs_compiler
def test_a_sample_too_poor_for_a_level_lets_all_pass(settle):
    """All but a few of a row's sample are NaN, those few are its best, and what is not in the sample fits into the lists."""
    plan = kernels.Plan(2, 86, 2, 2, 128, 16, 128 * 16)
    scores, ends = torch.randn(2, 1500, generator=torch.Generator().manual_seed(0)), torch.tensor([1500, 1500])
    scores[0, sampled(750, 2)] = math.nan
    scores[0, 5:25] = 9.0
    levels, level_keys = find_levels(scores, ends, plan)
    assert (levels[0], level_keys[0]) == (LEAST, -1)
    indices, lengths, _, redo = settle(*collect(scores, ends, levels, level_keys, plan), ends, 64, True)
    want = select_topk(scores, 64, impl="reference")
    assert redo.tolist() == [0, 0]
    assert torch.equal(indices, want.indices)
    assert torch.equal(lengths, want.lengths)


@pytest.mark.parametrize(("dim", "stride"), [(128, 0), (64, 2), (128, 4), (64, 32)])
def test_rows_and_the_sample_are_prepared(dim, stride):
    """Out of positions, requests and pages that need not be there, and of any table's strides."""
    tile, room = kernels.TILE, 300 * kernels.TILE
    generator = torch.Generator().manual_seed(1)
    pages = torch.randint(256, (500, tile, 1, dim + 4), generator=generator, dtype=torch.uint8)
    table = torch.randint(-3, 510, (300, 2), generator=generator, dtype=torch.int32).T.flip(0)
    positions, requests = (torch.randint(low, high, (200,), generator=generator) for low, high in ((-1, 20000), (-1, 3)))
    lengths = torch.tensor([7000, 90000])
    columns = kernels.sampled_columns(room, stride) if stride else 0
    ends, last = torch.full((200,), -9), torch.full((200,), -9)
    levels, level_keys = torch.zeros(200), torch.zeros(200, dtype=torch.int32)
    made, made_table = torch.full((2 * columns // tile, tile, 1, dim + 4), 9, dtype=torch.uint8), torch.full((2, columns // tile), -9).int()
    words = [held.view(-1).view(kind) for held in (pages, made) for kind in (torch.int32, torch.float32)]
    parts.prepare_kernel[(-(-max(200, 2 * columns) // 64),)](
        positions, requests, lengths, *words[:2], table, ends, levels, level_keys, last, *words[2:], made_table,
        200, 2, room, 500, stride, columns, tile * (dim // 4 + 1), *table.stride(),
        PAGE=tile, WORDS=dim // 4, BLOCK=64, SAMPLED=stride > 0,
    )  # fmt: skip
    known = (requests >= 0) & (requests < 2)
    want = (torch.minimum(positions + 1, lengths.clamp(max=room)[requests.where(known, 0)])).where(known, 0)
    assert torch.equal(ends, want)
    assert (levels == LEAST).all()
    assert (level_keys == -1).all()
    if not stride:
        return
    key = sampled(columns, stride)
    assert (key // stride == torch.arange(columns)).all(), "one of every stride keys"
    offsets = torch.bincount(key % stride, minlength=stride).float() * stride / columns
    assert ((offsets > 0.5) & (offsets < 1.5)).all(), "any of them"
    assert torch.equal(last, (key < want[:, None]).sum(1) - 1)
    assert torch.equal(made_table, torch.arange(2 * columns // tile).int().view(2, -1))
    for request in range(2):
        page = table[request][(key // tile).clamp(max=299)]
        there = (key < min(room, int(lengths[request]))) & (page >= 0) & (page < 500)
        assert there.any()
        values, scales = (pages.view(500, -1)[:, part] for part in (slice(0, tile * dim), slice(tile * dim, None)))
        got = made.view(2, columns // tile, -1)[request]
        got_values, got_scales = got[:, : tile * dim].reshape(columns, dim), got[:, tile * dim :].reshape(columns, 4)
        at = page.where(there, 0).long()
        assert torch.equal(got_values, values.view(500, tile, dim)[at, key % tile] * there[:, None])
        assert torch.equal(got_scales[there], scales.reshape(500, tile, 4)[at, key % tile][there])
        assert got_scales.contiguous().view(torch.float32)[~there].isnan().all()


def test_the_sample_of_what_stands_together_is_no_worse():
    """Of 2048 keys that stand together in pieces a sample holds its share, give or take less than if they stood anywhere."""
    generator = torch.Generator().manual_seed(0)
    key = sampled(2**17 // 32, 32)
    for piece, deviation in ((1, 8.0), (16, 8.0), (128, 4.0), (2048, 1.0)):
        starts = torch.stack([torch.randperm(2**17 // piece, generator=generator)[: 2048 // piece] for _ in range(200)]) * piece
        best = torch.zeros(200, 2**17 // piece, dtype=torch.bool).scatter_(1, starts // piece, True)
        hits = best[:, key // piece].sum(1).float()
        assert abs(hits.mean() - 64) < 3
        assert hits.std() < deviation * 1.2


@needs_compiler
def test_a_full_list_is_done_again(settle):
    plan = kernels.Plan(2, 30, 2, 2, 128, 8, 1024)
    scores, ends = rows_of(1500, 64)
    levels = torch.full(ends.shape, LEAST)
    found, counts = collect(scores, ends, levels, torch.full(ends.shape, -1), plan)
    *_, redo = settle(found, counts, ends, 64, True)
    full = counts.amax(1) > 8
    assert full.sum() == 8, "all but the short ones, the one with NaN and the one that is mostly of the least score"
    assert torch.equal(redo[full], torch.ones_like(redo[full]))


@needs_compiler
def test_shared_memory_is_laid_out_as_the_kernel_has_it():
    assert library().bytes_before_mask() == settling.BEFORE_MASK
    assert library().least_words() == settling.LEAST_WORDS


@pytest.mark.parametrize("heads", [64, 32, 8])
@pytest.mark.parametrize("topk", [512, 2048, 8192])
@pytest.mark.parametrize("room", [4096, 2**15, 2**17, 2**18, 2**20, 2**21])
def test_shared_memory_holds_what_is_likely(heads, topk, room):
    plan = kernels.make_plan(1024, heads, room, topk, 132)
    memory = settling.shared_memory(plan, topk, room)
    assert memory.rows * (memory.size + 1024 * (memory.rows > 1)) <= settling.launch.SHARED
    assert memory.words >= min(settling.MOST_WORDS, room // 32)
    likely = min((plan.want + plan.slack) * plan.stride, plan.lists * plan.room, room)
    assert memory.held >= min(1.05 * likely, plan.lists * plan.room, room)
    keys = 0 if 32 * memory.words >= room else topk
    assert memory.size >= settling.BEFORE_MASK + 4 * (memory.words + plan.lists + 1 + keys) + max(8 * memory.held, 4 * topk * (not keys))
    assert (topk, room) != (2048, 2**17) or memory.rows == 3
    assert (topk, room, heads) != (8192, 2**17, 8) or memory.rows == 2


def test_the_plan():
    """Lists hold a row of the largest size that is collected whole, and what a level brings give or take six deviations."""
    cases = ((1024, 64, 2048), (256, 32, 2048), (64, 20, 512), (4096, 64, 4096), (1024, 8, 2048), (1024, 16, 2048), (1, 1, 1))
    for num, heads, topk in cases:
        plan = kernels.make_plan(num, heads, 2**17, topk, 132)
        whole = plan.lists * plan.room
        tiles = 1 if heads > kernels.QUADS else kernels.layout(heads)["TILES"]
        turns = torch.arange(-(-whole // (64 * tiles)))
        each = 1 if heads > kernels.QUADS else tiles * 2  # keys of a turn that share a list
        assert torch.bincount(turns % plan.runs).max() * each <= plan.room
        assert plan.room % each == 0
        unseen = collecting.SPAN.value // tiles
        assert unseen * each <= kernels.PAST, "what a list may run over before it is noticed"
        expected = plan.want * plan.stride / plan.lists
        assert expected + 6 * math.sqrt(expected) <= plan.room
        hits = topk / plan.stride  # of which a sample has as many as the level takes in one of 10 million rows, or fewer
        more = sum(math.exp(n * math.log(hits) - hits - math.lgamma(n + 1)) for n in range(plan.want, plan.want + 999))
        assert more < 1e-7
        assert num * whole * 8 <= 100e6 * max(num * topk / 2**21, 1)
        assert kernels.make_plan(num, heads, 8192, topk, 132).stride == 0, "short rows are collected whole"


def test_lists_of_the_rows_at_a_time_are_bounded():
    for heads in (1, 8, 16, 32, 64):
        for room in (4096, 2**17, 2**20):
            for topk in (64, 2048, 4096, 8192):
                rows = kernels.rows_at_once(heads, room, topk, 132)
                assert rows * kernels.make_plan(rows, heads, room, topk, 132).row * 8 <= 235e6
                assert rows == 1024 or topk * room > 2**31
    assert kernels.rows_at_once(8, 2**17, 8192, 132) == 1024


def test_units_keep_the_multiprocessors_busy():
    for blocks in (1, 7, 32, 64, 100, 128, 140, 200, 1000):
        units = blocks * kernels.share_out(blocks, 16, 132)
        turns = -(-units // 132)
        assert units / (turns * 132) > 0.9 or blocks * 16 < 132
    assert kernels.share_out(128, 8, 132) == 1
    assert kernels.share_out(32, 16, 132) == 4


def test_few_queries_and_short_rows_are_left_to_the_two_steps():
    assert kernels.worthwhile(8, 64, 1, 20000, True)
    assert kernels.worthwhile(32, 64, 1, 70000, True)
    assert not kernels.worthwhile(8, 63, 1, 2**20, True)
    assert not kernels.worthwhile(8, 4096, 1, 16384, True)
    assert not kernels.worthwhile(32, 4096, 1, 20000, True)
    assert kernels.worthwhile(64, 64, 1, 70000, True)
    assert not kernels.worthwhile(64, 4096, 1, 2**15, True)


@pytest.mark.parametrize("with_scores", [True, False])
def test_many_queries_are_taken_a_thousand_at_a_time(monkeypatch, with_scores):
    """And the rows done again are told to whoever asks, and to nobody else."""
    query, keys = world(2 * kernels.ROWS + 3, 1, 64, [9])
    sizes = []

    def first_try(rows, _, topk, with_scores):
        sizes.append(rows.num_queries)
        beside = torch.zeros(len(rows.positions), topk) if with_scores else None
        return Selection(rows.positions[:, None].expand(-1, topk).int(), rows.requests.clone(), scores=beside), rows.positions % 2

    def do_again(rows, _, redo, selection):
        selection.lengths[redo > 0] = -5

    monkeypatch.setattr(kernels, "first_try", first_try)
    monkeypatch.setattr(kernels, "do_again", do_again)
    with keeping_marks() as marks:
        got = kernels.score_select(query, keys, 2, with_scores)
    assert sizes == [kernels.ROWS, kernels.ROWS, 3]
    assert torch.equal(got.indices, query.positions[:, None].expand(-1, 2).int())
    assert torch.equal(got.lengths, torch.where(query.positions % 2 > 0, -5, query.requests))
    assert torch.equal(torch.cat(marks), query.positions % 2)
    assert (got.scores is not None) == with_scores
    kernels.score_select(query.rows(slice(0, 0)), keys, 2)
    assert (sizes[-1], len(marks)) == (0, 3)


def test_what_the_kernels_cannot_take_has_a_reason(monkeypatch):
    """Shapes alone are asked about: so a CUDA graph may be recorded."""
    query, keys = world(70, 32, 128, [70])
    assert kernels.unsupported(query, keys, 9) == "cannot be interpreted"
    monkeypatch.setattr(kernels, "INTERPRET", False)
    assert kernels.unsupported(query, keys, 9) == "needs compute capability 9.0, and Triton 3.6.x"
    monkeypatch.setattr(kernels, "runs_gluon", lambda tensor: True)
    monkeypatch.setattr(kernels, "installed", lambda package: package != "cuda.bindings")
    why_not = "the package cuda-bindings is not installed, which comes with PyTorch's CUDA builds"
    assert kernels.unsupported(query, keys, 9) == why_not
    monkeypatch.setattr(kernels, "installed", lambda package: True)

    def why(topk=9, held=keys, **changes):
        return kernels.unsupported(replace(query, **changes), held, topk)

    assert why() is None
    assert why(8192) is None
    assert why(8193) == "topk is at most 8192, not 8193"
    assert "float8_e4m3fn" in why(q=query.q.float())
    assert "32" in why(q=query.q[:, :, :32])
    assert why(held=world(1, 1, 128, [70], 128)[1]) == "needs pages of 64 keys, not 128"
    assert why(held=replace(keys, pages=keys.pages[:0])) == "needs a page and a request"
    assert why(held=replace(keys, page_table=keys.page_table[:0], lengths=keys.lengths[:0])) == "needs a page and a request"
    wide = replace(keys, page_table=torch.zeros(1, 2**14, dtype=torch.int32))
    assert why(1024, wide) is None
    assert why(1023, wide) == "needs a larger topk than 1023 for a page table with room for 1048576 keys"
    many = replace(wide, page_table=wide.page_table.expand(70, -1), lengths=torch.zeros(70, dtype=torch.int64))
    assert why(2048, many) == "needs fewer requests than 70 for a page table with room for 1048576 keys"
