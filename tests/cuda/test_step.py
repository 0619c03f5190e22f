"""``step.cu``, all blocks at once and their threads in turn on a CPU: the two steps' sets, bit for bit."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from thresher.cache.block_means import Growing
from thresher.cache.device import paged_rows
from thresher.ops import select_blocks, select_topk, select_topk_in_blocks, to_slots
from thresher.ops import send as sending
from thresher.ops.hisa_select import cuda as hisa
from thresher.ops.pool_keys import walks
from thresher.ops.score_select import cuda as step
from thresher.ops.send import Send
from thresher.types import IndexKeys, IndexQuery, Selection

from ..triton.gluon_on_numpy import heads_in_order
from .threads import in_order, library, needs_compiler

pytestmark = needs_compiler
PAGES = 200


class Paged:
    """Requests in shuffled pages, with holes. With a trend, 1 or -1, all keys are alike but for scales that rise or fall with positions."""

    def __init__(self, rng: np.random.Generator, lengths: list[int], dim: int, spread: int, trend: int = 0) -> None:
        width = max(-(-length // 64) for length in lengths) + 1
        self.table = np.full((len(lengths), width), -1, np.int32)
        order = rng.permutation(PAGES).astype(np.int32)
        at = 0
        for request, length in enumerate(lengths):
            tiles = -(-length // 64)
            self.table[request, :tiles] = order[at : at + tiles]
            at += tiles
            if tiles > 4:
                self.table[request, [1, tiles - 2]] = -1, PAGES
        self.k = rng.integers(-2, 3, (PAGES, 64, dim))
        self.scales = np.exp2(rng.integers(-spread, spread + 1, (PAGES, 64))).astype(np.float32)
        if trend:
            self.k[:] = 1
            here = self.table[(self.table >= 0) & (self.table < PAGES)]
            self.scales[here] = 1 + (trend * np.arange(len(here) * 64) % 2**16).reshape(-1, 64) / 2**16
        pages = np.zeros((PAGES, 64 * (dim + 4)), np.uint8)
        pages[:, : 64 * dim] = torch.from_numpy(self.k).float().to(torch.float8_e4m3fn).view(torch.uint8).reshape(PAGES, -1).numpy()
        pages[:, 64 * dim :] = self.scales.view(np.uint8)
        self.keys = IndexKeys(torch.from_numpy(pages).view(PAGES, 64, 1, dim + 4), torch.from_numpy(self.table), torch.tensor(lengths))

    def scores(self, q: np.ndarray, weights: np.ndarray, owners: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """-inf where there is no page, or from a row's end on."""
        num, heads = weights.shape
        padded = max(8, 1 << (heads - 1).bit_length())
        dots = np.einsum("pkd,qhd->pkqh", self.k.astype(np.float32), q.astype(np.float32))
        dots, weights = (np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded - heads)]) for x in (dots, weights))
        with np.errstate(invalid="ignore"):
            made = np.maximum(heads_in_order(dots, weights) * self.scales[..., None] + np.float32(0), np.finfo(np.float32).min)
        scores = np.full((num, self.table.shape[1] * 64), -np.inf, np.float32)
        for row, owner in enumerate(owners):
            for tile, page in enumerate(self.table[owner]) if 0 <= owner < len(self.table) else ():
                if 0 <= page < PAGES:
                    scores[row, tile * 64 : tile * 64 + 64] = made[page, :, row]
        scores[np.arange(scores.shape[1]) >= ends[:, None]] = -np.inf
        return scores


