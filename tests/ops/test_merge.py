"""merge against softmax over the union."""

from __future__ import annotations

import math

import pytest
import torch

from thresher.errors import ThresherError
from thresher.ops import merge
from thresher.types import PartialAttention


def attention(score: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 out and lse of ``score [Q, N, S]`` over ``v [S, D]``; an empty set gives 0 and -inf."""
    score = score.double()
    if score.shape[-1] == 0:
        return torch.zeros(*score.shape[:2], v.shape[1]).double(), torch.full(score.shape[:2], -math.inf).double()
    return score.softmax(-1) @ v.double(), score.logsumexp(-1)


def split(score: torch.Tensor, v: torch.Tensor, ranks: int) -> list[PartialAttention]:
    pieces = [attention(score[..., r::ranks], v[r::ranks]) for r in range(ranks)]
    return [PartialAttention(out.float(), lse.float()) for out, lse in pieces]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_is_softmax_over_the_union(ranks, size):
    gen = torch.Generator().manual_seed(ranks)
    score, v = torch.randn(5, 3, 30, generator=gen) * size, torch.randn(30, 7, generator=gen)
    out, lse = attention(score, v)
    got = merge(split(score, v, ranks))
    assert got.out.dtype == torch.float32
    torch.testing.assert_close(got.lse.double(), lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.out.double(), out, rtol=2e-5, atol=2e-5)


def part(lse, fill=0.0):
    lse = torch.tensor(lse, dtype=torch.float32)[:, None]
    return PartialAttention(torch.full((len(lse), 1, 2), float(fill)), lse)


def test_empty_ranks_have_no_weight_whatever_they_hold():
    empty = part([-math.inf, -math.inf], math.nan)
    full = part([3.0, -math.inf], 5.0)
    for parts in ([empty, full], [full, empty], [empty, full, empty]):
        got = merge(parts)
        assert torch.equal(got.out[0], full.out[0])
        assert got.lse[0].item() == 3.0
        assert (got.out[1] == 0).all()
        assert got.lse[1].item() == -math.inf


def test_all_empty():
    got = merge([part([-math.inf], math.nan)] * 4)
    assert (got.out == 0).all()
    assert (got.lse == -math.inf).all()


@pytest.mark.parametrize("shift", [-1e30, -1e4, 1e4, 1e30])
def test_extreme_lse(shift):
    got = merge([part([shift], 1.0), part([shift], 3.0)])
    assert got.out.tolist() == [[[2.0, 2.0]]]
    assert torch.isfinite(got.lse).all()
    far = merge([part([-1e30], 1.0), part([1e30], 3.0)])
    assert far.out.tolist() == [[[3.0, 3.0]]]


def test_equal_parts_average_and_one_part_is_itself():
    got = merge([part([0.0], i) for i in range(4)])
    assert got.lse.item() == pytest.approx(math.log(4))
    assert got.out[0, 0, 0].item() == pytest.approx(1.5)
    alone = part([0.3, -math.inf])
    assert torch.equal(merge([alone]).lse, alone.lse)


def test_repeats_are_bit_equal_and_inputs_unchanged():
    gen = torch.Generator().manual_seed(0)
    parts = split(torch.randn(4, 2, 20, generator=gen), torch.randn(20, 3, generator=gen), 4)
    before = [p.out.clone() for p in parts]
    first = merge(parts)
    assert all(torch.equal(merge(parts).out, first.out) for _ in range(5))
    assert all(torch.equal(p.out, b) for p, b in zip(parts, before, strict=True))


def test_refuses():
    good = part([0.0])
    for parts, match in (
        ([], "at least one"),
        ([good, part([0.0, 1.0])], r"parts\[1\].out must be float32 \[1, 1, 2\]"),
        ([good, PartialAttention(good.out, good.lse[0])], r"parts\[1\].lse must be float32 \[1, 1\]"),
        ([PartialAttention(good.out.double(), good.lse)], "float32"),
        ([good, part([math.inf])], r"below \+inf"),
    ):
        with pytest.raises(ThresherError, match=match):
            merge(parts)
