"""``step.cu``, all blocks at once and their threads in turn on a CPU: the two steps' sets, bit for bit."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from thresher.ops import select_topk
from thresher.ops.score_select import cuda as step
from thresher.types import IndexKeys, IndexQuery

from ..triton.gluon_on_numpy import heads_in_order
from .threads import in_order, library, needs_compiler

pytestmark = needs_compiler
PAGES = 100


class World:
    """Requests in shuffled pages with holes, queries of them and of none. Dots are whole numbers, so their order of addition does not
    show; that of heads does."""

    def __init__(self, heads: int, dim: int, lengths: list[int], num: int, seed: int, spread: int = 3) -> None:
        rng = np.random.default_rng(seed)
        width = max(-(-length // 64) for length in lengths) + 1
        table = np.full((len(lengths), width), -1, np.int32)
        order = rng.permutation(PAGES).astype(np.int32)
        at = 0
        for request, length in enumerate(lengths):
            tiles = -(-length // 64)
            table[request, :tiles] = order[at : at + tiles]
            at += tiles
            if tiles > 4:
                table[request, [1, tiles - 2]] = -1, PAGES
        owners = rng.integers(0, len(lengths), num)
        owners[:3] = (0, len(lengths), -1)[:num]
        held = np.int64(lengths)[owners.clip(0, len(lengths) - 1)]
        positions = np.where(rng.random(num) < 0.5, held - 1, (held * rng.random(num)).astype(np.int64) - 1)
        positions[0] = 10**12
        ends = np.where((owners >= 0) & (owners < len(lengths)), np.minimum(positions + 1, held), 0)
        k, q = rng.integers(-2, 3, (PAGES, 64, dim)), rng.integers(-2, 3, (num, heads, dim))
        q[3::4] = 0  # plateaus
        weights = rng.standard_normal((num, heads)).astype(np.float32)
        weights[1::5] = -np.abs(weights[1::5])  # sums of -0.0
        weights[2::7, 0] = np.nan
        scales = np.exp2(rng.integers(-spread, spread + 1, (PAGES, 64))).astype(np.float32)
        pages = np.zeros((PAGES, 64 * (dim + 4)), np.uint8)
        pages[:, : 64 * dim] = torch.from_numpy(k).float().to(torch.float8_e4m3fn).view(torch.uint8).reshape(PAGES, -1).numpy()
        pages[:, 64 * dim :] = scales.view(np.uint8)
        wide = torch.zeros(num, heads, dim + 32)  # rows that are not contiguous
        wide[..., 16:-16] = torch.from_numpy(q)
        fp8 = wide.to(torch.float8_e4m3fn)[..., 16:-16]
        self.query = IndexQuery(fp8, torch.from_numpy(weights), *(torch.from_numpy(x) for x in (positions, owners)))
        self.keys = IndexKeys(torch.from_numpy(pages).view(PAGES, 64, 1, dim + 4), torch.from_numpy(table), torch.tensor(lengths))
        padded = max(8, 1 << (heads - 1).bit_length())
        dots = np.einsum("pkd,qhd->pkqh", k.astype(np.float32), q.astype(np.float32))
        dots, weights = (np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded - heads)]) for x in (dots, weights))
        made = heads_in_order(dots, weights) * scales[..., None] + np.float32(0)
        self.scores = np.full((num, width * 64), -np.inf, np.float32)
        for row, owner in enumerate(owners):
            for tile, page in enumerate(table[owner]) if 0 <= owner < len(lengths) else ():
                if 0 <= page < PAGES:
                    self.scores[row, tile * 64 : tile * 64 + 64] = made[page, :, row]
        self.scores[np.arange(width * 64) >= ends[:, None]] = -np.inf

    def check(self, topk: int, with_scores: bool, programs: int) -> None:
        shared = torch.zeros(step.shared_words(len(self.scores), programs), dtype=torch.int32)
        got = step.select_step(self.query, self.keys, topk, with_scores, programs, shared)
        assert not shared.any(), "what the next launch begins with"
        want = select_topk(torch.from_numpy(self.scores), topk, impl="reference")
        assert torch.equal(got.lengths, want.lengths)
        assert torch.equal(got.indices, want.indices)
        if with_scores:
            assert torch.equal(got.scores.isnan(), want.scores.isnan())
            assert torch.equal(got.scores.nan_to_num(7.5), want.scores.nan_to_num(7.5) + 0.0)


@pytest.fixture(params=[0, 1, 8, 9])
def order(request, monkeypatch):
    monkeypatch.setattr(step.launch, "launch", in_order(request.param))
    monkeypatch.setattr(step.launch, "tile_map", tile_map)
    return request.param


def tile_map(pages: int, count: int, size: int, dim: int) -> ctypes.Array[ctypes.c_ubyte]:
    """What device.cuh here takes for one."""
    return (ctypes.c_ubyte * 128)(*b"".join(x.to_bytes(8, "little") for x in (pages, size, dim)))


@pytest.mark.parametrize(
    ("heads", "dim", "programs"), [(5, 64, 1), (8, 128, 3), (16, 64, 5), (32, 128, 4), (24, 64, 2), (64, 64, 3), (40, 128, 7)]
)
@pytest.mark.parametrize("topk", [1, 64, 700])
def test_the_set_of_the_two_steps(heads, dim, programs, topk, order):
    World(heads, dim, [1300, 0, 500, 64], 7, heads + order).check(topk, topk != 64, programs)


@pytest.mark.parametrize(("lengths", "num", "programs"), [([6300], 5, 4), ([64 * 75, 900], 5, 3), ([1900], 1, 10)])
def test_many_in_a_bin(lengths, num, programs, order):
    """All keys equal: more than are told to all, more than a team has room for, more of a part than it has slots for."""
    world = World(3, 64, lengths, num, order, spread=0)
    world.query.q.view(torch.uint8)[:] = 0
    world.scores[np.isfinite(world.scores)] = 0.0
    world.scores[np.isnan(world.scores)] = 0.0
    world.query.weights.nan_to_num_(1.0)
    for topk in (100, 2000):
        world.check(topk, True, programs)


def test_orders_that_shared_memory_has_no_room_for(order, monkeypatch):
    monkeypatch.setattr(step.launch, "SHARED", step.shared_memory(16, 64, 0)[0] + 100)
    World(16, 64, [1300, 0, 500, 64], 6, 3).check(64, True, 3)
    monkeypatch.setattr(step, "MASKED", 256)
    World(16, 64, [1300, 0, 500, 64], 6, 3).check(64, True, 3)


def test_more_queries_than_blocks(order):
    World(8, 64, [300, 1, 130], 70, 5).check(32, False, 3)


def test_shared_memory_is_laid_out_as_the_kernel_has_it():
    assert library().bytes_of_tiles() == step.TILES
    assert library().extra_tiles() == step.EXTRA
    assert library().bytes_before_orders() == step.BEFORE_ORDERS
    assert step.shared_memory(64, 128, 497)[1] == 497 * 64, "32 requests of 128k on 132 multiprocessors"
    size, held = step.shared_memory(64, 128, 993)
    assert size <= step.launch.SHARED < size + 256
    assert held < 993 * 64
