"""Top-k kernels in the interpreter against the reference, bit for bit, and compiled for an H100."""

from __future__ import annotations

import math

import pytest
import torch
from triton.runtime import interpreter

from thresher.errors import ThresherError
from thresher.ops.select import triton as kernel
from thresher.ops.select.reference import select_reference, select_slots_reference

INF, NAN = math.inf, math.nan
CRUEL = torch.tensor([0.0, -0.0, 1.0, 1.0000001, -1.0, NAN, -INF, INF, 1e-45, -1e-45, 3.4028235e38, -3.4028235e38])
LONG = kernel.ONE_PROGRAM + 3617
PATHS = ["one_pass", "split"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cruel(rows: int, width: int, seed: int) -> torch.Tensor:
    return CRUEL[torch.randint(len(CRUEL), (rows, width), generator=generator(seed))]


def check(scores: torch.Tensor, topk: int, positions: torch.Tensor | None = None, ends: torch.Tensor | None = None) -> None:
    got = kernel.select_topk(scores, topk, "local", positions, ends)
    want = select_reference(scores, topk, "local", positions, ends)
    assert got.space == "local"
    assert (got.lengths.dtype, got.indices.dtype) == (torch.int64, torch.int32)
    assert torch.equal(got.lengths, want.lengths)
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.scores.view(torch.int32), want.scores.view(torch.int32))


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Fresh memory holds the worst bytes: NaN as floats, far out of range as indices."""
    empty = torch.empty

    def poisoned(*size, **options):
        made = empty(*size, **options)
        return made.fill_(NAN if made.is_floating_point() else torch.iinfo(made.dtype).max - 7)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(params=PATHS)
def cut_small(monkeypatch, request):
    """``cut_small(want, room)`` cuts rows of 800 or more into chunks of 128, with a level and a list of the test's choice."""

    def cut(want: int, room: int) -> None:
        def plan(num_rows: int, width: int, topk: int) -> kernel.Plan | None:
            aim = want * width // 128
            return kernel.Plan(128, aim, room, min(room, 128), 128, 4, request.param == "split") if width >= 800 else None

        monkeypatch.setattr(kernel, "make_plan", plan)

    return cut


@pytest.fixture(params=["held", *PATHS])
def path(monkeypatch, request):
    """Every row of more than ONE_PROGRAM columns takes this path; "held": one of up to MANY_IN_ONE stays in one program."""
    monkeypatch.setattr(kernel, "FEW_ROWS", 10**6 if request.param == "split" else 0)
    if request.param == "one_pass":
        monkeypatch.setattr(kernel, "MANY_IN_ONE", kernel.ONE_PROGRAM)


@pytest.mark.parametrize("topk", [1, 64, 299, 300, 301, 500])
def test_short_rows(topk):
    check(torch.randn(3, 300, generator=generator(topk)), topk)
    check(cruel(6, 300, topk), topk)


@pytest.mark.parametrize("width", [0, 1, 2, 127, 128, 129, 5000, kernel.ONE_PROGRAM])
def test_widths(width):
    check(torch.randn(1, width, generator=generator(width)), 64)


@pytest.mark.parametrize("topk", [1, 300, 1024, 1023, 2048])
@pytest.mark.parametrize("held", [16, 32, 64, 128])
def test_any_number_of_warps(monkeypatch, held, topk):
    """From one group of four columns a thread, whose counts have a word for themselves, to several words of groups."""
    monkeypatch.setattr(kernel, "HELD", held)
    monkeypatch.setattr(kernel, "HELD_BESIDE", held)
    for width in (500, 1024, 4000):
        rows = torch.randn(3, width, generator=generator(held))
        rows[1] = cruel(1, width, topk)[0]
        rows[2] = rows[2].relu()
        check(rows, topk)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-10, 1e10, 3e37])
def test_scores_whose_spread_has_no_square(scale):
    """The guess is no number, or nothing like the row: the search gets by without."""
    rows = torch.randn(2, 3000, generator=generator(24)) * scale
    rows[1] += 7 * scale
    check(rows, 1000)


def test_scores_far_from_normal():
    rows = torch.randn(5, 3000, generator=generator(25))
    rows[0] = torch.tan(1.57 * rows[0].erf())
    rows[1] = torch.exp(8 * rows[1])
    rows[2, 40:90] += 1e6
    rows[3] = rows[3].sort().values
    rows[4, :1500] -= 1e3
    for topk in (1, 45, 60, 1499, 1500, 1501, 2999):
        check(rows, topk)


