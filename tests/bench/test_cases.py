"""Names of cases: one for each, and each says what is run."""

from __future__ import annotations

import itertools

import pytest

from thresher.bench.cases import CASES, EXAMPLES, Case, parse_case, parse_size, size_text
from thresher.errors import ThresherError


def test_the_named_cases_are_stable():
    """Records and figures are found by these names: taking one away is a decision, not a slip."""
    assert len(set(CASES)) == len(CASES)
    assert set(EXAMPLES) <= set(CASES)
    for heads in (64, 32):
        assert {f"prefill-1024x{n}-h{heads}" for n in ("32k", "128k", "256k")} <= set(CASES)
        assert {f"decode-{b}x{n}-h{heads}" for b in (1, 8, 32, 128) for n in ("32k", "128k", "1m")} <= set(CASES)
    assert {f"mla-decode-{b}-h{h}" for b in (1, 8, 32, 128) for h in (16, 64, 128)} <= set(CASES)
    assert {f"layer-{b}x{n}-h64-r2" for b in (1, 8, 32) for n in ("32k", "128k", "1m")} <= set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_named_case_reads_back_and_has_the_models_sizes(name):
    case = parse_case(name)
    assert case.name == name
    assert (case.topk, case.head_dim) == (2048, 128)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("prefill-1024x128k-h64", Case("prefill", 1024, 131072, 64)),
        ("decode-1x1m-h64", Case("decode", 1, 2**20, 64)),
        ("decode-32xmixed-h64", Case("decode", 32, None, 64)),
        ("mla-decode-32-h128", Case("mla-decode", 32, 32768, 128)),
        ("layer-8x128k-h32", Case("layer", 8, 131072, 32)),
        ("decode-2x300-h4-d64-k32", Case("decode", 2, 300, 4, 64, 32)),
        ("mla-decode-2-h4-k32-n256", Case("mla-decode", 2, 256, 4, 128, 32)),
        ("decode-8x128k-h64-q4", Case("decode", 32, 131072, 64, queries=4)),
        ("layer-2xmixed-h4-k32-q2", Case("layer", 4, None, 4, 128, 32, 2)),
        ("layer-1x1m-h64-r2", Case("layer", 1, 2**20, 64, ranks=2)),
        ("layer-2x300-h4-d64-k32-q3-r4", Case("layer", 6, 300, 4, 64, 32, 3, 4)),
    ],
)
def test_what_a_name_means(name, case):
    assert parse_case(name) == case
    assert case.name == name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "must be named like"),
        ("decode-1x1m", "must be named like"),
        ("decode-1x1m-h64-", "must be named like"),
        ("decode-1x-h64", "must be named like"),
        ("train-1x1m-h64", "must be named like"),
        ("decode-1x1024-h64", "must be written decode-1x1k-h64"),
        ("decode-01x1k-h64", "must be written decode-1x1k-h64"),
        ("decode-1x1024k-h64", "must be written decode-1x1m-h64"),
        ("decode-1x1k-h64-k2048", "must be written decode-1x1k-h64"),
        ("decode-1x1k-h64-n4k", "only mla-decode cases take -n"),
        ("decode-0x1k-h64", "rows must be at least 1"),
        ("decode-1x0-h64", "length must be at least 1"),
        ("decode-1x1k-h0", "heads must be at least 1"),
        ("decode-1x1k-h4-d63", "head_dim must be a multiple of 4"),
        ("prefill-2kx1k-h64", "must be named like"),
        ("prefill-2048x1k-h64", "last of its length tokens"),
        ("prefill-16xmixed-h64", "last of its length tokens"),
        ("prefill-16x1k-h64-q2", "must be those of a decode or layer case"),
        ("mla-decode-2-h64-q2", "only decode and layer cases take -q"),
        ("decode-2x1k-h64-q1", "must be written decode-2x1k-h64"),
        ("decode-2x1k-h64-q0", "must be at least 1"),
        ("decode-2x3-h64-q4", "must be its last tokens"),
        ("decode-1x1m-h64-r2", "only layer cases are timed over ranks"),
        ("prefill-16x1k-h64-r2", "only layer cases are timed over ranks"),
        ("mla-decode-2-h64-r2", "only layer cases are timed over ranks"),
        ("layer-1x1m-h64-r1", "must be written layer-1x1m-h64"),
        ("layer-1x1m-h64-r0", "ranks must be at least 1"),
        ("layer-1x1m-h64-r2-q2", "must be named like"),
        ("layer-1x3-h64-r4", "each rank must have a head, and a token of each request; got 4 ranks for 3"),
        ("layer-1x1m-h1-r4", "got 4 ranks for 2"),
    ],
)
def test_names_that_are_none(name, words):
    with pytest.raises(ThresherError, match=words):
        parse_case(name)


def test_sizes():
    assert [parse_size(text) for text in ("1", "1k", "128k", "1m", "300")] == [1, 1024, 131072, 1048576, 300]
    for tokens in (1, 300, 1023, 1024, 1536, 131072, 2**20, 3 * 2**20):
        assert parse_size(size_text(tokens)) == tokens


def test_mixed_lengths_are_log_spaced_in_a_seeded_order():
    case = parse_case("decode-32xmixed-h64")
    lengths = case.lengths(0)
    ordered = sorted(lengths)
    assert (len(lengths), ordered[0], ordered[-1]) == (32, 1024, 131072)
    steps = [b / a for a, b in itertools.pairwise(ordered)]
    assert max(steps) / min(steps) < 1.01
    assert lengths == case.lengths(0) != case.lengths(1)
    assert sorted(case.lengths(1)) == ordered
    assert parse_case("decode-1xmixed-h64").lengths(0) == [1024]


def test_lengths_are_one_for_each_request():
    assert parse_case("prefill-16x300-h4").lengths(0) == [300]
    assert parse_case("decode-3x300-h4").lengths(0) == [300, 300, 300]
    assert parse_case("decode-3x300-h4-q2").lengths(0) == [300, 300, 300]
    assert len(parse_case("decode-5xmixed-h4-q4").lengths(0)) == 5
