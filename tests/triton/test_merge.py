"""The merge kernel against the reference, in the interpreter, and compiled for Hopper."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from thresher.ops.merge.reference import merge_reference
from thresher.types import PartialAttention

kernels = importlib.import_module("thresher.ops.merge.triton")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory for results starts as NaN."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size, **kwargs: new_empty(self, *size, **kwargs).fill_(math.nan))


def draw(parts=3, num=5, heads=3, dim=7, seed=0):
    """Parts whose emptiness takes all patterns over the rows; what an empty one holds is NaN."""
    gen = torch.Generator().manual_seed(seed)
    out, lse = torch.randn(parts, num, heads, dim, generator=gen), torch.randn(parts, num, heads, generator=gen) * 20
    row = torch.arange(num * heads).view(num, heads)
    for part in range(parts):
        empty = (row >> part) % 2 == 1
        lse[part][empty] = -math.inf
        out[part][empty] = math.nan
    return out, lse


def parts_of(out, lse):
    return [PartialAttention(o, x) for o, x in zip(out, lse, strict=True)]


@pytest.mark.parametrize("shape", [(1, 5, 3, 7), (3, 5, 3, 7), (8, 2, 64, 1), (2, 3, 2, 130), (5, 1, 1, 512)])
def test_is_the_reference(shape):
    out, lse = draw(*shape)
    want = merge_reference(parts_of(out, lse))
    for got in (kernels.merge(parts_of(out, lse)), kernels.merge_stacked(out, lse)):
        torch.testing.assert_close(got.out, want.out, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.lse, want.lse, rtol=1e-6, atol=1e-6)
        empty = (lse == -math.inf).all(0)
        assert (got.lse[empty] == -math.inf).all()
        assert (got.out[empty] == 0).all()


def test_one_part_is_itself_and_ties_average():
    out, lse = torch.randn(1, 4, 2, 3), torch.randn(1, 4, 2)
    lse[0, 1] = -math.inf
    got = kernels.merge_stacked(out, lse)
    assert torch.equal(got.lse, lse[0])
    assert torch.equal(got.out[2:], out[0, 2:])
    assert (got.out[1] == 0).all()
    equal = kernels.merge_stacked(torch.arange(4.0).view(4, 1, 1, 1), torch.zeros(4, 1, 1))
    assert equal.out.item() == 1.5
    assert equal.lse.item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("shift", [-1e30, -1e4, 1e4, 1e30])
def test_extreme_lse(shift):
    got = kernels.merge_stacked(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1), torch.full((2, 1, 1), shift))
    assert got.out.item() == 2
    assert math.isfinite(got.lse.item())
    far = kernels.merge_stacked(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1), torch.tensor([-1e30, 1e30]).view(2, 1, 1))
    assert far.out.item() == 3


def test_parts_apart_and_other_strides():
    out, lse = draw()
    want = kernels.merge_stacked(out, lse)
    wide_out, wide_lse = torch.cat((out, out), 1)[:, :5], torch.cat((lse, lse), 1)[:, :5]
    turned_out, turned_lse = out.transpose(1, 2).contiguous().transpose(1, 2), lse.transpose(1, 2).contiguous().transpose(1, 2)
    for args in ((wide_out, wide_lse), (turned_out, turned_lse), (wide_out, turned_lse)):
        got = kernels.merge_stacked(*args)
        assert torch.equal(got.out, want.out)
        assert torch.equal(got.lse, want.lse)


@pytest.mark.parametrize("shape", [(2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 2, 0)])
def test_nothing_to_merge(shape):
    got = kernels.merge_stacked(torch.zeros(shape), torch.zeros(shape[:3]))
    assert got.out.shape == shape[1:]
    assert torch.equal(got.lse, torch.full(shape[1:3], math.log(2)))


CODE = """
import torch
from thresher.ops.merge.triton import merge_stacked
for ranks, dim in ((2, 512), (8, 128), (8, 7)):
    merge_stacked(torch.zeros(ranks, 32, 128, dim), torch.zeros(ranks, 32, 128))
"""


def test_compiles_for_hopper(compile_for_hopper):
    found = compile_for_hopper(CODE)
    assert {kernel.name for kernel in found} == {"_merge_kernel"}
    assert all(kernel.shared <= 227 * 1024 and getattr(kernel, "stack", 0) == 0 for kernel in found)
    assert "ld.global.v4" in found[0].ptx