def test_no_rows():
    got = kernel.select_topk(torch.empty(0, 10), 4)
    assert (got.indices.shape, got.lengths.shape) == ((0, 4), (0,))


@pytest.mark.parametrize("value", [0.0, -0.0, -3.5, INF, -INF, NAN])
@pytest.mark.parametrize("width", [700, LONG])
def test_all_equal(path, value, width):
    check(torch.full((1, width), value), 64)


@pytest.mark.parametrize("topk", [64, 2048, 8192])
def test_long_random_rows(path, topk):
    check(torch.randn(1, LONG, generator=generator(topk)), topk)


def test_a_row_of_128k(path):
    check(torch.randn(1, 131072, generator=generator(1)), 2048)


def long_rows(kind: str) -> torch.Tensor:
    rows = torch.randn(1, LONG, generator=generator(3))
    count = torch.arange(LONG, dtype=torch.float32)[None]
    match kind:
        case "same high bits":
            low = torch.randint(1024, (1, LONG), generator=generator(4), dtype=torch.int32)
            return (torch.tensor([[2.5]]).view(torch.int32) + low).view(torch.float32)
        case "zeros 90":
            return torch.where(torch.rand(1, LONG, generator=generator(5)) < 0.9, 0.0, rows)
        case "zeros 97":
            return torch.where(torch.rand(1, LONG, generator=generator(6)) < 0.97, 0.0, rows)
        case "signed zeros":
            return torch.where(torch.rand(1, LONG, generator=generator(7)) < 0.5, -0.0, 0.0)
        case "at most zero":
            return -rows.relu()
        case "ascending":
            return count
        case "descending":
            return -count
        case "subnormal":
            return rows * 1e-41
        case "one bright block":
            rows[:, 5000:9000] += 100.0
        case "few candidates":
            rows[:, 2000:] = -INF
        case "few, half of them NaN":
            rows[:, 1000:2000] = NAN
            rows[:, 2000:] = -INF
        case "few among NaN":
            rows[:, 63:] = NAN
        case "cruel":
            return cruel(1, LONG, 8)
    return rows