class World:
    """Queries of such requests, and of none. Dots are whole numbers, so their order of addition does not show; that of heads does."""

    def __init__(
        self, heads: int, dim: int, lengths: list[int], num: int, seed: int, spread: int = 3, block: int = 0, alike: bool = False,
        trend: int = 0,
    ) -> None:  # fmt: skip
        rng = np.random.default_rng(seed)
        held = Paged(rng, lengths, dim, spread, trend)
        owners = rng.integers(0, len(lengths), num)
        owners[:3] = (0, len(lengths), -1)[:num]
        reach = np.int64(lengths)[owners.clip(0, len(lengths) - 1)]
        positions = np.where(rng.random(num) < 0.5, reach - 1, (reach * rng.random(num)).astype(np.int64) - 1)
        positions[0] = 10**12
        if alike:  # each request's last token
            owners = np.arange(num)
            reach = np.int64(lengths)
            positions = reach - 1
        ends = np.where((owners >= 0) & (owners < len(lengths)), np.minimum(positions + 1, reach), 0)
        q = rng.integers(-2, 3, (num, heads, dim))
        q[3::4] = 0  # plateaus
        weights = rng.standard_normal((num, heads)).astype(np.float32)
        weights[1::5] = -np.abs(weights[1::5])  # sums of -0.0
        weights[2::7, 0] = np.nan
        if spread:
            weights[4::9, -1] = -np.inf  # where a dot is not above 0, NaN; elsewhere the least score
        if trend:
            q, weights = np.abs(q), np.abs(weights)
        wide = torch.zeros(num, heads, dim + 32)  # rows that are not contiguous
        wide[..., 16:-16] = torch.from_numpy(q)
        fp8 = wide.to(torch.float8_e4m3fn)[..., 16:-16]
        self.query = IndexQuery(fp8, torch.from_numpy(weights), *(torch.from_numpy(x) for x in (positions, owners)))
        self.keys, self.ends, self.scores = held.keys, ends, held.scores(q, weights, owners, ends)
        if block:
            self.block, of_blocks = block, Paged(rng, [length // block for length in lengths], dim, spread)
            self.means, self.block_scores = of_blocks.keys, of_blocks.scores(q, weights, owners, ends // block)

    def check(self, topk: int, with_scores: bool, programs: int) -> None:
        shared = torch.zeros(step.shared_words(len(self.scores), programs), dtype=torch.int32)
        got = step.select_step(self.query, self.keys, topk, with_scores, programs, shared)
        assert not shared.any(), "what the next launch begins with"
        agree(got, select_topk(torch.from_numpy(self.scores), topk, impl="reference"), with_scores)
        self.check_slots(got)

    def check_in_blocks(self, num_blocks: int, topk: int, with_scores: bool, programs: int) -> None:
        shared = torch.zeros(hisa.shared_words(len(self.scores), num_blocks, programs), dtype=torch.int32)
        given = self.query, self.keys, self.means, num_blocks, self.block, topk
        got = hisa.select_step(*given, with_scores, programs, shared)
        assert not shared.any(), "what the next launch begins with"
        # The reference asks for requests that are there; those of none see nothing, like one at -1.
        none = torch.from_numpy(self.ends == 0)
        query = replace(self.query, positions=self.query.positions.masked_fill(none, -1), requests=self.query.requests.masked_fill(none, 0))
        blocks = select_blocks(torch.from_numpy(self.block_scores), num_blocks, query, self.keys, self.block, impl="reference")
        tokens = (blocks.long()[:, :, None] * self.block + torch.arange(self.block)).flatten(1)
        scores = torch.nn.functional.pad(torch.from_numpy(self.scores), (0, self.block), value=-np.inf)
        in_blocks = scores.gather(1, tokens.clamp(0, scores.shape[1] - 1)).masked_fill(tokens < 0, -np.inf)
        agree(got, select_topk_in_blocks(in_blocks, topk, blocks, self.block, impl="reference"), with_scores)
        self.check_slots(got)

    def check_slots(self, got: Selection) -> None:
        """Queries of no request, whose rows are empty, may ask for any."""
        owners = self.query.requests.clamp(0, len(self.keys.lengths) - 1)
        assert torch.equal(got.slots, to_slots(got.indices, self.keys.page_table, owners, 64, impl="reference"))


def agree(got: Selection, want: Selection, with_scores: bool) -> None:
    assert torch.equal(got.lengths, want.lengths)
    assert torch.equal(got.indices, want.indices)
    if with_scores:
        nan = want.scores.isnan()
        assert torch.equal(got.scores.isnan(), nan)
        assert torch.equal(got.scores[~nan], want.scores[~nan] + 0.0)


@pytest.fixture(params=[0, 1, 8, 9])
def order(request, monkeypatch):
    return put_in_order(request.param, monkeypatch)


@pytest.fixture(params=[0, 1, 2, 8, 9])
def any_order(request, monkeypatch):
    """With the one in which warps that fetch fall far behind: for kernels in which they start anew."""
    return put_in_order(request.param, monkeypatch)


def put_in_order(order: int, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(step.launch, "launch", in_order(order))
    monkeypatch.setattr(step.launch, "tile_map", tile_map)
    return order


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


def leave_room(monkeypatch, num: int, pairs: int) -> None:
    """In shared memory for so many pairs of a warp, for 16 heads of 64."""
    full = step.shared_memory(16, 64, num, 999)
    monkeypatch.setattr(step.launch, "SHARED", full.size - 8 * step.WARPS * (full.held - pairs))


def test_pairs_that_shared_memory_has_no_room_for(order, monkeypatch):
    leave_room(monkeypatch, 6, 2)
    World(16, 64, [1300, 0, 500, 64], 6, 3).check(64, True, 3)
    monkeypatch.setattr(step, "MASKED", 256)
    World(16, 64, [1300, 0, 500, 64], 6, 3).check(64, True, 3)


@pytest.mark.parametrize("trend", [0, 1, -1])
def test_a_bound_that_rises(trend, order, monkeypatch):
    """Scores as they come, ever better, so that all are kept, and ever worse. Then with less room than for them."""
    world = World(3, 64, [64 * 185, 64 * 10], 2, order, trend=trend, alike=True)
    for topk in (1, 500, 5000):
        world.check(topk, topk == 500, 1)
    leave_room(monkeypatch, 2, 280)
    world.check(500, True, 1)
    World(3, 64, [64 * 150], 1, order, spread=0).check(200, False, 1)
    World(8, 64, [64 * 64], 1, order).check(200, False, 1)  # when its last tiles are all but done


@pytest.mark.parametrize("programs", [6, 7])
def test_as_many_queries_as_blocks(programs, order):
    """All but equal, so that their ends and the blocks' drift apart."""
    World(8, 64, [1900, 1890, 1900, 1860, 1900, 1900], 6, 4, alike=True).check(100, True, programs)
    World(8, 64, [960] * 6, 6, 5, block=64, alike=True).check_in_blocks(5, 100, True, programs)


def test_more_queries_than_blocks(order):
    World(8, 64, [300, 1, 130], 70, 5).check(32, False, 3)


@pytest.mark.parametrize(("heads", "dim", "block", "programs"), [(5, 64, 64, 1), (32, 64, 128, 4), (40, 128, 192, 7)])
@pytest.mark.parametrize(("num_blocks", "topk"), [(2, 50), (9, 300), (40, 10)])
def test_the_set_of_the_four_operations(heads, dim, block, programs, num_blocks, topk, any_order):
    """Blocks that are chosen by their means, then tokens in them; some requests have few blocks, or one that is not full."""
    World(heads, dim, [2500, 0, 500, 64, 100], 9, heads + any_order, block=block).check_in_blocks(num_blocks, topk, topk != 50, programs)


@pytest.mark.parametrize(("topk", "programs"), [(700, 1), (700, 3), (3000, 9)])
def test_rows_that_are_taken_whole(topk, programs, order):
    """Some of the queries, or all: with holes, and with scores of all kinds."""
    World(8, 64, [2500, 0, 500, 64, 700, 701], 20, order).check(topk, False, programs)


@pytest.mark.parametrize(("heads", "dim"), [(9, 64), (64, 128)])
def test_one_query(heads, dim, any_order):
    """A kernel of its own."""
    world = World(heads, dim, [4000], 1, any_order, block=128)
    for programs in (1, 5, 9):
        world.check(300, True, programs)
        world.check_in_blocks(7, 500, False, programs)


def test_many_blocks(any_order):
    """More than a tile of means."""
    World(8, 64, [64 * 90, 300], 3, 5, block=64).check_in_blocks(20, 400, True, 4)


GROWING = [(64, 64, [2500, 0, 640, 65], 7), (128, 320, [3000], 3), (64, 64, [130] * 9, 4)]


@pytest.mark.parametrize(("dim", "block", "lengths", "programs"), GROWING)
def test_means_grow_in_the_same_launch(dim, block, lengths, programs, order):
    """What became full is pooled, with the bits of the kernel that does only that, also of requests whose pages have holes."""
    world = World(8, dim, lengths, 9, order, block=block)
    keys, means, shared = world.keys, world.means, torch.zeros(hisa.shared_words(9, 4, programs), dtype=torch.int32)
    whole, empty = replace(means, pages=torch.zeros_like(means.pages)), replace(means, pages=torch.zeros_like(means.pages))
    zero, none = torch.zeros_like(keys.lengths), torch.zeros(len(lengths), dtype=torch.int32)
    walks.pool(paged_rows(keys), zero, keys.lengths, block, 5, paged_rows(whole), means.page_table.shape[1], dim)
    sizes = 4, block, 100, True, programs, shared
    empty.lengths[:] = 0
    for length in (keys.lengths // 2, keys.lengths, keys.lengths):  # all, some, none
        held = replace(keys, lengths=length)
        got = hisa.select_step(world.query, held, Growing(empty, zero, none), *sizes)
        assert not shared.any(), "what the next launch begins with"
        assert torch.equal(zero // block, length // block)
        assert torch.equal(empty.lengths, length // block)
        agree(got, hisa.select_step(world.query, held, whole, *sizes), True)
    assert torch.equal(empty.pages, whole.pages)


class Memories:
    """Of some ranks: flags, and behind them what is sent to each, ``[tokens, R, row]``; all are in their third turn."""

    def __init__(self, ranks: int, tokens: int, row: int, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.words = torch.randint(-(2**62), 2**62, (ranks, tokens, row), generator=rng)
        self.held = torch.zeros(ranks, 1024 // 8 + tokens * ranks * row, dtype=torch.int64)
        self.addresses = torch.tensor([held.data_ptr() for held in self.held])
        self.turns = torch.full((ranks, 9), 2, dtype=torch.int32)

    def send(self, rank: int) -> Send:
        return Send(self.words[rank].flatten(), self.words.shape[2], self.addresses, 1024, self.turns[rank], 2, rank, 10**9)

    def flags(self, rank: int) -> torch.Tensor:
        ranks = len(self.words)
        return self.held[rank, :128].view(torch.int32)[: 9 * ranks].view(9, ranks)

    def in_turn(self) -> Iterator[Send]:
        """Each rank's, while those that come later seem to have come."""
        for rank in range(len(self.words)):
            send = self.send(rank)
            later = self.flags(rank)[2 : 2 + send.programs, rank + 1 :]
            later[:] = 3
            yield send
            assert bool((later == 3).all())
            later[:] = 0

    def check(self) -> None:
        ranks, programs = len(self.words), self.send(0).programs
        for rank, held in enumerate(self.held):
            assert torch.equal(held[128:].view(-1, ranks, self.words.shape[2]), self.words.transpose(0, 1))
            flags = self.flags(rank)
            want = torch.zeros_like(flags)
            want[2 : 2 + programs] = 3
            want[:, rank] = 0
            assert torch.equal(flags, want)
        want = torch.full_like(self.turns, 2)
        want[:, 2 : 2 + programs] = 3
        assert torch.equal(self.turns, want)


@pytest.mark.parametrize(("ranks", "tokens", "row", "most"), [(2, 5, 144, 132), (3, 1, 34, 132), (2, 1, 1600, 132), (2, 5, 718, 2)])
def test_words_are_sent_beside(ranks, tokens, row, most, any_order, monkeypatch):
    """By a selection whose set is the same, by one that has less to do than to send, and by HISA's; in one turn and in several."""
    monkeypatch.setattr(sending, "PROGRAMS", most)
    world = World(8, 64, [1300, 0, 500, 64], 7, any_order, block=64)
    want = step.select_step(world.query, world.keys, 64, True, 9)
    by_blocks = world.query, world.keys, world.means, 9, 64, 64, True, 9
    for keys in (world.keys, replace(world.keys, lengths=torch.zeros_like(world.keys.lengths))):
        made = Memories(ranks, tokens, row, any_order)
        for send in made.in_turn():
            got = step.select_step(world.query, keys, 64, True, 9, send=send)
        made.check()
        assert keys is not world.keys or torch.equal(got.indices, want.indices)
    want, made = hisa.select_step(*by_blocks), Memories(ranks, tokens, row, any_order)
    for send in made.in_turn():
        got = hisa.select_step(*by_blocks, send=send)
    made.check()
    agree(got, want, True)


@pytest.mark.parametrize("late", [(2, 1), (4, 2)])
def test_a_selection_waits_for_what_others_send(late, any_order):
    """For each of their programs; one that has come to a later turn has been at this one's."""
    world = World(8, 64, [1300, 0, 500, 64], 7, any_order, block=64)
    selections = (
        lambda send: step.select_step(world.query, world.keys, 64, True, 9, send=send),
        lambda send: hisa.select_step(world.query, world.keys, world.means, 9, 64, 64, True, 9, send=send),
    )
    for select in selections:
        made = Memories(3, 5, 144, any_order)
        send = made.send(0)
        assert send.programs == 3
        made.flags(0)[2:5, 1:] = 4
        made.flags(0)[late] = 2
        with pytest.raises(AssertionError, match=r"forever|to an end"):
            select(send)
        made.turns[:] = 2
        made.flags(0)[late] = 3
        select(send)


@pytest.mark.parametrize("change", ["row", "address", "programs"])
def test_words_that_a_selection_cannot_send(change):
    made = Memories(2, 5, 144, 0).send(0)
    changed = {
        "row": replace(made, row=135, words=made.words[: 5 * 135]),
        "address": replace(made, words=torch.cat([made.words, made.words])[1:721]),
        "programs": made,
    }[change]
    assert made.programs == 3
    assert not step.sends(changed, 2 if change == "programs" else 3)
    assert step.sends(made, 3)
    assert step.Sending.of(made).num == 360
    assert step.Sending.of(None).num == 0


def test_shared_memory_is_laid_out_as_the_kernel_has_it():
    assert library().bytes_of_tiles() == step.TILES
    assert library().extra_tiles() == step.EXTRA
    assert library().mapped_tiles() == hisa.MAPPED
    assert library().bytes_before_pairs(False) == step.BEFORE_PAIRS
    assert library().bytes_before_pairs(True) == hisa.BEFORE_PAIRS
    assert library().bytes_of_step() == ctypes.sizeof(step.Step)
    assert library().bytes_of_hisa() == ctypes.sizeof(hisa.Hisa)
    size, held, parts = step.shared_memory(64, 128, 128, 993)
    assert size <= step.launch.SHARED < size + 128
    assert held >= 1000, "128 requests of 64k on 132 multiprocessors: a warp keeps some 770 of its scores"
    assert parts == 41
