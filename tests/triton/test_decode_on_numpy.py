"""``decode_kernel``'s own source run on NumPy, a thread for each group of warps: where tiles and parts of them go, and who waits for whom.

Products are taken in fp64, what is written in assembly is stood in for, and of layouts no more is seen than which FP8 values lie where
which keys will be. Copies land late.
"""

from __future__ import annotations

import importlib
import math
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from thresher.ops.sparse_attend.reference import attend_fp8_reference

from .gluon_on_numpy import REGION, Pointer, array, language, load, plain

kernels = importlib.import_module("thresher.ops.sparse_attend.gluon_kernels")
latents = importlib.import_module("thresher.ops.sparse_attend.gluon_latents")
launch = importlib.import_module("thresher.ops.sparse_attend.triton")
gluon = importlib.import_module("thresher.ops.sparse_attend.gluon")
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
SCALE = 0.07


def to_bits(values: Any) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def from_bits(bits: Any) -> np.ndarray:
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


class Shared:
    """Shared memory; bf16 as its 16 bits."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data

    def index(self, number: Any) -> Shared:
        return Shared(self.data[int(number)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.data[(slice(None),) * dim + (slice(start, start + length),)])

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.data.transpose(order))

    def _reinterpret(self, kind: Any, shape: list[int], layout: Any) -> Shared:
        view = self.data.view(kind)
        assert list(view.shape) == shape
        return Raw(view) if layout is latents.FP8.value else Shared(view)

    def store(self, values: Any) -> None:
        values = np.asarray(values)
        assert values.shape == self.data.shape
        self.data[...] = to_bits(values) if self.data.dtype == np.uint16 and values.dtype == np.float32 else values

    def load(self, layout: Any) -> np.ndarray:
        return array(self.data.copy())


class Raw(Shared):
    """Whole rows of 512 bytes, where keys lie in quarters: 128 bytes of every row one after the other."""

    def __init__(self, keys: np.ndarray) -> None:
        super().__init__(keys.reshape(-1, 4, 4, 32).transpose(2, 0, 1, 3))

    def store(self, values: Any) -> None:
        self.data[...] = np.asarray(values).reshape(self.data.shape)

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        assert (start % 32, length, dim) == (0, 32, 1)
        return Shared(self.data[:, :, start // 32].reshape(-1, 32))  # a copy: to be loaded at once


class Barriers:
    """By the addresses of their words: how many arrivals a phase takes, how many it still waits for, and the phase's parity."""

    def __init__(self) -> None:
        self.state: dict[int, list[int]] = {}
        self.changed = threading.Condition()
        self.slow: int | None = None  # the thread that comes late to everything
        self.failed: list[BaseException] = []

        self.copies = threading.local()

    def init(self, barrier: Shared, count: int) -> None:
        self.state[barrier.data.ctypes.data] = [count, count, 0]

    def arrive(self, barrier: Shared) -> None:
        with self.changed:
            state = self.state[barrier.data.ctypes.data]
            state[1] -= 1
            if state[1] == 0:
                state[1:] = [state[0], state[2] ^ 1]
                self.changed.notify_all()

    def copy(self, into: Shared, pointer: Any, mask: Any) -> None:
        self.copies.asked = [*getattr(self.copies, "asked", []), (into, load(pointer, mask))]

    def arrive_when_copied(self, barrier: Shared) -> None:
        """An arrival more in this phase: that of what the thread has asked for so far."""
        asked, self.copies.asked = self.copies.asked, []

        def land() -> None:
            for into, values in asked:
                time.sleep(1e-3)
                into.store(values)
            self.arrive(barrier)

        with self.changed:
            self.state[barrier.data.ctypes.data][1] += 1
        threading.Thread(target=land).start()

    def wait(self, barrier: Shared, phase: Any) -> None:
        with self.changed:
            state = self.state[barrier.data.ctypes.data]
            assert self.changed.wait_for(lambda: self.failed or state[2] != int(phase), 20), "a wait without end"
            assert not self.failed, "another group of warps has failed"
        self.come_late(2e-3)

    def come_late(self, seconds: float) -> None:
        if threading.get_ident() == self.slow:
            time.sleep(seconds)

    def specialize(self, slow: int, parts: list[Any]) -> None:
        def run(number: int) -> None:
            try:
                if number == slow:
                    self.slow = threading.get_ident()
                    time.sleep(1e-2)
                with np.errstate(all="ignore"):
                    parts[number][0](*parts[number][1])
            except BaseException as error:
                with self.changed:
                    self.failed.append(error)
                    self.changed.notify_all()

        threads = [threading.Thread(target=run, args=(number,)) for number in range(len(parts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failed:
            raise self.failed[0]


def expand(code: Any, constraints: str, args: list[Any], dtype: Any, is_pure: bool, pack: int) -> tuple[np.ndarray, np.ndarray]:
    words, scale = np.broadcast_arrays(*map(np.asarray, args))
    codes = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)
    pairs = to_bits(E4M3[codes] * np.ascontiguousarray(scale).view(np.float32)[..., None]).view(np.int32)
    return pairs[..., 0], pairs[..., 1]


def multiply(a: Shared, b: Shared, sums: Any, use_acc: bool = True, is_async: bool = False) -> np.ndarray:
    product = from_bits(a.data) @ from_bits(b.data)
    return array((product + (sums if use_acc else 0)).astype(np.float32))


def gluon_language(memory: list[np.ndarray], program: int, barriers: Barriers, slow: int) -> Any:
    gl = language(memory)
    gl.program_id = lambda axis: array(program)
    gl.bfloat16 = np.dtype(np.float32)  # rounded when it is stored
    gl.allocate_shared_memory = lambda kind, shape, layout: Shared(
        np.full(shape, 0x7FC0, np.uint16) if kind is gl.bfloat16 else np.zeros(shape, kind)
    )
    gl.minimum, gl.maximum = (lambda a, b: min(int(a), int(b))), (lambda a, b: array(np.maximum(a, b)))
    gl.cdiv, gl.static_range = (lambda a, b: -(-int(a) // int(b))), range
    gl.exp2, gl.log2 = (lambda x: array(np.exp2(x))), (lambda x: array(np.log2(x)))
    gl.convert_layout, gl.NVMMASharedLayout, gl.thread_barrier = lambda x, layout: x, lambda *args: None, lambda: None
    gl.inline_asm_elementwise = expand
    gl.warp_specialize = lambda parts, warps, registers: barriers.specialize(slow, parts)
    return gl


def run(q: Tensor, cache: Tensor, slots: Tensor, slow: int, counts: Tensor | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every program in turn. Values, peaks (or lse) and totals of all shares."""
    (num, heads), (pages, size) = q.shape[:2], cache.shape[:2]
    topk, tiles = slots.shape[1], -(-heads // gluon.HEADS)
    shares, share_tiles = launch.cut(num * tiles, topk, gluon.TILE)
    out, lse, total = (np.full((num, shares, heads, *rest), np.nan, np.float32) for rest in ((512,), (), ()))
    columns = np.zeros(0, np.int64) if counts is None else counts.numpy()
    memory = [q.view(torch.int16).numpy().view(np.uint16), cache.view(torch.int32).numpy(), slots.numpy(), columns, out, lse, total]
    for program in range(num * tiles * shares):
        barriers = Barriers()

        def product(*args: Any, late: Callable[[float], None] = barriers.come_late, **how: Any) -> np.ndarray:
            late(1e-2)
            return multiply(*args, **how)

        stands_for = {
            "mbarrier": types.SimpleNamespace(init=barriers.init, arrive=barriers.arrive, wait=barriers.wait, MBarrierLayout=lambda: None),
            "async_copy": types.SimpleNamespace(async_copy_global_to_shared=barriers.copy, mbarrier_arrive=barriers.arrive_when_copied),
            "fence_async_shared": lambda: None, "wait_for_inputs": lambda overlap: None,
            "warpgroup_mma": product, "warpgroup_mma_wait": lambda left, deps: deps[0] if len(deps) == 1 else deps,
        }  # fmt: skip
        gl = gluon_language(memory, program, barriers, slow)
        pointers = [Pointer(memory, number * REGION, values.dtype) for number, values in enumerate(memory)]
        pointers[3] = None if counts is None else pointers[3]
        plain(kernels.decode_kernel, gl, stands_for)(
            *pointers,
            SCALE * math.log2(math.e), pages * size, heads, topk, shares, share_tiles,
            cache.stride(0) // 16, cache.stride(1) // 16, *q.stride()[:2], slots.stride(0), shares > 1, size, gluon.TILE, gluon.REGISTERS,
        )  # fmt: skip
    return out, lse, total


@pytest.mark.parametrize("counts", [None, (129, 0, 300), (300, 64, 5)])
@pytest.mark.parametrize("slow", [0, 1, 2, 3])
@pytest.mark.parametrize(("num", "heads", "topk", "pages", "size", "programs"), [(2, 70, 300, 9, 61, 12), (3, 5, 200, 5, 64, 3)])
def test_values_and_sums(monkeypatch, num, heads, topk, pages, size, programs, slow, counts):
    """In shares and in one, whichever group of warps is the slow one; absent slots, an empty row, and a last tile that is not full. With
    counts, of the first columns alone."""
    monkeypatch.setattr(launch, "PROGRAMS", programs)
    gen = torch.Generator().manual_seed(topk)
    data = torch.randint(0, 256, (pages * size, 656), dtype=torch.uint8, generator=gen)
    data[:, :512][(data[:, :512] & 0x7F) == 0x7F] = 0x40
    data[:, 512:528] = torch.randint(-9, -4, (pages * size, 4), generator=gen).float().exp2().view(torch.uint8)
    data[:, 528:] = torch.randn(pages * size, 64, generator=gen).bfloat16().view(torch.uint8)
    q, cache = torch.randn(num, heads, 576, generator=gen).bfloat16(), data.view(pages, size, 1, 656)
    slots = torch.randint(0, pages * size, (num, topk), dtype=torch.int32, generator=gen)
    slots[torch.rand(num, topk, generator=gen) < 0.2] = -1
    slots[1] = -1
    if counts is not None:
        counts = torch.tensor(counts[:num])
        beyond = torch.arange(topk) >= counts[:, None]
        slots[beyond] = -1
        read = slots.masked_fill(torch.arange(topk) >= -(-counts[:, None] // gluon.TILE) * gluon.TILE, 0)  # which would show
    out, lse, total = run(q, cache, slots if counts is None else read, slow, counts)
    shares = out.shape[1]
    assert (shares > 1) == (num == 2)
    if shares > 1:
        peak = lse.max(1, keepdims=True)
        weight = np.exp2(lse - np.where(np.isinf(peak), 0, peak))
        with np.errstate(divide="ignore"):
            total = (weight * total).sum(1, keepdims=True)
            lse = (peak + np.log2(total)) * math.log(2)
        out = (weight[..., None] * out).sum(1, keepdims=True) / np.where(total == 0, 1, total)[..., None]
    want = attend_fp8_reference(q, cache, slots, SCALE)
    torch.testing.assert_close(torch.from_numpy(lse[:, 0]), want.lse, atol=1e-4, rtol=1e-4)
    # Probabilities are rounded to bf16, each by up to one part in 256.
    torch.testing.assert_close(torch.from_numpy(out[:, 0]), want.out, atol=float(want.out.abs().max()) / 256, rtol=0)
