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

tiles = importlib.import_module("thresher.ops.index_score.gluon_tiles")
lists = importlib.import_module("thresher.ops.score_select.gluon_lists")
kernels = importlib.import_module("thresher.ops.score_select.gluon_kernels")
quads = importlib.import_module("thresher.ops.score_select.gluon_quads")
gluon = importlib.import_module("thresher.ops.index_score.gluon")
order = importlib.import_module("thresher.ops.index_score.gluon_quads")
fused = importlib.import_module("thresher.ops.score_select.triton")
D, PAGE, RUNS = 64, 64, 3
STRIDE, WHOLE = 4, 1700  # of the sample, and which rows have a level
WORDS = PAGE * (D + 4) // 4


class World:
    """Two requests in shuffled pages with two holes, rows of both, and levels of all kinds."""

    def __init__(self, heads: int, num: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.num, self.heads, self.pages = num, heads, 100
        self.lengths = np.int64([64 * 47 + 5, 64 * 30])
        self.table = np.full((2, 48), -1, np.int32)
        order = rng.permutation(self.pages).astype(np.int32)
        self.table[0], self.table[1, :30] = order[:48], order[48:78]
        self.table[0, [20, 33]] = -1
        self.owners = np.sort(rng.integers(0, 2, num)) if seed % 2 else rng.integers(0, 2, num)
        self.positions = self.lengths[self.owners] - 1 - np.arange(num) % 90 * rng.integers(0, 9)
        self.dots = rng.integers(-4, 9, (self.pages, 64, num, heads)).astype(np.float32)
        self.weights = rng.standard_normal((num, heads)).astype(np.float32)
        self.weights[::5] = -np.abs(self.weights[::5])
        self.dots[:, :, ::5] *= rng.integers(0, 2, (self.pages, 64, 1, 1))  # many sums of -0.0, plateaus
        self.bytes = np.zeros((self.pages, WORDS), np.float32)
        self.bytes[:, PAGE * D // 4 :] = np.exp2(rng.integers(-3, 3, (self.pages, 64)))
        terms, sums = np.maximum(self.dots, 0), 0
        padded = 64 if heads > 32 else fused.layout(heads)["HEADS"]
        terms, weights = (np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded - heads)]) for x in (terms, self.weights))
        for head in range(0, padded, 8):
            sums = (terms[..., head : head + 8].astype(float) * weights[:, head : head + 8] + sums).astype(np.float32)
        t = [sums[..., 2 * c] + sums[..., 2 * c + 1] for c in range(4)]
        scores = ((t[0] + t[2]) + (t[1] + t[3]) + np.float32(0)) * self.bytes[:, PAGE * D // 4 :, None]
        self.scores = np.full((num, 48 * 64), np.nan, np.float32)
        for row, owner in enumerate(self.owners):
            for tile, page in enumerate(self.table[owner]):
                if page >= 0:
                    self.scores[row, tile * 64 : tile * 64 + 64] = scores[page, :, row]
        self.levels = np.nanquantile(self.scores, 0.9, axis=1, method="nearest").astype(np.float32)
        self.levels[1::7] = -np.inf
        self.levels[2::7] = np.inf
        self.level_keys = rng.choice(np.int32([-1, 2**31 - 1, 900, 64 * 11 - 1]), num)

    def passing(self, row: int) -> dict[int, int]:
        """Keys and score bits."""
        key = np.arange(48 * 64)
        score, level = self.scores[row], self.levels[row]
        passes = ((score > level) | ((score == level) & (key <= self.level_keys[row]))) & (key <= self.positions[row])
        return {int(k): int(score[k].view(np.int32)) for k in key[passes]}

    def of_columns(self, values: np.ndarray, shape: dict[str, int], first: int, chunk: int) -> np.ndarray:
        """``[..., rows, heads]`` by the columns of a chunk of up to 32 heads, zeros where there is no row or head."""
        row, head = plain(tiles.row_and_head, language([]))(np.arange(128), shape["HB"])
        head = head + shape["HB"] * chunk * (shape["TILES"] == 1)
        here = (first + row < self.num) & (head < self.heads)
        return np.where(here, values[..., np.where(here, first + row, 0), np.where(here, head, 0)], np.float32(0))


def collect(world: World, room: int) -> tuple[np.ndarray, np.ndarray]:
    """``found`` and ``counts`` of both consumers of every unit, after one program."""
    shape = fused.layout(world.heads)
    block, heads, two = shape["BLOCK"], shape["HEADS"], shape["TILES"] == 2
    places, stages = 32, 8 // shape["TILES"]
    found = np.full((world.num, RUNS * places * room + fused.PAST), -7)
    counts = np.full((world.num, RUNS * places), -7, np.int32)
    memory = [
        world.bytes, world.owners, world.positions, world.lengths, world.table, world.levels, world.level_keys, found, counts
    ]  # fmt: skip
    scales, owners, positions, lengths, table, levels, level_keys, found_at, counts_at = (
        Pointer(memory, number * 2**40, value.dtype) for number, value in enumerate(memory)
    )
    gl = language(memory)
    num, num_keys, requests, pages, runs = (array(x, np.int32) for x in (world.num, 48 * 64, 2, world.pages, RUNS))
    fetched: list[tuple[int, int]] = []
    turn: dict[str, Any] = {}

    def wait(barrier: tuple[str, int], phase: int) -> None:
        which, slot = barrier
        count = turn["count"]
        assert (slot, phase) == (count % stages, count // stages & 1 ^ (which == "empty"))
        turn["count"] += which == "full"
        turn["slot"] = slot

    barriers = [types.SimpleNamespace(index=lambda slot, which=which: (which, int(slot))) for which in ("full", "empty")]
    slots = types.SimpleNamespace(index=int)

    def fetch(desc, where, barrier, slot):
        assert slot // shape["TILES"] == turn["count"] % stages
        assert where[1:] == [0, 0]
        fetched.append((slot, int(where[0])))
        turn["count"] += slot % shape["TILES"] == shape["TILES"] - 1

    tma = types.SimpleNamespace(async_copy_global_to_shared=fetch)
    mbarrier = types.SimpleNamespace(wait=wait, expect=lambda barrier, size: None, arrive=lambda barrier: None)
    turn["count"] = 0
    plain(kernels._producer, gl, {"tma": tma, "mbarrier": mbarrier})(
        None, owners, positions, lengths, table, num, num_keys, requests, pages, runs, 48, slots, *barriers,
        block, stages, D, PAGE, shape["TILES"],
    )  # fmt: skip

    def load(q, weights, first, *rest):
        turn["first"] = int(first)
        return [array(np.broadcast_to(world.of_columns(world.weights, shape, turn["first"], chunk), (64, 128))) for chunk in range(2)]

    def multiply(buffers, chunk, index, zero, slots_in_all, dim):
        slot, page = fetched[(turn["count"] - 1) * shape["TILES"] + int(index) % shape["TILES"]]
        assert slot == index
        return array(world.of_columns(world.dots[page], shape, turn["first"], chunk))

    def append_quick(score, bar, key, at, into):
        passes = score >= bar
        bits = np.ascontiguousarray(score).view(np.int32).astype(np.int64)
        store(into + (at >> 3), bits << 32 | key, passes)
        turn["quick"] = turn.get("quick", 0) + 1
        return at + passes.astype(np.int32) * 8

    instead = {
        "load_queries": load, "multiply": multiply, "warpgroup_mma_wait": lambda left, given: given[0],
        "mbarrier": mbarrier, "append_quick": append_quick, "QUICK": 4,
    }  # fmt: skip
    for half in range(2):
        turn["count"] = 0
        chunks = types.SimpleNamespace(index=lambda i, half=half: types.SimpleNamespace(permute=lambda dims: i - half * (1 if two else 2)))
        plain(kernels._consumer, gl, instead)(
            None, None, scales, owners, positions, lengths, table, levels, level_keys, found_at, counts_at,
            num, world.heads, num_keys, requests, pages, runs, found.shape[1], 0, 0, 0, array(WORDS, np.int32), 48,
            None, chunks, *barriers, half, heads, block, shape["ROWS"], stages, D, PAGE, shape["HB"], shape["SUB"], room,
            shape["TILES"],
        )  # fmt: skip
        assert turn["count"] == len(fetched) // shape["TILES"]
    assert turn["quick"] > 20
    return found, counts


def keep(world: World, room: int, found: np.ndarray, counts: np.ndarray) -> None:
    """What ``level_kernel`` enters: the sample's pairs, of tiles that eight rows of one request all see, if each is longer than WHOLE."""
    counts[:] = 0
    ends = world.positions + 1
    for row in range(world.num):
        near = [n for n in range(row // 8 * 8, min(row // 8 * 8 + 8, world.num)) if world.owners[n] == world.owners[row]]
        stop = min(ends[n] // 64 if ends[n] > WHOLE else 0 for n in near)
        for key, bits in world.passing(row).items():
            if key // 64 < stop and key // 64 % STRIDE == 0:
                to = key % counts.shape[1]
                if counts[row, to] < room:
                    found[row, to * room + counts[row, to]] = bits << 32 | key
                counts[row, to] += 1


def collect_quads(world: World, room: int, kept: bool) -> tuple[np.ndarray, np.ndarray]:
    """The same of the kernel for more heads, with its four consumers."""
    stages = gluon.QUAD_STAGES
    found = np.full((world.num, RUNS * 64 * room), -7)
    counts = np.full((world.num, RUNS * 64), -7, np.int32)
    if kept:
        keep(world, room, found, counts)
    memory = [world.owners, world.positions, world.lengths, world.table, world.levels, world.level_keys, found, counts]
    owners, positions, lengths, table, levels, level_keys, found_at, counts_at = (
        Pointer(memory, number * 2**40, value.dtype) for number, value in enumerate(memory)
    )
    gl = language(memory)
    sizes = (world.num, 48 * 64, 2, world.pages, RUNS, STRIDE, WHOLE)
    num, num_keys, requests, pages, runs, stride, whole = (array(x, np.int32) for x in sizes)
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
            turn["there"] = False

    barriers = [types.SimpleNamespace(index=lambda slot, which=which: (which, int(slot))) for which in ("full", "empty")]

    def fetch(desc, where, barrier, slots):
        assert slots.slot == turn["count"] % stages
        if slots.name == "scales":
            assert where == [where[0], PAGE * D // 4]
            turn["there"] = True
        else:
            assert where[1:] == [0, 0]
            fetched.append((int(where[0]), turn["there"]))
            turn["count"] += 1

    tma = types.SimpleNamespace(async_copy_global_to_shared=fetch)
    mbarrier = types.SimpleNamespace(wait=wait, expect=lambda barrier, size: None, arrive=lambda barrier: None)
    gl.full = lambda shape, value, kind, layout: np.full(shape, value, kind)
    plain(quads._producer, gl, {"tma": tma, "mbarrier": mbarrier})(
        None, None, owners, positions, lengths, table, num, num_keys, requests, pages, runs, stride, whole, 48,
        Slots("keys"), Slots("scales"), *barriers, stages, D, PAGE, kept,
    )  # fmt: skip

    def of_columns(values):
        row, head = plain(order.row_and_head, gl)(np.arange(128))
        here = (turn["first"] + row < world.num) & (head < world.heads)
        return np.where(here, values[..., np.where(here, turn["first"] + row, 0), np.where(here, head, 0)], np.float32(0))

    def load(q, weights, first, *rest):
        turn["first"] = int(first)
        return array(np.broadcast_to(of_columns(world.weights), (64, 128)))

    def scales_of(slots, layout):
        page, there = fetched[turn["count"] - 1]
        key, _query = plain(order.places, gl)(None)
        scale = world.bytes[page, PAGE * D // 4 :][key] if there else np.float32(np.nan) + 0 * key
        return array(scale, np.float32)

    instead = {
        "load_queries": load, "warpgroup_mma": lambda slots, *rest, **options: array(of_columns(world.dots[fetched[turn["count"] - 1][0]])),
        "warpgroup_mma_wait": lambda left, given: given[0], "mbarrier": mbarrier, "scales_of": scales_of, "_across_four": across_four,
        "lanes": lambda zero: None,
    }  # fmt: skip
    for which in range(4):
        turn["count"] = 0
        plain(quads._consumer, gl, instead)(
            None, None, owners, positions, lengths, levels, level_keys, found_at, counts_at, num, world.heads, num_keys, requests, runs,
            stride, whole, 0, 0, 0, Slots("keys"), Slots("scales"), Slots("queries"), *barriers, which, stages, D, room, kept,
        )  # fmt: skip
        assert turn["count"] == len(fetched)
    return found, counts


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("heads", "num"), [(5, 40), (8, 33), (16, 19), (32, 17), (24, 9), (64, 9), (40, 17)])
@pytest.mark.parametrize("room", [12, 72])
def test_every_pair_that_passes_is_listed_once(heads, num, room, seed):
    world = World(heads, num, seed)
    found, counts = collect_quads(world, room, seed % 2 == 1) if heads > fused.QUADS else collect(world, room)
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
