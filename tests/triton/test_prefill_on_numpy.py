"""``prefill_kernel``'s loading warp and consumers, their own source run on NumPy: every score stands in its place, and all else is -inf.

The matrix product and the barriers are stood in for; the order in which heads are added is not.
"""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from .gluon_on_numpy import Pointer, array, language, plain
from .gluon_world import PAGE, D, TileRing, World

kernels = importlib.import_module("thresher.ops.index_score.gluon_kernels")
sharing = importlib.import_module("thresher.ops.index_score.gluon_share")
gluon = importlib.import_module("thresher.ops.index_score.gluon")


def given(run: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
    """A copy: what is handed to a function may be added to in place there."""
    return [array(int(unit)) for unit in run]


def prefill(world: World, width: int, program: int, programs: int, out: np.ndarray) -> None:
    """What one program's loading warp and both its consumers do."""
    ring = TileRing(world, gluon.STAGES)
    shape = ring.shape
    memory = [world.positions, world.owners, world.lengths, world.table, out]
    positions, owners, lengths, table, out_at = (Pointer(memory, n * 2**40, value.dtype) for n, value in enumerate(memory))
    gl = language(memory, program, programs)
    sizes = (world.num, 48 * 64, 2, world.pages, width)
    num, num_keys, requests, pages, columns = (array(x, np.int32) for x in sizes)
    run = plain(sharing.share, gl)(
        array(-(-world.num // shape["BLOCK"]), np.int32), (columns + 63) // 64, positions, positions, num, shape["BLOCK"], True
    )
    plain(kernels.fetch_tiles, gl, ring.loading)(
        *given(run), None, None, positions, positions, owners, lengths, table, num, num_keys, requests, pages, columns, 48, ring.slots,
        ring.scales, *ring.barriers, shape["BLOCK"], ring.stages, D, PAGE, ring.tiles,
    )  # fmt: skip
    consuming = ring.consuming | {"scales_of": lambda slots, layout: ring.scales_of(slots)}
    for half in range(2):
        plain(kernels._consumer, gl, consuming)(
            *given(run), None, None, positions, positions, owners, lengths, out_at, num, world.heads, num_keys, requests, columns,
            0, 0, 0, out.shape[1], None, ring.scales, ring.chunks(half), *ring.barriers,
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


def runs_of(ends: np.ndarray, starts: np.ndarray, rows: int, tiles: int, programs: int) -> list[tuple[int, int]]:
    """Each program's run for these rows, in blocks of ``rows``."""
    memory = [np.append(np.int64(x), 0) for x in (starts, ends)]
    low, high = (Pointer(memory, n * 2**40, value.dtype) for n, value in enumerate(memory))
    num = array(len(ends), np.int32)
    blocks, tiles = array(-(-len(ends) // rows), np.int32), array(tiles, np.int32)
    return [plain(sharing.share, language(memory, p, programs))(blocks, tiles, low, high, num, rows, False) for p in range(programs)]


def seen_tiles(ends: np.ndarray, starts: np.ndarray, rows: int, tiles: int) -> np.ndarray:
    """Whether units are seen by their block's last row: bool ``[blocks, tiles]``."""
    last = np.minimum(np.arange(-(-len(ends) // rows)) * rows + rows - 1, len(ends) - 1)
    tile = np.arange(tiles)
    return (tile >= starts[last, None] // 64) & (tile < -(-ends[last, None] // 64)) & (starts < ends)[last, None]


@pytest.mark.parametrize("programs", [1, 7, 132])
@pytest.mark.parametrize("kind", ["causal", "all", "packed", "none", "one"])
def test_units_are_shared_out_whole(programs, kind):
    """Every unit has one program, and programs have as many tiles that are seen, unless blocks are whole, or too many to be counted."""
    rng = np.random.default_rng(programs)
    for blocks in (0, 1, 5, 64, 128, 133, 1024, 1025):
        for tiles in (0, 1, 3, 64, 300):
            num = blocks * 8 - 3 * (blocks > 0)
            ends = {"causal": tiles * 64 - np.arange(num)[::-1], "packed": rng.integers(0, tiles * 64 + 1, num)}.get(
                kind, np.full(num, tiles * 64)
            )
            starts = np.minimum(rng.integers(0, tiles * 64 + 1, num), ends) if kind == "packed" else np.zeros(num, int)
            if kind in ("none", "one"):
                ends = ends * (kind == "one") * (np.arange(num) >= num - 1)
            ends = np.maximum(ends, 0)
            runs = runs_of(ends, starts, 8, tiles, programs)
            assert [unit for first, last in runs for unit in range(first, last)] == list(range(blocks * tiles))
            whole = -(-blocks // programs) * tiles <= blocks * tiles // programs + sharing.SWITCH.value
            assert not whole or all(unit % max(tiles, 1) == 0 for run in runs for unit in run)
            seen = seen_tiles(ends, starts, 8, tiles)
            if not whole and blocks <= 1024 and seen.sum() >= programs:
                assert max(int(seen.ravel()[first:last].sum()) for first, last in runs) <= seen.sum() // programs + 1


def test_short_blocks_are_whole():
    """Where cutting them would gain less than it costs to go over to another block."""
    full = np.full(1024, 64 * 64)
    runs = runs_of(full, 0 * full, 8, 64, 132)
    assert runs[5] == (5 * 64, 6 * 64)
    assert runs[128:] == [(128 * 64, 128 * 64)] * 4
