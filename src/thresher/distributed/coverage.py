"""How many tokens each rank must keep so that the union of the local sets holds the global top-k.

The model: which of the tokens are the top-k says nothing about which rank holds them. Then the count X of top-k tokens on one rank is
Binomial(k, 1/R) in a context much longer than k, and exactly hypergeometric in one of a given length (population L, successes the
tokens on that rank, k draws), tokens being dealt one by one. Real text need not obey: hold these numbers against measured coverage.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from thresher.errors import require


def expected_coverage(topk: int, ranks: int, local_topk: int, length: int | None = None) -> float:
    """Expected share of the global top-k that the union of the local sets holds, ``E[sum_r min(X_r, m)] / k``.

    Args:
        topk: k, tokens of the global set (all of them when ``length`` is less).
        ranks: R.
        local_topk: m, tokens each rank keeps.
        length: context length L; None for one much longer than k.

    Returns:
        A fraction in [0, 1].

    Raises:
        ThresherError: ``local_topk * ranks < topk``, or a count under 1 (``length`` under 0).
    """
    _check(topk, ranks, length)
    _check_local(topk, ranks, local_topk)
    lost = 0.0
    drawn = topk if length is None else min(topk, length)
    for num_ranks, pmf in _counts(topk, ranks, length):
        over = (torch.arange(pmf.shape[0], dtype=torch.float64) - local_topk).clamp_min(0)
        lost += num_ranks * float((pmf * over).sum())
    return max(0.0, 1.0 - lost / max(drawn, 1))


def miss_probability(topk: int, ranks: int, local_topk: int, length: int | None = None) -> float:
    """Probability that any rank holds more than m of the global top-k, so that a token is missed.

    A union bound over the ranks, clipped to 1: never too small, and tight where it matters, far in the tail. Arguments and errors as in
    ``expected_coverage``.
    """
    _check(topk, ranks, length)
    _check_local(topk, ranks, local_topk)
    return float(_miss(topk, ranks, length)[min(local_topk, topk)])


@lru_cache(maxsize=256)
def local_topk(topk: int, ranks: int, probability: float = 1e-4, length: int | None = None) -> int:
    """The smallest m in ``[ceil(k / R), k]`` whose ``miss_probability`` is at most ``probability``.

    Raises:
        ThresherError: a count under 1 (``length`` under 0), or a probability outside (0, 1].
    """
    _check(topk, ranks, length)
    require(0 < probability <= 1, "probability must lie in (0, 1]", probability, "1e-4 is the default")
    least = -(-topk // ranks)
    enough = _miss(topk, ranks, length)[least:] <= probability
    return least + int(enough.to(torch.uint8).argmax())


def _miss(topk: int, ranks: int, length: int | None) -> Tensor:
    """fp64 ``[k + 1]``: entry m is the union bound of ``P(any X_r > m)``; the last is 0."""
    total = torch.zeros(topk + 1, dtype=torch.float64)
    for num_ranks, pmf in _counts(topk, ranks, length):
        at_least = pmf.flip(0).cumsum(0).flip(0)
        total[: pmf.shape[0] - 1] += num_ranks * at_least[1:]
    return total.clamp_max(1.0)


def _counts(topk: int, ranks: int, length: int | None) -> list[tuple[int, Tensor]]:
    """Groups of alike ranks: how many, and the fp64 distribution of X over ``0..min(k, L)``."""
    if length is None:
        return [(ranks, _binomial(topk, 1.0 / ranks))]
    share, extra = divmod(length, ranks)
    groups = [(extra, share + 1), (ranks - extra, share)]
    return [(num, _hypergeometric(length, held, min(topk, length))) for num, held in groups if num]


def _binomial(draws: int, share: float) -> Tensor:
    x = torch.arange(draws + 1, dtype=torch.float64)
    n, p = torch.tensor(float(draws), dtype=torch.float64), torch.tensor(share, dtype=torch.float64)
    return (_log_choose(n, x) + torch.xlogy(x, p) + torch.xlogy(n - x, 1 - p)).exp()


def _hypergeometric(population: int, successes: int, draws: int) -> Tensor:
    x = torch.arange(draws + 1, dtype=torch.float64)
    hits, rest, all_, n = (torch.tensor(float(v), dtype=torch.float64) for v in (successes, population - successes, population, draws))
    possible = (x <= hits) & (n - x <= rest)
    log_pmf = _log_choose(hits, x) + _log_choose(rest, n - x) - _log_choose(all_, n)
    return torch.where(possible, log_pmf.exp(), 0.0)


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def _check(topk: int, ranks: int, length: int | None) -> None:
    require(topk >= 1, "topk must be at least 1", topk, "pass the size of the global set")
    require(ranks >= 1, "ranks must be at least 1", ranks, "pass the number of ranks")
    require(length is None or length >= 0, "length must be at least 0", length, "pass the context length")


def _check_local(topk: int, ranks: int, local: int) -> None:
    require(local >= 1, "local_topk must be at least 1", local, "pass the tokens a rank keeps")
    need = -(-topk // ranks)
    require(
        local * ranks >= topk, f"local_topk * ranks must be at least topk={topk}", f"{local} * {ranks}", f"pass local_topk={need} or more"
    )
