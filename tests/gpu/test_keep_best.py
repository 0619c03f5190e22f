"""keep_best on a GPU against the reference on a CPU, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from thresher.ops import keep_best
from thresher.ops.keep_best import LOGICAL_END
from thresher.ops.keep_best.reference import keep_best_reference

from ..ops.candidates import KINDS, propose
from .compare import differ_all, fail_on
from .machine import DEVICE, sized

WIDTH = sized(2048, 64)


def check(what: str, scores: Tensor, positions: Tensor, topk: int, granularity: int, of: tuple[int, ...]) -> list[str | None]:
    """What is wrong for these ranks, as an exchange leaves candidates: in one tensor."""
    both = torch.stack([positions, scores.view(torch.int32)], 1).to(DEVICE)
    problems = []
    for rank in of:
        got = keep_best(both[:, 1].view(torch.float32), both[:, 0], rank, topk, granularity, impl="triton")
        want = keep_best_reference(scores, positions, rank, topk, granularity)
        pairs = [(x.cpu() for x in (made.indices, made.lengths, made.scores)) for made in (got, want)]
        problems += differ_all(f"{what}, rank {rank}, k {topk}", *pairs)
    return problems


@pytest.mark.parametrize("ranks", sized([1, 2, 3, 4, 8, 16, 32, 64], [2, 3]))
def test_cruel_candidates(ranks):
    """The last are read again for each count."""
    problems = []
    for seed, kind in enumerate(KINDS):
        scores, positions = propose(kind, ranks, 3, WIDTH, seed)
        for topk, granularity in ((WIDTH, 1), (WIDTH, 64), (WIDTH // 3, 4)):
            problems += check(f"{kind}, {ranks} ranks", scores, positions, topk, granularity, tuple({0, ranks - 1}))
    fail_on(problems)


@pytest.mark.parametrize("width", sized([1, 100, 512, 1000, 2047, 2049, 5000, 8192, 20000], [1, 100]))
def test_widths(width):
    problems = []
    for kind in ("normal", "all equal", "cruel"):
        scores, positions = propose(kind, 2, 3, width)
        for topk in (1, width, width + 70):
            problems += check(f"{kind}, width {width}", scores, positions, topk, 1, (0, 1))
    fail_on(problems)


@pytest.mark.parametrize("most", [4 * WIDTH, 2**23, LOGICAL_END // 2 - 4])
def test_ties_far_apart(most):
    """Both ranks' ties up to a local position, where room ends among them."""
    positions = (torch.arange(WIDTH) * ((most - 1) // WIDTH)).int().expand(2, 1, WIDTH).clone()
    positions[:, :, -1] = most
    scores = torch.zeros(2, 1, WIDTH)
    scores[:, :, ::7] = 1.0
    above = int(scores.sum())
    problems = []
    for topk in (above + 1, WIDTH, 2 * WIDTH - 2, 2 * WIDTH - 1):
        problems += check(f"ties up to {most}", scores, positions, topk, 4, (0, 1))
    fail_on(problems)


def test_a_query_is_the_same_alone_and_in_company_and_again():
    scores, positions = (x.to(DEVICE) for x in propose("coarse", 2, sized(200, 3), WIDTH))
    whole = keep_best(scores, positions, 1, WIDTH, impl="triton")
    again = keep_best(scores, positions, 1, WIDTH, impl="triton")
    problems = differ_all("again", (again.indices, again.scores), (whole.indices, whole.scores))
    for row in sized((0, 1, 99, 199), (0, 2)):
        alone = keep_best(scores[:, row : row + 1], positions[:, row : row + 1], 1, WIDTH, impl="triton")
        problems += differ_all(f"row {row} alone", (alone.indices[0], alone.scores[0]), (whole.indices[row], whole.scores[row]))
    fail_on(problems)
