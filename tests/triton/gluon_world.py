"""A small world of pages, queries and scores, and a ring of tiles: what stands for memory, the copy engine and barriers where the Hopper
kernels' own source runs on NumPy."""

from __future__ import annotations

import importlib
import types
from typing import Any

import numpy as np

from .gluon_on_numpy import array, heads_in_order, language, plain

tiles = importlib.import_module("thresher.ops.index_score.gluon_tiles")
score = importlib.import_module("thresher.ops.index_score.triton")
D, PAGE = 64, 64
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
        padded = 64 if heads > 32 else score.layout(heads)["HEADS"]
        dots, weights = (np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded - heads)]) for x in (self.dots, self.weights))
        scores = (heads_in_order(dots, weights) + np.float32(0)) * self.bytes[:, PAGE * D // 4 :, None]
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


class Slots:
    """Buffers of a ring, or one of them: what is stored to scales says that their page is not there."""

    def __init__(self, ring: TileRing, name: str, slot: int = -1) -> None:
        self.ring, self.name, self.slot = ring, name, slot

    def index(self, slot: Any) -> Slots:
        return Slots(self.ring, self.name, int(slot))

    def store(self, value: Any) -> None:
        assert self.name == "scales"
        assert (np.asarray(value).view(np.int32) == tiles.ABSENT.value).all()
        self.ring.scaled[self.slot] = None


class TileRing:
    """The ring of a kernel for up to 32 heads: its loading warp fills it, and then each consumer reads it from the start.

    Attributes:
        barriers: what stands for ``full`` and ``empty``.
        slots, scales: what stands for the tiles' buffers and their scales'.
        loading, consuming: what to put in the place of names in the kernel's source.
    """

    def __init__(self, world: World, in_all: int) -> None:
        self.world, self.shape = world, score.layout(world.heads)
        self.tiles = self.shape["TILES"]
        self.columns = self.shape["SUB"] * self.shape["HB"] * 8
        self.stages = in_all // self.tiles
        self.barriers = [types.SimpleNamespace(index=lambda slot, which=which: (which, int(slot))) for which in ("full", "empty")]
        self.slots, self.scales = Slots(self, "keys"), Slots(self, "scales")
        mbarrier = types.SimpleNamespace(wait=self.wait, expect=self.expect, arrive=lambda barrier: None)
        tma = types.SimpleNamespace(async_copy_global_to_shared=self.fetch)
        self.loading = {"tma": tma, "mbarrier": mbarrier, "fence_async_shared": lambda: None}
        self.consuming = {
            "load_queries": self.load, "multiply": self.multiply, "warpgroup_mma_wait": lambda left, given: given[0], "mbarrier": mbarrier,
        }  # fmt: skip
        self.scaled: dict[int, int | None] = {}  # slot -> page whose scales were last asked for
        self.fetched: list[tuple[int, int, bool]] = []  # slot, page, and whether its scales came
        self.count = self.first = self.expected = 0

    def wait(self, barrier: tuple[str, int], phase: int) -> None:
        which, slot = barrier
        assert (slot, phase) == (self.count % self.stages, self.count // self.stages & 1 ^ (which == "empty"))
        assert self.expected == 0, "all bytes have come"
        self.count += which == "full"

    def expect(self, barrier: tuple[str, int], size: int) -> None:
        assert barrier[1] == self.count % self.stages
        self.expected = size

    def fetch(self, desc: Any, where: list[Any], barrier: Any, slots: Slots) -> None:
        slot, page = slots.slot, int(where[0])
        turn, tile = divmod(slot, self.tiles)
        if slots.name == "scales":
            assert turn == self.count % (2 * self.stages), "scales last a round longer than their tile"
            assert where[1] == PAGE * D // 4
            self.scaled[slot] = page
            self.expected -= 64 * 4
        else:
            assert turn == self.count % self.stages
            assert where[1:] == [0, 0]
            scaled = self.scaled[self.count % (2 * self.stages) * self.tiles + tile]
            there = scaled is not None
            assert not there or scaled == page
            self.fetched.append((slot, page, there))
            self.expected -= 64 * D
            self.count += slot % self.tiles == self.tiles - 1

    def load(self, q: Any, weights: Any, first: Any, *rest: Any) -> list[np.ndarray]:
        self.first = int(first)
        return [array(np.broadcast_to(self.of_columns(self.world.weights / 2, chunk), (64, self.columns))) for chunk in range(2)]

    def tile(self, index: int, rounds: int = 1) -> tuple[int, bool]:
        """The page in a slot that is being consumed, of a ring ``rounds`` times as long as that of tiles, and whether it is there."""
        turn, tile = divmod(index, self.tiles)
        assert turn == (self.count - 1) % (rounds * self.stages)
        _slot, page, there = self.fetched[(self.count - 1) * self.tiles + tile]
        return page, there

    def multiply(self, buffers: Any, chunk: int, index: Any, zero: Any, slots_in_all: int, dim: int) -> np.ndarray:
        return array(self.of_columns(self.world.dots[self.tile(int(index))[0]], chunk))

    def scales_of(self, slots: Slots) -> np.ndarray:
        """A tile's scales ``[64]``."""
        page, there = self.tile(slots.slot, rounds=2)
        held = self.world.bytes[page, PAGE * D // 4 :]
        return array(held if there else np.full(64, tiles.ABSENT.value, np.int32).view(np.float32))

    def of_columns(self, values: np.ndarray, chunk: int) -> np.ndarray:
        """``[..., rows, heads]`` by a chunk's columns, zeros where there is no row or head."""
        row, head = plain(tiles.row_and_head, language([]))(np.arange(self.columns), self.shape["HB"])
        head = head + self.shape["HB"] * chunk * (self.tiles == 1)
        here = (self.first + row < self.world.num) & (head < self.world.heads)
        return np.where(here, values[..., np.where(here, self.first + row, 0), np.where(here, head, 0)], np.float32(0))

    def chunks(self, half: int) -> Any:
        """What stands for the buffers of queries, for half ``half``: a chunk's number. From here on the ring is read from its start."""
        self.count = 0
        return types.SimpleNamespace(index=lambda i: types.SimpleNamespace(permute=lambda dims: i - half * (3 - self.tiles)))

    def all_read(self) -> bool:
        return self.count == len(self.fetched) // self.tiles
