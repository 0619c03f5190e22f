"""The Hopper kernels' rearrangements, their own source run on NumPy: what a tile's columns become, in which order heads are added, and
which scores a bar lets pass. Gluon itself cannot be interpreted; all that these functions do is defined without layouts."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from .gluon_on_numpy import Pointer, across_four, array, heads_in_order, language
from .gluon_on_numpy import plain as on_numpy

tiles = importlib.import_module("thresher.ops.index_score.gluon_tiles")
quads = importlib.import_module("thresher.ops.index_score.gluon_quads")
lists = importlib.import_module("thresher.ops.score_select.gluon_lists")
kernels = importlib.import_module("thresher.ops.score_select.gluon_kernels")
fused = importlib.import_module("thresher.ops.score_select.triton")
GL = language([])
GL.allocate_shared_memory = lambda kind, shape, layout, value: Held(value)


def plain(jitted: Any) -> Any:
    return on_numpy(jitted, GL)


def drawn(rows, heads):
    rng = np.random.default_rng(heads)
    dots, weights = rng.standard_normal((64, rows, heads), np.float32), rng.standard_normal((1, rows, heads), np.float32)
    return dots, np.broadcast_to(weights, dots.shape)


@pytest.mark.parametrize("heads", [8, 16, 32])
def test_whole_heads_are_added_in_the_order_of_plain_triton(heads):
    shape = fused.layout(heads)
    dots, weights = drawn(shape["ROWS"], heads)
    row, head = plain(tiles.row_and_head)(np.arange(128), shape["HB"])
    sums = np.zeros((), np.float32)
    for chunk in range(heads // shape["HB"]):
        take = (slice(None), row, head + chunk * shape["HB"])
        sums = plain(tiles.chunk_sums)(dots[take], weights[take] / 2, sums, shape["SUB"], shape["HB"], chunk == 0)
    total = plain(tiles.whole_sums)(sums, shape["SUB"])
    assert np.array_equal(total.reshape(64, shape["ROWS"]), heads_in_order(dots, weights))


def test_four_lanes_are_added_in_the_order_of_plain_triton():
    """And every sum stands where its key and query say."""
    dots, weights = drawn(2, 64)
    row, head = plain(quads.row_and_head)(np.arange(128))
    take = (slice(None), row, head)
    zero = np.zeros((64, 128), np.float32)
    sums = on_numpy(quads.sums_of_heads, GL, {"_across_four": across_four})(dots[take], weights[take] / 2, None, zero)
    key, query = plain(quads.places)(None)
    assert np.array_equal(sums, heads_in_order(dots, weights)[key, query])
    assert len(set((key * 2 + query).flatten().tolist())) == 128


class Held:
    """Shared memory that is given what it holds."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def load(self, layout: Any) -> Any:
        return self.value

    def store(self, value: Any) -> None:
        self.value = value

    def index(self, number: int) -> Held:
        return self


@pytest.mark.parametrize(("heads", "apart"), [(8, True), (16, False), (16, True), (32, False), (32, True), (64, True)])
def test_every_column_has_its_own_weight(heads, apart):
    """Although, where they stand apart, those of the columns beside them are loaded; and no row or head that is not there."""
    num, given = 11, heads - 3
    memory = [np.zeros((num, given, 64), np.uint8), np.random.default_rng(0).standard_normal((num, given), np.float32)]
    q, weights = (Pointer(memory, number * 2**40, value.dtype) for number, value in enumerate(memory))
    loading = {"fence_async_shared": lambda: None}
    if heads == 64:
        zero, first = np.zeros((64, 128), np.float32), 10
        got = [on_numpy(quads.load_queries, GL, loading)(q, weights, first, num, given, given * 64, 64, given, Held(None), zero, 64, None)]
        columns = [plain(quads.row_and_head)(np.arange(128))]
    else:
        shape = fused.layout(heads)
        zero, first, chunk = np.zeros((64, shape["SUB"] * shape["HB"] * 8), np.float32), 8, shape["HB"]
        got = on_numpy(tiles.load_queries, GL, loading)(
            q, weights, first, num, given, given * 64, 64, given, Held(None), zero, 0, heads, 64, chunk, shape["SUB"], None, apart
        )
        row, head = plain(tiles.row_and_head)(np.arange(zero.shape[1]), chunk)
        columns = [(row, head), (row, head + chunk * (heads > chunk))]
    for weight, (row, head) in zip(got, columns, strict=True):
        there = (first + row < num) & (head < given)
        want = np.where(there, memory[1][np.where(there, first + row, 0), np.where(there, head, 0)] / 2, 0)
        assert weight.shape == zero.shape
        assert (weight == want).all()


