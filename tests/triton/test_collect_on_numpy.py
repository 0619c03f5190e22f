"""``collect_kernel``'s producer and consumers, their own source run on NumPy: every pair that passes is listed once, with its very bits.

The matrix product, the barriers and what is written in assembly are stood in for; the order in which heads are added is not.
"""

from __future__ import annotations

import importlib
import types
from typing import Any

import numpy as np
import pytest

from .gluon_on_numpy import Pointer, across_four, array, language, plain, store
from .gluon_world import PAGE, D, TileRing, World

kernels = importlib.import_module("thresher.ops.score_select.gluon_kernels")
quads = importlib.import_module("thresher.ops.score_select.gluon_quads")
gluon = importlib.import_module("thresher.ops.index_score.gluon")
order = importlib.import_module("thresher.ops.index_score.gluon_quads")
fused = importlib.import_module("thresher.ops.score_select.triton")
RUNS = 3


class AppendQuick:
    """What stands for ``append_quick``, which is written in assembly, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, score, bar, key, at, into):
        self.calls += 1
        passes = score >= bar
        bits = np.ascontiguousarray(score).view(np.int32).astype(np.int64)
        store(into + (at >> 3), bits << 32 | key, passes)
        return at + passes.astype(np.int32) * 8


def collect(world: World, room: int) -> tuple[np.ndarray, np.ndarray]:
    """``found`` and ``counts`` of all consumers of every unit, after one program."""
    ring, places = TileRing(world, fused.STAGES), 32
    shape = ring.shape
    found = np.full((world.num, RUNS * places * room + fused.PAST), -7)
    counts = np.full((world.num, RUNS * places), -7, np.int32)
    memory = [world.owners, world.positions, world.lengths, world.table, world.levels, world.level_keys, found, counts]
    owners, positions, lengths, table, levels, level_keys, found_at, counts_at = (
        Pointer(memory, number * 2**40, value.dtype) for number, value in enumerate(memory)
    )
    gl = language(memory)
    sizes = (world.num, 48 * 64, 2, world.pages, RUNS)
    num, num_keys, requests, pages, runs = (array(x, np.int32) for x in sizes)
    plain(kernels._producer, gl, ring.loading)(
        None, None, owners, positions, lengths, table, num, num_keys, requests, pages, runs, 48, ring.slots, ring.scales, *ring.barriers,
        shape["BLOCK"], ring.stages, D, PAGE, ring.tiles,
    )  # fmt: skip
    append_quick = AppendQuick()

    def scales_of(slots, sums, sub):
        scale = ring.scales_of(slots).reshape(4, 2, 8, 1, 1, 1)
        return scale[:, 0], scale[:, 1]

    instead = ring.consuming | {"append_quick": append_quick, "SPAN": 7, "scales_of": scales_of}
    for half in range(2):
        plain(kernels._consumer, gl, instead)(
            None, None, owners, positions, lengths, levels, level_keys, found_at, counts_at,
            num, world.heads, num_keys, requests, runs, found.shape[1], 0, 0, 0,
            None, ring.scales, ring.chunks(half), *ring.barriers,
            half, shape["HEADS"], shape["BLOCK"], shape["ROWS"], ring.stages, D, PAGE, shape["HB"], shape["SUB"], room, ring.tiles,
        )  # fmt: skip
        assert ring.all_read()
    assert append_quick.calls > 20
    return found, counts


def collect_quads(world: World, room: int) -> tuple[np.ndarray, np.ndarray]:
    """The same of the kernel for more heads, with its four consumers."""
    stages = gluon.QUAD_STAGES
    found = np.full((world.num, RUNS * 64 * room + fused.PAST), -7)
    counts = np.full((world.num, RUNS * 64), -7, np.int32)
    memory = [world.owners, world.positions, world.lengths, world.table, world.levels, world.level_keys, found, counts]
    owners, positions, lengths, table, levels, level_keys, found_at, counts_at = (
        Pointer(memory, number * 2**40, value.dtype) for number, value in enumerate(memory)
    )
    gl = language(memory)
    sizes = (world.num, 48 * 64, 2, world.pages, RUNS)
    num, num_keys, requests, pages, runs = (array(x, np.int32) for x in sizes)
    fetched: list[tuple[int, bool]] = []  # page, and whether it was there: if not, its scales are NaN
    turn: dict[str, Any] = {"count": 0, "there": False}

    def wait(barrier: tuple[str, int], phase: int) -> None:
        which, slot = barrier
        assert (slot, phase) == (turn["count"] % stages, turn["count"] // stages & 1 ^ (which == "empty"))
        turn["count"] += which == "full"

    class Slots:
        def __init__(self, name: str) -> None:
            self.name = name

        def index(self, slot: Any) -> Slots:
            self.slot = int(slot)
            return self

        def reshape(self, shape: list[int]) -> Slots:
            return self

        def permute(self, dims: tuple[int, ...]) -> Slots:
            return self

        def store(self, value: Any) -> None:
            assert np.isnan(value).all()
            assert self.slot == turn["count"] % (2 * stages)
            turn["there"] = False

    barriers = [types.SimpleNamespace(index=lambda slot, which=which: (which, int(slot))) for which in ("full", "empty")]

    def fetch(desc, where, barrier, slots):
        if slots.name == "scales":
            assert slots.slot == turn["count"] % (2 * stages), "scales last a round longer than their tile"
            assert where == [where[0], PAGE * D // 4]
            turn["there"] = True
        else:
            assert slots.slot == turn["count"] % stages
            assert where[1:] == [0, 0]
            fetched.append((int(where[0]), turn["there"]))
            turn["count"] += 1

    tma = types.SimpleNamespace(async_copy_global_to_shared=fetch)
    mbarrier = types.SimpleNamespace(wait=wait, expect=lambda barrier, size: None, arrive=lambda barrier: None)
    plain(quads._producer, gl, {"tma": tma, "mbarrier": mbarrier, "fence_async_shared": lambda: None})(
        None, None, owners, positions, lengths, table, num, num_keys, requests, pages, runs, 48,
        Slots("keys"), Slots("scales"), *barriers, stages, D, PAGE,
    )  # fmt: skip

    def of_columns(values):
        row, head = plain(order.row_and_head, gl)(np.arange(128))
        here = (turn["first"] + row < world.num) & (head < world.heads)
        return np.where(here, values[..., np.where(here, turn["first"] + row, 0), np.where(here, head, 0)], np.float32(0))

    def load(q, weights, first, *rest):
        turn["first"] = int(first)
        return array(np.broadcast_to(of_columns(world.weights / 2), (64, 128)))

    def scales_of(slots, layout):
        assert slots.slot == (turn["count"] - 1) % (2 * stages)
        page, there = fetched[turn["count"] - 1]
        key, _query = plain(order.places, gl)(None)
        scale = world.bytes[page, PAGE * D // 4 :][key] if there else np.float32(np.nan) + 0 * key
        return array(scale, np.float32)

    append_quick = AppendQuick()

    instead = {
        "load_queries": load, "warpgroup_mma": lambda slots, *rest, **options: array(of_columns(world.dots[fetched[turn["count"] - 1][0]])),
        "warpgroup_mma_wait": lambda left, given: given[0], "mbarrier": mbarrier, "scales_of": scales_of, "_across_four": across_four,
        "lanes": lambda zero: None, "append_quick": append_quick, "SPAN": 7,
    }  # fmt: skip
    for which in range(4):
        turn["count"] = 0
        plain(quads._consumer, gl, instead)(
            None, None, owners, positions, lengths, levels, level_keys, found_at, counts_at, num, world.heads, num_keys, requests, runs,
            found.shape[1], 0, 0, 0, Slots("keys"), Slots("scales"), Slots("queries"), *barriers, which, stages, D, room,
        )  # fmt: skip
        assert turn["count"] == len(fetched)
    assert append_quick.calls > 20
    return found, counts


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("heads", "num"), [(5, 40), (8, 33), (16, 19), (32, 17), (24, 9), (64, 9), (40, 17)])
@pytest.mark.parametrize("room", [12, 72])
def test_every_pair_that_passes_is_listed_once(heads, num, room, seed):
    world = World(heads, num, seed)
    found, counts = (collect_quads if heads > fused.QUADS else collect)(world, room)
    exact = 0
    for row in range(num):
        want = world.passing(row)
        if counts[row].max() <= room:
            listed = np.concatenate([found[row, at * room : at * room + count] for at, count in enumerate(counts[row])])
            got = {int(pair & 0xFFFFFFFF): int(np.int32(pair >> 32)) for pair in listed}
            assert len(got) == len(listed)
            assert got == want
            exact += 1
        else:  # too many: the row is done again
            assert len(want) > room
    assert exact >= num // 4 if room == 12 else exact >= num * 3 // 4
