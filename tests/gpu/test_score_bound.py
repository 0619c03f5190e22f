"""Scores of the kernels against the exact reference: the derived bound (docs/numerics.md), DeepGEMM's tolerances, masks."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from thresher.bench.check import score_bound
from thresher.ops import index_score, paged_index_score, quantize_fp8

from .compare import dissimilar, dissimilarity, exceed, fail_on
from .draw import FP8, generator, on_cpu, paged, query_of
from .machine import DEVICE, sized

kernels = importlib.import_module("thresher.ops.index_score.triton")

NUM, KEYS = sized((48, 1008), (5, 144))
SHAPES = sized([(heads, dim) for dim in (64, 128) for heads in (1, 8, 32, 64, 128)], [(1, 64), (16, 128)])
KINDS = ("normal", "many magnitudes", "cancelling", "cancelling and small", "large", "subnormal", "last bits")
BITS = sized(14, 23)  # what a matrix unit keeps; the interpreter's dot products are fp32
INF = float("inf")


def rows(kind: str, num: int, dim: int, seed: int, key: bool) -> Tensor:
    """fp32 of e4m3 values ``[num, dim]``."""
    gen = generator(seed)
    x = torch.randn(num, dim, generator=gen)
    even = torch.arange(dim) % 2 == 0
    match kind:
        case "normal":
            return x * 100
        case "many magnitudes":
            return x * 2.0 ** torch.randint(-9, 6, (num, dim), generator=gen)
        case "cancelling":  # 448 * 448 and -448 * 448 in turn: sums of nothing but rounding
            return torch.where(even, 448.0, -448.0).expand(num, dim) if key else torch.full((num, dim), 448.0)
        case "cancelling and small":
            big = torch.rand(num, dim, generator=gen).argsort(1) < dim // 4
            signs = torch.where(even, 1.0, -1.0) if key else torch.ones(dim)
            pairs = big[:, ::2].repeat_interleave(2, 1)
            return torch.where(pairs, 448.0 * signs, x * 0.05)
        case "large":
            return 416 + 32 * torch.rand(num, dim, generator=gen)
        case "subnormal":
            return torch.randint(-7, 8, (num, dim), generator=gen) * 2.0**-9
        case _:  # one large product, the others just below what its alignment keeps
            return torch.where(torch.arange(dim) == seed % dim, 448.0, 2.0 ** torch.randint(-5, 1, (num, dim), generator=gen) * x.sign())


def inputs(kind: str, heads: int, dim: int):
    q = rows(kind, NUM * heads, dim, 1, False).view(NUM, heads, dim).clamp(-448, 448).to(FP8)
    k = rows(kind, KEYS, dim, 1 + dim, True).clamp(-448, 448).to(FP8)
    weights = torch.randn(NUM, heads, generator=generator(3))
    scales = 2.0 ** torch.randint(-4, 3, (KEYS,), generator=generator(4)).float()
    return [x.to(DEVICE) for x in (q, weights, k, scales)]


def ends(num: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(num, dtype=torch.int64, device=DEVICE), torch.full((num,), width, device=DEVICE)


def factor(bits: int, heads: int, dim: int) -> float:
    """c of docs/numerics.md: the bound over the score of absolute values."""
    u, v, n = 2.0**-24, 2.0 ** (1 - bits), 2 * dim
    if n * v >= 1:
        return INF
    delta, gamma = n * v / (1 - n * v), heads * u / (1 - heads * u)
    return delta + u + gamma * (2 + delta + u)


@pytest.mark.parametrize("kind", KINDS)
def test_every_difference_is_within_the_bound(kind, record_property):
    problems = []
    for heads, dim in SHAPES:
        q, weights, k, scales = inputs(kind, heads, dim)
        got = kernels.index_score(q, weights, k, scales, *ends(NUM, KEYS))
        want = index_score(q, weights, k, scales, *ends(NUM, KEYS), impl="reference").double()
        size = index_score(q.float().abs(), weights.abs(), k.float().abs(), scales, *ends(NUM, KEYS), impl="reference").double()
        share = float(((got.double() - want).abs() / size.clamp(min=1e-300)).max())
        kept = max((bits for bits in range(6, 25) if share <= factor(bits, heads, dim)), default=0)
        record_property(
            "measured",
            f"score, {kind}, {heads} heads of {dim}: max |S' - S| / M = {share:.2e}, {share / factor(BITS, heads, dim):.4f} of the bound "
            f"at {BITS} bits; the bound holds up to {kept} bits; off by {dissimilarity(got, want):.1e}",
        )
        problems.append(exceed(f"{heads} heads of {dim}", got, want, factor(BITS, heads, dim) * size))
    fail_on(problems)


@pytest.mark.parametrize(("heads", "dim"), SHAPES)
def test_similarity_and_masks(heads, dim, record_property):
    """Normal data: 5e-6 from the reference fed the same FP8, 1e-3 from the scores before quantisation."""
    gen = generator(heads)
    x, y = torch.randn(NUM, heads, dim, generator=gen).bfloat16().to(DEVICE), torch.randn(KEYS, dim, generator=gen).bfloat16().to(DEVICE)
    plain = torch.randn(NUM, heads, generator=gen).to(DEVICE) * (heads * dim) ** -0.5
    (q, q_scales), (k, scales) = quantize_fp8(x), quantize_fp8(y)
    starts, stops = (torch.randint(0, KEYS + 1, (NUM,), generator=gen).to(DEVICE) for _ in range(2))
    got = kernels.index_score(q, plain * q_scales, k, scales, starts, stops)
    want = index_score(q, plain * q_scales, k, scales, starts, stops, impl="reference")
    before = index_score(x, plain, y, torch.ones(KEYS, device=DEVICE), starts, stops, impl="reference")
    off = [dissimilarity(got[want > -INF], other[want > -INF]) for other in (want, before)]
    record_property("measured", f"similarity, {heads} heads of {dim}: off by {off[0]:.1e} from the reference, {off[1]:.1e} from bf16")
    fail_on([dissimilar("the same FP8", got, want, 5e-6), dissimilar("bf16 before quantisation", got, before, 1e-3)])


@pytest.mark.parametrize(("heads", "dim"), SHAPES)
def test_bf16(heads, dim, record_property):
    gen = generator(heads + 7)
    q, k = torch.randn(NUM, heads, dim, generator=gen).bfloat16(), torch.randn(KEYS, dim, generator=gen).bfloat16()
    weights, scales = torch.randn(NUM, heads, generator=gen), torch.ones(KEYS)
    starts, stops = (torch.randint(0, KEYS + 1, (NUM,), generator=gen) for _ in range(2))
    given = [x.to(DEVICE) for x in (q, weights, k, scales, starts, stops)]
    got = kernels.index_score(*given, out=torch.full((NUM, KEYS), torch.nan, device=DEVICE))
    want = index_score(*given, impl="reference")
    absolute = [given[0].abs(), given[1].abs(), given[2].abs(), *given[3:]]
    size = index_score(*absolute, impl="reference").double().clamp(min=0)
    share = float(((got.double() - want.double()).abs() / size)[want > -INF].max())
    record_property("measured", f"bf16 score, {heads} heads of {dim}: max |S' - S| / M = {share:.1e}")
    # Products of bf16 are exact in fp32 and its accumulator keeps 23 bits or more.
    fail_on([dissimilar("similarity", got, want, 5e-6), exceed("bound", got, want, factor(23, heads, dim) * size)])


@pytest.mark.parametrize("page_size", [61, 64])
@pytest.mark.parametrize("heads", [5, 64])
def test_paged_within_the_bound_that_bench_uses(heads, page_size):
    gen, dim = generator(heads), sized(128, 64)
    q, q_scales = quantize_fp8(torch.randn(8, heads, dim, generator=gen))
    weights = torch.randn(8, heads, generator=gen) * q_scales
    pairs = [quantize_fp8(torch.randn(n, dim, generator=gen)) for n in (sized(700, 90), 0, 130)]
    keys = paged(pairs, page_size)
    query = query_of(q.to(DEVICE), weights.to(DEVICE), [600, -1, 129, 0, 63, 64, 10, 2**40], [0, 0, 2, 2, 2, 0, 1, 0])
    got = kernels.paged_index_score(query, keys).cpu()
    query, keys = on_cpu(query, keys)
    want = paged_index_score(query, keys, impl="reference")
    fail_on([exceed("scores", got, want, score_bound(query, keys, BITS)[:, None]), dissimilar("similarity", got, want, 5e-6)])


def test_zeros_and_nan():
    """A sum of zeros is +0.0 whatever the weights' signs, one below all numbers the least of them; NaN in a query spoils its own row alone,
    where it sees."""
    heads, dim = 16, sized(128, 64)
    q, weights, k, scales = inputs("normal", heads, dim)
    zero = kernels.index_score(torch.zeros_like(q.float()).to(FP8), -weights.abs(), k, scales, *ends(NUM, KEYS))
    problems = [None if bool((zero.view(torch.int32) == 0).all()) else "an all-zero score is not +0.0"]
    least = kernels.index_score(q, weights.abs() * -1e37, k, scales, *ends(NUM, KEYS))
    problems.append(None if bool((least.min(1).values == torch.finfo().min).all()) else "the least score is not the least number")
    if sized(True, False):  # the interpreter reads e4m3's NaN as 480
        raw = q.clone().view(torch.uint8)
        raw[1, 3, 7] = 0x7F
        starts, stops = ends(NUM, KEYS)
        stops[1] = 40
        got = kernels.index_score(raw.view(FP8), weights, k, scales, starts, stops)
        isnan = torch.zeros(NUM, KEYS, dtype=torch.bool, device=DEVICE)
        isnan[1, :40] = True
        problems.append(None if torch.equal(got.isnan(), isnan) else "NaN did not stay in its row, or was lost")
    fail_on(problems)


def test_the_reference_has_the_cpus_bits_on_this_device():
    """Everything here leans on it."""
    q, weights, k, scales = inputs("many magnitudes", 16, 64)
    here = index_score(q, weights, k, scales, *ends(NUM, KEYS), impl="reference").cpu()
    moved = [x.cpu() for x in (q, weights, k, scales, *ends(NUM, KEYS))]
    fail_on([exceed("reference", here, index_score(*moved, impl="reference"), 0.0)])
