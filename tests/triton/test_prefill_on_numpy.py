"""``prefill_kernel``'s loading warp and consumers, their own source run on NumPy: every score stands in its place, and all else is -inf.

The matrix product and the barriers are stood in for; the order in which heads are added is not.
"""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from .gluon_on_numpy import Pointer, array, language, plain
from .gluon_world import PAGE, WORDS, D, TileRing, World

kernels = importlib.import_module("thresher.ops.index_score.gluon_kernels")
gluon = importlib.import_module("thresher.ops.index_score.gluon")


def prefill(world: World, width: int, program: int, programs: int, out: np.ndarray) -> None:
    """What one program's loading warp and both its consumers do."""
    ring = TileRing(world, gluon.STAGES)
    shape = ring.shape
    memory = [world.bytes, world.positions, world.owners, world.lengths, world.table, out]
    scales, positions, owners, lengths, table, out_at = (Pointer(memory, n * 2**40, value.dtype) for n, value in enumerate(memory))
    gl = language(memory, program, programs)
    gl.full = lambda shape, value, kind, layout: np.full(shape, value, kind)
    sizes = (world.num, 48 * 64, 2, world.pages, width)
    num, num_keys, requests, pages, columns = (array(x, np.int32) for x in sizes)
    plain(kernels.fetch_tiles, gl, ring.loading)(
        None, None, positions, positions, owners, lengths, table, num, num_keys, requests, pages, columns, 48, ring.slots, None,
        *ring.barriers, shape["BLOCK"], ring.stages, D, PAGE, False, ring.tiles,
    )  # fmt: skip
    for half in range(2):
        plain(kernels._consumer, gl, ring.consuming)(
            None, None, scales, positions, positions, owners, lengths, table, out_at, num, world.heads, num_keys, requests, pages, columns,
            0, 0, 0, array(WORDS, np.int32), 48, out.shape[1], None, ring.chunks(half), *ring.barriers,
            half, shape["BLOCK"], shape["ROWS"], ring.stages, D, PAGE, shape["HEADS"], shape["HB"], shape["SUB"], ring.tiles,
        )  # fmt: skip
        assert ring.all_read()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("heads", "num"), [(5, 40), (8, 33), (16, 19), (32, 17)])
@pytest.mark.parametrize("programs", [1, 3, 7])
def test_every_score_stands_in_its_place(heads, num, programs, seed):
    world, width = World(heads, num, seed), 48 * 64 - 30
    out = np.full((num, width + 2), np.nan, np.float32)
    for program in range(programs):
        prefill(world, width, program, programs, out)
    assert np.isnan(out[:, width:]).all(), "nothing is written past a row"
    seen = (np.arange(width) <= world.positions[:, None]) & ~np.isnan(world.scores[:, :width])
    want = np.where(seen, world.scores[:, :width], -np.inf)
    assert np.array_equal(out[:, :width].view(np.int32), want.view(np.int32))


@pytest.mark.parametrize("programs", [1, 7, 132])
def test_units_are_shared_out_whole(programs):
    """Every unit has one program; short blocks are not cut where whole ones take hardly longer."""
    for blocks in (0, 1, 5, 64, 128, 132, 133, 1000):
        for of_block in (0, 1, 3, 16, 64, 2048):
            count = array(blocks, np.int32), array(of_block, np.int32)
            runs = [plain(kernels.share, language([], p, programs))(*count) for p in range(programs)]
            assert [unit for first, last in runs for unit in range(first, last)] == list(range(blocks * of_block))
            longest = max(last - first for first, last in runs)
            assert longest <= blocks * of_block // programs + 1 + kernels.SWITCH.value
    first, last = plain(kernels.share, language([], 5, 132))(array(128, np.int32), array(64, np.int32))
    assert (first, last) == (5 * 64, 6 * 64)
