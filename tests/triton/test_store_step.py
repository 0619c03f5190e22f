"""All that a step stores, in one launch: the bits of the three kernels of one part each."""

from __future__ import annotations

import re

import pytest
import torch

from thresher.cache import IndexKeyCache, LatentCache
from thresher.ops.quantize import triton as kernels
from thresher.ops.quantize import triton_launch, triton_step
from thresher.ops.quantize.triton_step import store_step

from .test_quantize import poisoned, same  # noqa: F401 (a fixture)

THETA = 1e4


def step(num, heads, dim, dtype, index=torch.int64):
    """New tokens by their arguments' names, strided wherever a stride is allowed; some are left out of a cache, or of both."""
    gen = torch.Generator().manual_seed(num + heads)

    def randn(*shape):
        wide = torch.randn(*shape[:-1], shape[-1] + 3, generator=gen) * 10.0 ** torch.randint(-3, 4, (*shape[:-1], 1), generator=gen)
        return wide.to(dtype)[..., 1:-2]

    slots = torch.randperm(num + 4, generator=gen)[:num].to(index)
    slots[1::5] = -1
    slots[2::7] = 2**31 - 1 if index == torch.int32 else 2**40
    return {
        "slots": slots,
        "key": randn(num, dim),
        "latent": randn(num, 512),
        "rope": randn(num, 64),
        "q": randn(num, 2 * heads, dim)[:, ::2],
        "weights": randn(num, heads),
        "positions": torch.randint(0, 2**20, (num,), generator=gen).to(index),
    }


def caches(num, dim):
    """Of other page sizes and other numbers of slots, with something in every byte."""
    pages, data = IndexKeyCache(num // 5 + 1, dim, 5).pages, LatentCache(num // 3 + 2, 3).data
    return pages.fill_(0xAB), data.fill_(0xAB)


def one_by_one(pages, data, slots, key, latent, rope, q, weights, positions, *rotation, factor):
    kernels.store_index_keys(pages, slots, key, positions, *rotation)
    kernels.store_latents(data, slots, latent, rope, positions, rotation[0])
    return pages, data, *kernels.quantize_queries(q, weights, positions, *rotation, factor)


@pytest.mark.parametrize(
    ("num", "heads", "dim", "rotary", "style", "dtype", "index", "spread"),
    [
        (1, 5, 128, 64, "interleaved", torch.bfloat16, torch.int64, 528),  # one row to a program
        (7, 3, 64, 64, "half", torch.bfloat16, torch.int32, 8),  # 4 rows
        (7, 3, 64, 64, "interleaved", torch.float32, torch.int64, 8),
        (6, 9, 128, 128, "half", torch.float16, torch.int32, 4),  # 2 rows, and an odd head
        (9, 1, 64, 0, "half", torch.float32, torch.int32, 1),
        (5, 2, 256, 2, "half", torch.bfloat16, torch.int64, 4),  # one that is wide
        (0, 4, 64, 32, "half", torch.bfloat16, torch.int64, 528),
        (3, 0, 64, 32, "half", torch.bfloat16, torch.int64, 528),
    ],
)
def test_the_bits_of_the_three(num, heads, dim, rotary, style, dtype, index, spread, monkeypatch):
    monkeypatch.setattr(triton_launch, "SPREAD", spread)
    given, rotation = step(num, heads, dim, dtype, index), (THETA, rotary, style)
    (pages, data), launches = caches(num, dim), []
    monkeypatch.setattr(triton_step, "step_kernel", counted(triton_step.step_kernel, launches))
    got = pages, data, *store_step(pages, data, *given.values(), *rotation, 0.3)
    want = one_by_one(*caches(num, dim), *given.values(), *rotation, factor=0.3)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == theirs.dtype
        assert same(mine, theirs)
    assert len(launches) == (num > 0)


def counted(kernel, launches):
    """A kernel that adds its grid to a list whenever it is launched."""

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    return Counted()


def test_types_may_differ():
    given = step(6, 3, 64, torch.float32) | {"key": step(6, 3, 64, torch.bfloat16)["key"], "rope": step(6, 3, 64, torch.float16)["rope"]}
    (pages, data), rotation = caches(6, 64), (THETA, 32, "half")
    got = pages, data, *store_step(pages, data, *given.values(), *rotation)
    assert all(map(same, got, one_by_one(*caches(6, 64), *given.values(), *rotation, factor=1.0)))


COMPILE = """
import torch
from thresher.cache import IndexKeyCache, LatentCache
from thresher.ops.quantize.triton_step import store_step

def zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(*shape, dtype=dtype)

for num in (1, 32):
    caches, slots = (IndexKeyCache(16, 128).pages, LatentCache(16).data), zeros(num, dtype=torch.int64)
    parts = zeros(num, 128), zeros(num, 512), zeros(num, 64), zeros(num, 64, 128), zeros(num, 64)
    store_step(*caches, slots, *parts, slots, 1e4, 64, "interleaved")
"""


def reached_without_waiting(ptx: str) -> list[str]:
    """Lines of a kernel that a program can come to before it waits for its inputs."""
    lines = [line.strip() for line in ptx[ptx.index("{") :].splitlines()]
    labels = {line.split(":")[0]: at for at, line in enumerate(lines) if re.match(r"\$\w+:", line)}
    todo, seen = [0], set()
    while todo:
        at = todo.pop()
        if at in seen or "griddepcontrol.wait" in lines[at]:
            continue
        seen.add(at)
        jump = re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", lines[at])
        todo += [labels[jump[1]]] if jump else []
        todo += [at + 1] if not re.match(r"bra|ret;|trap", lines[at]) and at + 1 < len(lines) else []
    return [lines[at] for at in sorted(seen)]


def test_compiles_for_hopper(compile_for_hopper):
    found = compile_for_hopper(COMPILE)
    assert [kernel.name for kernel in found] == ["step_kernel"] * 2
    for kernel in found:
        assert "cvt.rn.satfinite.e4m3x2.f32" in kernel.ptx, "the cast is the hardware's"
        assert "div.full" not in kernel.ptx
        early = reached_without_waiting(kernel.ptx)
        assert any("%ctaid.x" in line for line in early)
        assert not any(re.search(r"\b(ld|st|atom|red)\.global", line) for line in early), "it is launched before the one ahead ends"
        assert getattr(kernel, "stack", 40) <= 40, "an angle's reduction has an array, and next to no register is spilled"