KINDS = (
    "same high bits", "zeros 90", "zeros 97", "signed zeros", "at most zero", "ascending", "descending", "subnormal", "one bright block",
    "few candidates", "few, half of them NaN", "few among NaN", "cruel",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_long_cruel_rows(path, kind):
    check(long_rows(kind), 2048)


@pytest.mark.parametrize("num", [0, 1, 63, 64, 65])
@pytest.mark.parametrize("width", [700, LONG])
def test_numbers_of_candidates_about_topk(path, num, width):
    scores = torch.full((1, width), -INF)
    at = torch.randperm(width, generator=generator(num))[:num]
    scores[0, at] = torch.randn(num, generator=generator(num))
    check(scores, 64)


# The level far too high, about right, far too low; the list too short for what passes, and long enough for all.
@pytest.mark.parametrize(("want", "room"), [(1, 64), (1, 1024), (14, 128), (14, 1024), (100, 64), (129, 2048)])
def test_any_guess_gives_the_same_set(cut_small, want, room):
    cut_small(want, room)
    rows = torch.randn(4, 800, generator=generator(want))
    rows[1] = rows[1].round()
    rows[2, 40:] = rows[2, 40:].clamp(max=0.0)
    rows[3] = cruel(1, 800, room)
    check(rows, 61)
    check(rows[:1], 1)
    check(rows[1:2], 200)  # the ties of several chunks


@pytest.mark.parametrize("zeros", [0.5, 0.97, 1.0])
def test_a_plateau_that_the_last_place_falls_into(cut_small, zeros):
    """Ties run out of places in some chunk in the middle; greater scores stand before, in and after it."""
    cut_small(14, 1024)
    noise = torch.rand(2, 1000, generator=generator(9))
    rows = torch.where(noise < zeros, 0.0, -1.0 - noise)
    rows[:, ::50] = 2.0
    for topk in (21, 60, 145, 500):  # with nothing but zeros, 145 takes the 20 greater ones and all ties of the first chunk
        check(rows, topk)


@pytest.mark.parametrize("where", [0, 5, 7])
@pytest.mark.parametrize("value", [0.0, NAN])
def test_a_plateau_in_one_chunk(cut_small, monkeypatch, where, value):
    """In the first, a middle or the last chunk of eight; no search of the whole row is needed."""
    cut_small(20, 512)
    monkeypatch.setattr(kernel.kernels, "write_row", None)
    monkeypatch.setattr(kernel.split, "write_row", None)
    rows = torch.full((2, 1000), -INF)
    rows[:, 128 * where : 128 * where + 104] = value
    rows[:, 3::100] = 1.0 + torch.rand(10, generator=generator(where))
    rows[1, 999] = 0.5
    for topk in (11, 12, 60, 104, 105, 200):
        check(rows, topk)


@pytest.mark.parametrize(
    "kind", ["zeros 90", "zeros 97", "signed zeros", "at most zero", "few candidates", "few, half of them NaN", "few among NaN"]
)
def test_a_plateau_or_too_few_numbers_need_no_search(path, monkeypatch, kind):
    """A row that costs many times an ordinary one would be a trap: rows of relu are common."""
    monkeypatch.setattr(kernel.kernels, "write_row", None)
    monkeypatch.setattr(kernel.split, "write_row", None)
    check(long_rows(kind), 2048)


def with_garbage(scores: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Anything past the end: the largest of numbers, NaN, or infinity."""
    past = torch.arange(scores.shape[1]) >= ends[:, None]
    return torch.where(past, torch.tensor([INF, NAN, 3e38, -INF])[torch.arange(scores.shape[1]) % 4], scores)


@pytest.mark.parametrize(("width", "dtype"), [(300, torch.int64), (801, torch.int32)])
def test_ends(cut_small, dtype, width):
    """About topk, the list's room, a chunk and the sample; below 0 and past the width they are clamped, which no caller may rely on."""
    cut_small(14, 256)
    ends = [0, 1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 299, 300, width - 1, width]
    ends = torch.tensor([end for end in ends if end <= width], dtype=dtype)
    scores = with_garbage(torch.randn(len(ends), width, generator=generator(18)), ends)
    check(scores, 64, None, ends)
    check(with_garbage(cruel(len(ends), width, 19), ends), 64, None, ends)
    check(with_garbage(torch.where(scores < 1.0, 0.0, scores), ends), 64, None, ends)
    positions = torch.arange(width).repeat(len(ends), 1) * 3
    positions[:, width // 2 :] = -1
    check(scores, 64, positions, ends)
    outside = torch.tensor([-5, -(2**31), width + 1, 2**31 - 1], dtype=dtype)
    check(torch.randn(4, width, generator=generator(20)), 64, None, outside)


@pytest.mark.parametrize("end", [0, 1, 2047, 2048, 2049, 4096, 4097, 8191, 8193, LONG - 1])
def test_ends_of_long_rows(path, end):
    scores = torch.randn(1, LONG, generator=generator(end))
    ends = torch.tensor([end])
    check(with_garbage(scores, ends), 2048, None, ends)


def test_a_short_end_in_a_row_of_128k(path):
    ends = torch.tensor([5000, 20001])
    check(with_garbage(torch.randn(2, 131072, generator=generator(21)), ends), 2048, None, ends)


def test_ends_of_slots(cut_small):
    cut_small(14, 256)
    ends = torch.tensor([0, 1, 200, 700, 1000])
    scores = with_garbage(torch.randn(5, 1000, generator=generator(22)), ends)
    table = torch.randperm(16, generator=generator(23)).int()[None]
    got = kernel.select_topk_slots(scores, 64, table, torch.zeros(5, dtype=torch.int64), 64, ends=ends)
    want = select_slots_reference(scores, 64, table, torch.zeros(5, dtype=torch.int64), 64, None, ends)
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.lengths, want.lengths)


def test_a_level_between_zero_and_the_highest_negative_number(cut_small):
    """The search's first step from the largest score, which is subnormal, lands on the bits that only -0.0 has."""
    cut_small(128, 1024)
    largest = torch.tensor(2**22 - 1, dtype=torch.int32).view(torch.float32)
    check(torch.where(torch.rand(1, 1000, generator=generator(16)) < 0.8, 0.0, largest), 400)


@pytest.mark.parametrize("cut_small", ["split"], indirect=True)
@pytest.mark.parametrize("order", [list(range(7, -1, -1)), [3, 0, 7, 5, 1, 6, 2, 4]])
def test_chunks_may_append_in_any_order(cut_small, monkeypatch, order):
    """The interpreter runs programs one by one in their order; a GPU does not. So the eight of each row are run in another order."""
    cut_small(14, 1024)
    executor = interpreter.GridExecutor

    class Shuffled(executor):
        def __call__(self, *args, **options):
            if self.fn.__name__ != "collect":
                return super().__call__(*args, **options)
            set_index = interpreter.interpreter_builder.set_grid_idx

            def shuffled(x, y, z):
                set_index(x // 8 * 8 + order[x % 8], y, z)

            with monkeypatch.context() as patch:
                patch.setattr(interpreter.interpreter_builder, "set_grid_idx", shuffled)
                return super().__call__(*args, **options)

    monkeypatch.setattr(interpreter, "GridExecutor", Shuffled)
    rows = torch.randn(3, 1000, generator=generator(17))
    rows[1] = rows[1].round()
    rows[2] = torch.where(rows[2] < 1.5, 0.0, rows[2])
    check(rows, 64)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("width", [300, 800])
def test_positions(cut_small, dtype, width):
    cut_small(14, 1024)
    scores = torch.randn(4, width, generator=generator(10))
    scores[1] = cruel(1, width, 11)[0]
    positions = torch.stack([torch.randperm(9 * width, generator=generator(i))[:width].sort().values for i in range(4)]).to(dtype)
    for row, held in enumerate((width, width - 7, 40, 0)):
        positions[row, held:] = -1
    check(scores, 64, positions)


@pytest.mark.parametrize("width", [300, 800])
def test_strides(cut_small, width):
    cut_small(14, 1024)
    wide = torch.randn(6, 2 * width, generator=generator(12))
    check(wide[::2, 3 : 3 + width], 64)
    check(wide[:, ::2], 64)
    check(wide[:1, :width].expand(3, width), 64)


@pytest.mark.parametrize(("page_size", "width"), [(1, 300), (61, 300), (64, 800)])
def test_slots(cut_small, page_size, width):
    cut_small(14, 1024)
    scores = torch.randn(6, width, generator=generator(13))
    scores[1] = 0.0
    scores[2, 20:] = -INF
    num_pages = -(-width // page_size)
    page_table = torch.randperm(3 * num_pages, generator=generator(14)).view(3, num_pages).int()
    page_table[1, num_pages // 2 :] = -1
    requests = torch.tensor([2, 0, 1, 1, -(2**63), 2**63 - 1])
    got = kernel.select_topk_slots(scores, 64, page_table, requests, page_size)
    assert (got.space, got.scores) == ("slot", None)
    want = select_reference(scores, 64, "logical", None)
    assert torch.equal(got.lengths, want.lengths)
    for row, picked in enumerate(want.indices.tolist()):
        request = int(requests[row])
        for column, position in enumerate(picked):
            page = int(page_table[request, position // page_size]) if position >= 0 and 0 <= request < 3 else -1
            assert int(got.indices[row, column]) == (page * page_size + position % page_size if page >= 0 else -1)


def test_slots_of_garbage_positions_stay_in_the_table():
    positions = torch.tensor([[0, 70, 2**31 - 1, 2**31, 2**33 + 5, 2**62]])
    got = kernel.select_topk_slots(torch.ones(1, 6), 6, torch.tensor([[4, 9]], dtype=torch.int32), torch.tensor([0]), 64, positions)
    assert got.indices.tolist() == [[256, 582, -1, -1, 261, 256]]  # the last three as int32, which positions are written as


@pytest.mark.parametrize("name", ["page_table", "requests", "page_size"])
def test_bad_slot_arguments_are_named(name):
    given = {"page_table": torch.zeros(1, 4, dtype=torch.int32), "requests": torch.zeros(2, dtype=torch.int64), "page_size": 64}
    given[name] = 0 if name == "page_size" else given[name].float()
    with pytest.raises(ThresherError, match=name):
        kernel.select_topk_slots(torch.zeros(2, 8), 4, **given)


def test_repeats_are_equal(path):
    scores = torch.randn(1, LONG, generator=generator(15))
    first = kernel.select_topk(scores, 512)
    for _ in range(3):
        again = kernel.select_topk(scores, 512, with_scores=False)
        assert torch.equal(again.indices, first.indices)
        assert again.scores is None


def test_plans_fit_their_kernels():
    for width in [kernel.MANY_IN_ONE + 1, 17000, 32768, 65536, 100_001, 131072, 10**6, 2**20, 2 * 10**6, kernel.MAX_WIDTH]:
        for topk in (1, 64, 512, 2048, 4096, kernel.MAX_TOPK):
            for num_rows in (1, 32, 133, 1024):
                plan = kernel.make_plan(num_rows, width, topk)
                assert topk < plan.room <= 32768
                assert plan.room % 4 == 0
                assert plan.sample <= width
                assert topk < plan.aim <= width
                assert plan.aim * plan.sample < 2**31, "int32 holds it"
                assert plan.room * 16 // plan.warps <= 2**14, "32 entries a thread at most"
                assert plan.split == (num_rows < kernel.FEW_ROWS)
                assert kernel.unsupported(num_rows, width, topk) is None
    assert kernel.make_plan(1, kernel.ONE_PROGRAM, 64) is None
    assert kernel.make_plan(1, kernel.ONE_PROGRAM + 1, 64).split
    assert kernel.make_plan(kernel.FEW_ROWS, kernel.MANY_IN_ONE, 64) is None
    assert "scores" in kernel.unsupported(1, kernel.MAX_WIDTH + 1, 64)
    assert "topk" in kernel.unsupported(1, 10**6, kernel.MAX_TOPK + 1)
    assert "chunks" in kernel.unsupported(2**31, 64, 1)


COMPILE = """
import torch
from thresher.ops.select import triton as kernel

short = ((3, 300, 64), (64, 8192, 64), (4, 8191, 2048), (1024, 4096, 2048), (1024, 8192, 2048), (1024, 16384, 2048), (1024, 16383, 2048))
long = ((4, 131072, 64), (1, 131071, 2048), (200, 32768, 2048), (300, 32768, 2048), (1, 2**20, 2048), (1, 2**21, 8192))
for rows, width, topk in short + long:
    kernel.select_topk(torch.empty(rows, width), topk)
for rows, width, _ in short[:1] + short[4:6]:
    kernel.select_topk(torch.empty(rows, width), 2048, with_scores=False)
for width in (8192, 65536):
    scores, requests = torch.empty(2, width), torch.empty(2, dtype=torch.int64)
    kernel.select_topk(scores, 2048, "logical", torch.empty(2, width, dtype=torch.int64))
    kernel.select_topk_slots(scores, 2048, torch.empty(4, 1024, dtype=torch.int32), requests, 64)
    kernel.select_topk_in_blocks(scores, 2048, torch.empty(2, width // 128, dtype=torch.int32), 128)
for rows, width in ((4, 8192), (4, 65536), (200, 65536)):
    kernel.select_topk(torch.empty(rows, width), 2048, ends=torch.empty(rows, dtype=torch.int64))
"""


def test_compiles_for_hopper(compile_for_hopper):
    made = compile_for_hopper(COMPILE)
    assert {kernel.name for kernel in made} == {"one_program", "one_pass", "guess_level", "collect"}
    for one in made:
        assert one.shared <= 227 * 1024
        # Triton has no other fast root; only where to look first comes from one.
        assert ".ftz" not in one.ptx.replace("sqrt.approx.ftz", ""), "subnormal scores must keep their order"
        assert ".target sm_90" in one.ptx
        # A list past MAX_ROOM, for the 8192 best of 10**6 or more, is known to spill: one program a row searches it, at the end.
        known = one.name == "collect" and one.num_warps == 32
        assert known or getattr(one, "stack", 0) <= 256, f"{one.name} spills"
    for name, most in (("one_pass", 32 // 4), ("collect", 16 // 4)):
        first = next(one for one in made if one.name == name)  # of an even width
        assert first.ptx.count("ld.global.v4.b32") >= most, "scores of a chunk come 16 bytes at a time"
    held = [one.ptx.count("ld.global.v4.b32") for one in made if one.name == "one_program"]
    assert held.count(kernel.HELD // 4) >= 2, "so do those of a row of 8192 or 16384"
    assert all(one.ptx.count("atom.") - one.ptx.count("atom.shared") == 2 for one in made if one.name == "collect")
    assert all("griddepcontrol.wait" in one.ptx for one in made if one.name == "collect")
