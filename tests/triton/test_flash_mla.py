"""What stands around FlashMLA's kernels: against PyTorch's own steps, and behind the adapter, over the stand-in of tests/ops."""

from __future__ import annotations

import sys

import pytest
import torch

from thresher.cache import LatentCache
from thresher.ops.sparse_attend import flash_mla
from thresher.ops.sparse_attend import flash_mla_kernels as kernels

from ..ops.vendors import FlashMla

INF = torch.inf


@pytest.mark.parametrize(("rows", "width"), [(3, 64), (2, 2048), (1, 1100), (0, 64), (2, 0)])
def test_slots_outside_become_absent(rows, width):
    num = 61 * 4
    wide = torch.randint(-20, num + 20, (2 * rows, width + 3), generator=torch.Generator().manual_seed(0)).int()
    edges = torch.tensor([-(2**31), -2, -1, 0, num - 1, num, num + 1, 2**31 - 1]).int()
    wide[:, : min(8, width)] = edges[: min(8, width)]
    for slots in (wide[:rows, :width].contiguous(), wide[::2, :width], wide.t()[:width, :rows].t()):
        before = slots.clone()
        got = kernels.inside(slots, num)
        assert got.is_contiguous()
        assert torch.equal(got, flash_mla._inside(slots, num))
        assert torch.equal(slots, before)


@pytest.mark.parametrize(("num", "heads"), [(3, 64), (1, 5), (0, 64)])
def test_outputs_become_a_part(num, heads):
    gen = torch.Generator().manual_seed(1)
    out = torch.randn(num, 2, heads, 512, generator=gen).bfloat16()[:, 1]
    lse = torch.randn(num, heads, 2, generator=gen)
    odd = torch.tensor([INF, -INF, 0.0, -0.0, 3e38])[: lse.numel() // 2]
    lse[:1, : len(odd), 0] = odd
    out[:1, 1] = torch.tensor([INF, -INF, 0.0, -0.0]).repeat(128).bfloat16()
    for strided in (lse[:, :, 0], lse.transpose(0, 1)[:, :, 0].contiguous().t()):
        got, want = kernels.as_part(out, strided), flash_mla.to_part(out, strided)
        for mine, theirs in zip(got, (want.out, want.lse), strict=True):
            assert mine.dtype == torch.float32
            assert torch.equal(mine.view(torch.int32), theirs.view(torch.int32))


def test_the_adapter_takes_them(monkeypatch):
    """Over the FP8 cache and over bf16 latents, with slots outside, a row without any, pages of an odd size and strided slots."""
    package = FlashMla()
    monkeypatch.setitem(sys.modules, "flash_mla", package)
    gen = torch.Generator().manual_seed(2)
    cache, latents = LatentCache(4, page_size=61), torch.randn(244, 576, generator=gen).bfloat16()
    cache.store(torch.arange(244), torch.randn(244, 512, generator=gen), torch.randn(244, 64, generator=gen))
    slots = torch.randint(-9, 250, (3, 256), generator=gen).int()[:, ::2]
    slots[1] = -1
    q = torch.randn(3, 64, 576, generator=gen).bfloat16()
    given = {flash_mla.sparse_attend_mla_fp8: cache.data, flash_mla.sparse_attend_mla: latents}
    want = [function(q, held, slots, 0.04) for function, held in given.items()]
    monkeypatch.setattr(flash_mla, "_has_kernels", lambda tensor: True)
    called = []
    for name in ("inside", "as_part"):
        right = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *asked, name=name, right=right: called.append(name) or right(*asked))
    got = [function(q, held, slots, 0.04) for function, held in given.items()]
    assert called == ["inside", "as_part"] * 2
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine.out, theirs.out)
        assert torch.equal(mine.lse, theirs.lse)
        assert (mine.lse[1] == -INF).all()


COMPILE = """
import torch
from thresher.ops.sparse_attend import flash_mla_kernels as kernels

kernels.inside(torch.zeros(8, 2048, dtype=torch.int32), 4096)
kernels.as_part(torch.zeros(8, 128, 512, dtype=torch.bfloat16), torch.zeros(8, 128))
"""


def test_what_overlaps(compile_for_hopper):
    """The launch before waits and lets none begin early; the one after is a plain launch (see the module)."""
    ptx = {kernel.name: kernel.ptx for kernel in compile_for_hopper(COMPILE)}
    assert set(ptx) == {"inside_kernel", "part_kernel"}
    assert "griddepcontrol.wait" in ptx["inside_kernel"]
    assert "griddepcontrol.launch_dependents" not in ptx["inside_kernel"]
    assert "griddepcontrol" not in ptx["part_kernel"]
