"""keep_best's kernel in the interpreter against the reference, bit for bit, and compiled for an H100."""

from __future__ import annotations

import pytest
import torch

from thresher.ops.keep_best import LOGICAL_END
from thresher.ops.keep_best import triton as kernel
from thresher.ops.keep_best.reference import keep_best_reference

from ..ops.candidates import INF, KINDS, NAN, propose

WALKED = 512


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Fresh memory holds the worst bytes: NaN as floats, far out of range as indices."""
    empty = torch.empty

    def poisoned(*size, **options):
        made = empty(*size, **options)
        return made.fill_(NAN if made.is_floating_point() else torch.iinfo(made.dtype).max - 7)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(params=["held", "walked"])
def path(monkeypatch, request):
    """Whether a program holds all candidates, or reads them again for each count."""
    if request.param == "walked":
        monkeypatch.setattr(kernel, "MOST_HELD", 0)
        monkeypatch.setattr(kernel, "WALKED", WALKED)
    monkeypatch.setattr(kernel, "WRITTEN", 512)
    return request.param


def check(scores: torch.Tensor, positions: torch.Tensor, topk: int, granularity: int = 1, rank: int | None = None) -> None:
    for r in range(len(scores)) if rank is None else (rank,):
        got = kernel.keep_best(scores, positions, r, topk, granularity)
        want = keep_best_reference(scores, positions, r, topk, granularity)
        assert got.space == "local"
        assert (got.indices.dtype, got.lengths.dtype, got.scores.dtype) == (torch.int32, torch.int64, torch.float32)
        assert torch.equal(got.lengths, want.lengths)
        assert torch.equal(got.indices, want.indices)
        assert torch.equal(got.scores.view(torch.int32), want.scores.view(torch.int32))


@pytest.mark.parametrize("kind", KINDS)
def test_cruel_candidates(path, kind):
    scores, positions = propose(kind, 3, 3, 70)
    for topk, granularity in ((70, 1), (1, 64)):
        check(scores, positions, topk, granularity, 2)


@pytest.mark.parametrize("ranks", [16, 32])
def test_more_than_a_half_word_counts(ranks):
    """All of them, or all but a few, are at least what is probed."""
    assert ranks * 2048 <= kernel.MOST_HELD
    positions = torch.arange(2048, dtype=torch.int32).expand(ranks, 1, 2048).contiguous()
    few = torch.zeros(ranks, 1, 2048)
    few[0, 0, :3] = torch.tensor([-1.0, 2.0, -INF])
    for scores in (torch.full((ranks, 1, 2048), 3.0), few, torch.randn(ranks, 1, 2048, generator=torch.Generator().manual_seed(ranks))):
        for topk in (1, 2048, ranks * 2048 - 1):
            check(scores, positions, topk, rank=0)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks(path, ranks):
    scores, positions = propose("zeros of both signs", ranks, 2, 40, ranks)
    check(scores, positions, 40, 4, ranks // 2)


@pytest.mark.parametrize("width", [1, 127, 128, 512, 700])
def test_widths(path, width):
    """128 and 512 need no mask where they are held; 700 are written in two tiles."""
    for kind in ("normal", "all equal"):
        check(*propose(kind, 2, 1, width), width, 1, 1)


def test_the_last_query_needs_nothing_of_the_first(path):
    scores, positions = propose("coarse", 2, 5, 60)
    check(scores, positions, 60, 1, 1)
    alone = kernel.keep_best(scores[:, 3:4], positions[:, 3:4], 1, 60)
    assert torch.equal(alone.indices[0], kernel.keep_best(scores, positions, 1, 60).indices[3])


@pytest.mark.parametrize("topk", [1, 64, 65, 96, 128, 129])
def test_about_as_many_candidates_as_are_kept(path, topk):
    """128 in all, of which 96 are no NaN and 64 are above -inf; the worst have the smallest positions."""
    scores, _ = propose("normal", 2, 1, 64)
    positions = torch.arange(64, dtype=torch.int32).expand(2, 1, 64)
    scores[:, :, :16], scores[:, :, 16:32] = NAN, -INF
    for best in (scores, torch.where(scores > -INF, INF, scores)):
        check(best, positions, topk, 1, 0)
    scores[:, :, :16], scores[:, :, 16:32] = -INF, NAN
    check(scores, positions, topk, 1, 0)


@pytest.mark.parametrize("spread", ["side by side", "far apart", "one at the end", "on one rank"])
@pytest.mark.parametrize("granularity", [1, 4])
def test_ties_at_the_cut(path, spread, granularity):
    """Some candidates above, and more ties than there is room for, wherever they are."""
    width, most = 60, LOGICAL_END // 2 - granularity
    positions = torch.arange(width, dtype=torch.int32).expand(2, 1, width).clone()
    if spread == "far apart":
        positions *= most // width
        positions[:, :, -1] = most
    elif spread == "one at the end":
        positions[:, :, -1] = most
    scores = torch.zeros(2, 1, width)
    scores[:, :, ::7] = 1.0
    if spread == "on one rank":
        scores[0] -= 0.5
    for topk in (19, 60, 119):
        check(scores, positions, topk, granularity)


@pytest.mark.parametrize("width", [3, 16, 100])
def test_the_first_of_ties(path, width):
    """Position 0 alone, which as a number is -0.0."""
    positions = (torch.arange(width, dtype=torch.int32) * 3).expand(2, 1, width)
    check(torch.zeros(2, 1, width), positions, 1)


@pytest.mark.parametrize("scale", [1e-44, 3e37])
def test_scores_whose_spread_has_no_square(path, scale):
    scores, positions = propose("normal", 2, 1, 100)
    check(scores * scale, positions, 100, 1, 0)
    check(-scores.abs() * scale, positions, 100, 1, 0)


def test_strides(path):
    scores, positions = propose("cruel", 4, 3, 40)
    both = torch.stack([positions, scores.view(torch.int32)], 1)
    check(both[:, 1].view(torch.float32), both[:, 0], 50, 4, 2)
    wide = torch.full((4, 6, 90), 7, dtype=torch.int32)
    wide[:, ::2, 3:43] = positions
    check(scores.transpose(0, 1).contiguous().transpose(0, 1), wide[:, ::2, 3:43], 50, 1, 3)
    check(scores.transpose(1, 2).contiguous().transpose(1, 2), positions, 50, 1, 0)


def test_nothing_to_keep(path):
    nobody = kernel.keep_best(torch.zeros(2, 0, 5), torch.zeros(2, 0, 5, dtype=torch.int32), 1, 4)
    assert (nobody.indices.shape, nobody.lengths.shape) == ((0, 4), (0,))
    for width in (0, 5):
        check(torch.full((2, 3, width), INF), torch.full((2, 3, width), -1, dtype=torch.int32), 4)


COMPILE = """
import torch
from thresher.ops.keep_best import triton as kernel