@pytest.mark.parametrize("heads", [8, 16, 32])
def test_every_score_has_its_row_key_and_list(heads):
    """The two halves hold each (key, row) once, and both keys of a place go to one list that nobody else has."""
    shape = fused.layout(heads)
    sub = shape["SUB"]
    said = np.arange(64)[:, None] * 100 + np.arange(shape["ROWS"])
    low, high = plain(lists.halves)(said.reshape(64, sub, 2, 4), sub)
    row, place, which = plain(lists.rows_and_places)(sub, None)
    assert np.array_equal(low, place * 100 + row + 0 * low)
    assert np.array_equal(high, (place + 8) * 100 + row + 0 * high)
    assert len(set((which * 100 + row + 0 * low).flatten().tolist())) == 32 * shape["ROWS"]
    assert (which.min(), which.max()) == (0, 31)


@pytest.mark.parametrize("tiles_a_turn", [1, 2])
@pytest.mark.parametrize("runs", [1, 3, 4])
def test_every_tile_has_one_turn(runs, tiles_a_turn):
    for begin, stop in ((0, 0), (0, 1), (0, 17), (0, 40), (7, 7)):
        seen = []
        for run in range(runs):
            first, last = plain(kernels._turns)(begin, stop, run, runs, tiles_a_turn)
            seen += [turn * tiles_a_turn + tile for turn in range(first, last, runs) for tile in range(tiles_a_turn)]
        assert sorted(set(range(begin, stop)) - set(seen)) == []
        assert len(seen) == len(set(seen))
        assert max(seen, default=-1) <= max(stop, 1)


def test_the_bar_lets_pass_what_the_rule_does():
    """For every quick turn, on scores around the level, in rows that have ended, end in it or stop taking ties in it; others need care."""
    levels = np.float32([1.5, 0.0, -0.0, -2.0, np.inf, -np.inf, 1e-45, -1e-45, np.finfo(np.float32).max, 3e38])
    rng = np.random.default_rng(0)
    most, runs, span = 10, 3, 128
    longest = 0
    for _ in range(300):
        shape = (1, 1, 2, 2, 4)
        level = array(rng.choice(levels, shape))
        end = rng.integers(0, 60 * span, shape) if rng.random() < 0.5 else rng.integers(0, 3, shape) * 40 * span
        tie_end = rng.choice([0, 2**31 - 1, 17 * span, int(rng.integers(0, 60 * span))], shape)
        overfull = rng.random(shape) < 0.2
        turn, limit = int(rng.integers(0, 50)), int(rng.choice([51, 75, 999]))
        rows = end.flatten(), tie_end.flatten()
        edge, bar = plain(lists.look_ahead)(turn, runs, *rows, end, level, tie_end, overfull, most, span)
        quick, careful, upto = plain(lists.turns_ahead)(turn, limit, edge, runs, most)
        assert upto == min(limit, turn + most * runs)
        assert (careful - turn) % runs == 0
        assert [*range(turn, quick, runs), *range(careful, upto, runs)] == [*range(turn, upto, runs)]
        longest = max(longest, len(range(turn, quick, runs)))
        with np.errstate(over="ignore"):
            around = np.nextafter(level, np.float32(np.inf)), np.nextafter(level, np.float32(-np.inf))
        for at in range(turn, quick, runs):
            for key in (at * span, at * span + 5, at * span + span - 1):
                for score in (level, *around, level * np.nan, -level):
                    passes = ((score > level) | ((score == level) & (key < tie_end))) & (key < end) & ~overfull
                    assert np.array_equal(np.asarray(score) >= np.asarray(bar), passes)
    assert longest == most
