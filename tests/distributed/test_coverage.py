import math
from fractions import Fraction

import pytest
import torch

from thresher.distributed import expected_coverage, local_topk, miss_probability
from thresher.errors import ThresherError

# R, m, expected coverage in per cent as published with the rule (digits as printed there).
TABLE = [(2, 1024, "99.12"), (4, 512, "98.47"), (4, 570, "99.998"), (8, 256, "97.67"), (8, 285, "99.94"), (8, 300, "99.996")]
TABLE += [(16, 128, "96.59"), (16, 160, "99.994")]


@pytest.mark.parametrize(("ranks", "m", "percent"), TABLE)
def test_table_of_expected_coverage(ranks, m, percent):
    digits = len(percent.split(".")[1])
    assert f"{100 * expected_coverage(2048, ranks, m):.{digits}f}" == percent


@pytest.mark.parametrize(("ranks", "m", "miss"), [(2, 1114, "6e-05"), (4, 640, "3e-10"), (8, 320, "1e-04"), (16, 192, "3e-07")])
def test_table_of_miss_probability(ranks, m, miss):
    assert f"{miss_probability(2048, ranks, m):.0e}" == miss


def exact(k: int, ranks: int, m: int, length: int | None) -> tuple[Fraction, Fraction]:
    """Expected coverage and the union bound in rational arithmetic."""
    groups = [ranks] if length is None else list(range(ranks))
    drawn = k if length is None else min(k, length)
    kept, miss = Fraction(0), Fraction(0)
    for group in groups:
        for x in range(drawn + 1):
            if length is None:
                times = group
                p = math.comb(k, x) * Fraction(1, ranks) ** x * Fraction(ranks - 1, ranks) ** (k - x)
            else:
                times, held = 1, len(range(group, length, ranks))
                p = Fraction(math.comb(held, x) * math.comb(length - held, drawn - x), math.comb(length, drawn))
            kept += times * p * min(x, m)
            miss += times * p * (x > m)
    return kept / drawn, min(miss, Fraction(1))


@pytest.mark.parametrize("length", [None, 5, 12, 13, 40, 200])
@pytest.mark.parametrize(("k", "ranks"), [(12, 1), (12, 2), (12, 5), (7, 16), (30, 3)])
def test_against_rational_arithmetic(k, ranks, length):
    for m in range(-(-k // ranks), k + 1):
        coverage, miss = exact(k, ranks, m, length)
        assert expected_coverage(k, ranks, m, length) == pytest.approx(float(coverage), rel=1e-11)
        assert miss_probability(k, ranks, m, length) == pytest.approx(float(miss), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("length", [None, 100, 2048, 5000, 10**6])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 16, 100])
def test_local_topk_is_the_smallest_that_holds(ranks, length):
    for probability in (1e-2, 1e-4, 1e-9):
        m = local_topk(2048, ranks, probability, length)
        least = -(-2048 // ranks)
        assert least <= m <= 2048
        assert miss_probability(2048, ranks, m, length) <= probability
        assert m == least or miss_probability(2048, ranks, m - 1, length) > probability


def test_never_more_than_topk_and_tight_edges():
    assert local_topk(5, 3, 1e-300) == 5
    assert local_topk(1, 8) == 1
    assert miss_probability(64, 4, 64) == 0
    assert expected_coverage(64, 4, 64) == 1
    assert expected_coverage(64, 4, 16, length=0) == 1
    # A context no longer than k is dealt evenly: nothing can be missed.
    assert miss_probability(2048, 8, 256, length=2048) == pytest.approx(0, abs=1e-8)


def test_the_derived_budget_holds_in_a_draw():
    torch.manual_seed(0)
    k, ranks, length = 64, 4, 512
    m = local_topk(k, ranks, 0.05, length)
    counts = torch.stack([torch.bincount(torch.randperm(length)[:k] % ranks, minlength=ranks) for _ in range(4000)])
    missed = (counts > m).any(dim=1).double().mean().item()
    bound = miss_probability(k, ranks, m, length)
    assert bound * 0.7 < missed < bound * 1.3
    covered = counts.clamp(max=m).sum(dim=1).double().mean().item() / k
    assert covered == pytest.approx(expected_coverage(k, ranks, m, length), abs=3e-4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: expected_coverage(2048, 4, 511), r"local_topk \* ranks must be at least topk=2048; got 511 \* 4; pass local_topk=512"),
        (lambda: miss_probability(2048, 4, 0), "local_topk must be at least 1"),
        (lambda: local_topk(0, 4), "topk must be at least 1"),
        (lambda: local_topk(8, 0), "ranks must be at least 1"),
        (lambda: local_topk(8, 2, 0.0), "probability must lie in"),
        (lambda: local_topk(8, 2, 0.1, -1), "length must be at least 0"),
    ],
)
def test_bad_numbers_give_one_line(call, words):
    with pytest.raises(ThresherError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