all_sizes = (2, 2048, 1), (2, 2048, 64), (4, 2048, 1), (8, 2048, 1), (3, 2000, 1), (1, 1, 1), (64, 2048, 1), (16, 2048, 1)
for ranks, width, granularity in all_sizes:
    both = torch.empty(ranks, 2, 8, width, dtype=torch.int32)
    kernel.keep_best(both[:, 1].view(torch.float32), both[:, 0], ranks - 1, width, granularity)
"""


def test_compiles_for_hopper(compile_for_hopper):
    made = compile_for_hopper(COMPILE)
    assert {one.name for one in made} == {"keep_kernel"}
    assert [one.num_warps for one in made] == [4, 4, 4, 8, 4, 4, 16, 16]  # the last but one walks
    for one in made:
        assert one.shared <= 1024
        assert ".ftz" not in one.ptx.replace("sqrt.approx.ftz", ""), "subnormal scores must keep their order, and so must ties"
        assert "griddepcontrol.wait" in one.ptx
    assert all(getattr(one, "stack", 0) == 0 for one in made[:-1]), "it spills"
    assert getattr(made[-1], "hot_spills", 0) == 0, "32768 candidates are more than registers hold, but not where they are counted"
    for one, held in zip(made[:4], (32, 32, kernel.HELD, kernel.HELD), strict=True):
        loads = [line for line in one.ptx.splitlines() if "ld.global.v4" in line]
        assert sum("@" not in line for line in loads) >= 2 * 2 * held // 4, "16 bytes at a time and under no mask, twice"
