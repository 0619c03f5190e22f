"""Top-k on given scores: set, order, lengths and scores against a stable sort of each row, on a CPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from thresher.ops import select_topk, to_slots
from thresher.ops.select import triton as kernels
from thresher.ops.to_slots import triton as slots

from .compare import differ, fail_on
from .draw import GARBAGE, generator
from .machine import DEVICE, INTERPRET, sized

INF, NAN = math.inf, math.nan
CRUEL = torch.tensor([0.0, -0.0, 1.0, 1.0000001, -1.0, NAN, -INF, INF, 1e-45, -1e-45, 3.4028235e38, -3.4028235e38])
LONG = sized(20000, 16640)


def make_row(kind: str, width: int, topk: int, seed: int = 0) -> Tensor:
    """fp32 ``[width]``."""
    gen = generator(seed)
    noise, chance = torch.randn(width, generator=gen), torch.rand(width, generator=gen)
    match kind:
        case "same high 22 bits":
            low = torch.randint(1024, (width,), generator=gen, dtype=torch.int32)
            return (torch.tensor([2.5]).view(torch.int32) + low).view(torch.float32)
        case "the same, negative":
            return -make_row("same high 22 bits", width, topk, seed)
        case "90 % zeros of both signs":
            return torch.where(chance < 0.45, 0.0, torch.where(chance < 0.9, -0.0, noise))
        case "zeros, none above":
            return torch.where(chance < 0.5, 0.0, torch.where(chance < 0.9, -0.0, -noise.abs()))
        case "all equal":
            return torch.full((width,), -3.5)
        case "all -inf":
            return torch.full((width,), -INF)
        case "all +inf":
            return torch.full((width,), INF)
        case "all NaN":
            return torch.full((width,), NAN)
        case "NaN among numbers":
            return torch.where(chance < 0.3, NAN, noise)
        case "few numbers among NaN and -inf":
            return torch.where(chance < 0.002, noise, torch.where(chance < 0.5, NAN, -INF))
        case "ascending":
            return torch.arange(width).float()
        case "descending":
            return -torch.arange(width).float()
        case "subnormal":
            return noise * 1e-41
        case "one bright block":
            noise[width // 4 : width // 4 + max(width // 5, 1)] += 100.0
            return noise
        case "cruel":
            return CRUEL[torch.randint(len(CRUEL), (width,), generator=gen)]
        case _ if kind.startswith("candidates"):
            num = {"0": 0, "1": 1, "k - 1": topk - 1, "k": topk, "k + 1": topk + 1}[kind.removeprefix("candidates ")]
            kept = chance.argsort()[: min(num, width)]
            return torch.full((width,), -INF).scatter(0, kept, noise[kept])
    return noise


# The last is one whose ties would spill past the end of the result.
KINDS = (
    "normal", "same high 22 bits", "the same, negative", "90 % zeros of both signs", "zeros, none above", "all -inf",
    "all +inf", "all NaN", "NaN among numbers", "few numbers among NaN and -inf", "ascending", "descending", "subnormal",
    "one bright block", "cruel", "candidates 0", "candidates 1", "candidates k - 1", "candidates k", "candidates k + 1",
    "all equal",
)  # fmt: skip


def best(row: Tensor, topk: int) -> Tensor:
    """Columns, ascending: candidates in a stable sort, NaN behind every number."""
    columns = (row != -INF).nonzero()[:, 0]
    values = row[columns]
    order = values.masked_fill(values.isnan(), -INF).sort(descending=True, stable=True).indices
    return columns[order[:topk]].sort().values


def wrong(what: str, row: Tensor, topk: int, indices: Tensor, length: int, beside: Tensor | None, stands_for: Tensor | None = None):
    """What is wrong with one selected row, in a line, or None. Column c stands for ``stands_for[c]``."""
    columns = best(row, topk)
    want = torch.full((topk,), -1, dtype=torch.int32)
    want[: len(columns)] = (columns if stands_for is None else stands_for[columns]).int()
    if length != len(columns):
        return f"{what}: length {length}, want {len(columns)}"
    if not torch.equal(indices, want):
        at = int((indices != want).nonzero()[0])
        lost, extra = len(set(want.tolist()) - set(indices.tolist())), len(set(indices.tolist()) - set(want.tolist()))
        return f"{what}: entry {at} is {int(indices[at])}, want {int(want[at])}; {lost} lost, {extra} that do not belong"
    scores = torch.full((topk,), -INF)
    scores[: len(columns)] = row[columns]
    if beside is not None and not torch.equal(beside.view(torch.int32), scores.view(torch.int32)):
        at = int((beside.view(torch.int32) != scores.view(torch.int32)).nonzero()[0])
        return f"{what}: score {at} is {float(beside[at])!r}, want {float(scores[at])!r}"
    return None


def check(names: list[str], scores: Tensor, topk: int, positions: Tensor | None = None, ends: Tensor | None = None) -> list[str | None]:
    moved = None if positions is None else positions.to(DEVICE)
    got = kernels.select_topk(scores.to(DEVICE), topk, "local", moved, None if ends is None else ends.to(DEVICE))
    assert got.space == "local"
    indices, lengths, beside = got.indices.cpu(), got.lengths.cpu(), got.scores.cpu()
    problems = []
    for i, name in enumerate(names):
        row = scores[i] if positions is None else scores[i].masked_fill(positions[i] < 0, -INF)
        row = row if ends is None else row.masked_fill(torch.arange(len(row)) >= ends[i], -INF)
        given = None if positions is None else positions[i]
        what = f"{name}, row {i}, width {scores.shape[1]}, k {topk}"
        problems.append(wrong(what, row, topk, indices[i], int(lengths[i]), beside[i], given))
    return problems


def kinds_of(width: int, topk: int, names=KINDS) -> tuple[list[str], Tensor]:
    return list(names), torch.stack([make_row(name, width, topk, seed) for seed, name in enumerate(names)])


SOME = ("normal", "same high 22 bits", "candidates k + 1", "cruel", "descending", "90 % zeros of both signs")
CASES = sized(
    [(1000, 64, KINDS), (16384, 2048, KINDS), (16384, 8192, KINDS), (LONG, 64, KINDS), (LONG, 512, KINDS), (LONG, 8192, KINDS),
     (131072, 64, KINDS), (131072, 2048, KINDS), (131072, 8192, KINDS), (2**20, 2048, SOME), (2**21, 2048, SOME[:1]),
     (2**21, 8192, SOME[-1:])],
    [(300, 64, KINDS), (LONG, 64, KINDS[:6]), (LONG, 2048, KINDS[-6:])],
)  # fmt: skip


@pytest.mark.parametrize(("width", "topk", "names"), CASES, ids=lambda value: None if isinstance(value, tuple) else value)
def test_cruel_rows(width, topk, names):
    fail_on(check(*kinds_of(width, topk, names), topk))


WIDTHS = sized([1, 2, 63, 64, 65, 129, 1025, 5000, 16383, 16385, 20001, 65536], [1, 63, 64, 65, 129, 16385])


@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width):
    fail_on(check(*kinds_of(width, 64, ("normal", "90 % zeros of both signs", "cruel")), 64))


def test_nothing_to_select_from():
    nothing = kernels.select_topk(torch.zeros(3, 0, device=DEVICE), 64)
    assert (nothing.indices == -1).all()
    assert not nothing.lengths.any()
    assert kernels.select_topk(torch.zeros(0, 100, device=DEVICE), 64).indices.shape == (0, 64)


@pytest.mark.parametrize("width", sized([1000, 131072], [300, LONG]))
def test_positions(width):
    """Ascending positions with gaps, -1 from some column on, where scores are anything."""
    names, scores = kinds_of(width, 64, ("normal", "all NaN", "90 % zeros of both signs", "all equal"))
    gaps = torch.randint(1, 5, scores.shape, generator=generator(1))
    positions = gaps.cumsum(1)
    for row, held in enumerate((width, width // 2, 63, 0)):
        positions[row, held:] = -1
    problems = check(names, scores, 64, positions)
    problems += check(names, scores, 64, positions.int())
    fail_on(problems)


@pytest.mark.parametrize("rows", sized([20, 100], [6]))
@pytest.mark.parametrize("width", sized([1000, 8192, 50001, 131072], [300, LONG]))
def test_ends(width, rows):
    """Few rows and many take other kernels; past the end stands what would be selected, or NaN."""
    topk = sized(2048, 64)
    lengths = [0, 1, topk - 1, topk, topk + 1, 4096, 8193, 16385, width - 1, width]
    ends = torch.tensor([min(max(lengths[i % len(lengths)], 0), width) for i in range(rows)])
    kinds = ("normal", "90 % zeros of both signs", "NaN among numbers")
    names = [f"{kinds[i % 3]}, end {int(ends[i])}" for i in range(rows)]
    scores = torch.stack([make_row(kinds[i % 3], width, topk, i) for i in range(rows)])
    garbage = torch.tensor([INF, NAN, 3e38])[torch.arange(width) % 3]
    scores = torch.where(torch.arange(width) < ends[:, None], scores, garbage)
    problems = check(names, scores, topk, None, ends)
    problems += check(names, scores, topk, torch.arange(width).repeat(rows, 1), ends.int())
    fail_on(problems)


@pytest.mark.parametrize("rows", sized([1, 80], [1]))
@pytest.mark.parametrize("width", sized([32768, 131072, 2**20], [LONG]))
def test_plateaus_at_the_last_place(width, rows):
    """Dense from the start, or in the middle or the last columns alone."""
    if rows * width > 2**24:
        pytest.skip("one program a row reads no more than at 128k columns")
    topk = sized(2048, 64)
    problems = []
    for start, stop in ((0, width), (width // 2, width // 2 + 3 * topk), (width - 3 * topk, width)):
        scores = torch.stack([make_row("normal", width, topk, i).clamp(max=-1.0) * 2 for i in range(rows)])
        scores[:, start:stop] = 0.0
        scores[:, :: width // (topk // 2)] = 1.0
        problems += check([f"zeros in {start}..{stop}"] * rows, scores, topk)
    fail_on(problems)


@pytest.mark.parametrize("width", sized([1000, 131072], [300, LONG]))
def test_slots(width):
    """Through shuffled pages with holes; requests that are not there give -1 in place."""
    topk, page_size = 64, 61
    names, scores = kinds_of(width, topk, ("normal", "ascending", "90 % zeros of both signs", "all equal", "candidates k - 1"))
    pages = -(-width // page_size)
    table = torch.stack([torch.randperm(3 * pages, generator=generator(row))[:pages] for row in range(3)]).int()
    table[0, ::5] = -1
    table[1] = GARBAGE[torch.arange(pages) % len(GARBAGE)].clamp(max=-1)
    requests = torch.tensor([0, 1, 2, 2**40, -1])
    got = kernels.select_topk_slots(scores.to(DEVICE), topk, table.to(DEVICE), requests.to(DEVICE), page_size, with_scores=True)
    problems = [None if got.space == "slot" else f"space {got.space}"]
    column = torch.arange(width)
    for i, name in enumerate(names):
        if int(requests[i]) in range(3):
            page = table[requests[i], column // page_size].long()
            slots = (page * page_size + column % page_size).masked_fill(page < 0, -1)
        else:
            slots = torch.full((width,), -1)
        what = f"{name}, row {i}, width {width}"
        problems.append(wrong(what, scores[i], topk, got.indices[i].cpu(), int(got.lengths[i]), got.scores[i].cpu(), slots))
    fail_on(problems)


@pytest.mark.parametrize("page_size", [64, 61])
def test_slots_of_a_selection(page_size):
    """Positions past the table and negative ones, pages that are not there, rows of no request, rows that are strided."""
    topk, pages = sized(2048, 70), 40
    table = torch.stack([torch.randperm(3 * pages, generator=generator(row))[:pages] for row in range(3)]).int()
    table[0, ::5] = -1
    wide = torch.randint(-2, (pages + 3) * page_size, (5, topk + 9), generator=generator(7)).int()
    requests = torch.tensor([0, 1, 2, 0, 2])
    want = to_slots(wide[:, 5:-4], table, requests, page_size, impl="reference")
    got = slots.to_slots(wide.to(DEVICE)[:, 5:-4], table.to(DEVICE), requests.to(DEVICE), page_size)
    fail_on([differ("slots", got.cpu(), want)])
    nobody = slots.to_slots(wide.to(DEVICE), table.to(DEVICE), torch.tensor([2**40, -1, 3, 2**62, -5], device=DEVICE), page_size)
    fail_on([differ("slots of no request", nobody.cpu(), torch.full_like(wide, -1))])


def test_strided_rows_and_no_scores():
    names, scores = kinds_of(1000, 64, ("normal", "cruel", "all equal"))
    wide = torch.full((6, 1024), INF)
    wide[::2, :1000] = scores
    got = kernels.select_topk(wide.to(DEVICE)[::2, :1000], 64, with_scores=False)
    assert got.scores is None
    turned = kernels.select_topk(scores.T.contiguous().to(DEVICE).T, 64)
    problems = []
    for i, name in enumerate(names):
        problems.append(wrong(f"{name}, strided", scores[i], 64, got.indices[i].cpu(), int(got.lengths[i]), None))
        problems.append(wrong(f"{name}, turned", scores[i], 64, turned.indices[i].cpu(), int(turned.lengths[i]), turned.scores[i].cpu()))
    fail_on(problems)


def test_a_row_is_the_same_alone_and_in_company():
    """The public function, and the batch that decides how many programs a row gets."""
    num = sized(200, 3)
    scores = torch.stack([make_row(("normal", "90 % zeros of both signs")[i % 2], LONG, 512, i) for i in range(num)]).to(DEVICE)
    whole = select_topk(scores, 512, impl="triton")
    problems = []
    for row in sized((0, 1, 99, 199), (0, 1)):
        alone = select_topk(scores[row : row + 1], 512, impl="triton")
        same = torch.equal(alone.indices[0], whole.indices[row]) and torch.equal(alone.lengths[0], whole.lengths[row])
        problems.append(None if same else f"row {row} alone has another set")
    want = select_topk(scores.cpu(), 512, impl="reference")
    if not torch.equal(whole.indices.cpu(), want.indices):
        problems.append(f"row {int((whole.indices.cpu() != want.indices).any(1).nonzero()[0])} is not the reference's")
    fail_on(problems)


@pytest.mark.skipif(INTERPRET, reason="the interpreter runs programs one by one: nothing can differ")
@pytest.mark.parametrize("kind", ["normal", "90 % zeros of both signs", "same high 22 bits", "cruel"])
def test_many_repeats_of_racing_chunks(kind):
    """Chunks append to a row's list in any order; the result may not show it."""
    scores = torch.stack([make_row(kind, 131072, 2048, i) for i in range(4)]).to(DEVICE)
    first = kernels.select_topk(scores, 2048)
    problems = []
    for turn in range(20):
        again = kernels.select_topk(scores, 2048)
        same = torch.equal(again.indices, first.indices) and torch.equal(again.scores.view(torch.int32), first.scores.view(torch.int32))
        problems.append(None if same else f"repeat {turn} has another set")
    fail_on(problems)
