"""Inputs by name: right shapes, valid FP8, from a seed, and as cruel as they say."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from thresher.bench.cases import parse_case
from thresher.bench.inputs import CRUEL, make_attend_inputs, make_inputs
from thresher.cache import load_keys
from thresher.errors import ThresherError
from thresher.ops import dequantize_fp8, paged_index_score, quantize_fp8

CPU = torch.device("cpu")
DECODE, PREFILL = parse_case("decode-3x200-h4-d64-k16"), parse_case("prefill-5x200-h4-d64-k16")
DRAFTS = parse_case("decode-2x200-h4-d64-k16-q3")
DRAWN = ("normal", *CRUEL)


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("case", [DECODE, PREFILL, DRAFTS], ids=lambda case: case.name)
def test_shapes_and_valid_fp8(case, name):
    made = make_inputs(case, name, 0, CPU)
    assert made.query.q.shape == (case.rows, 4, 64)
    assert made.query.q.dtype == torch.float8_e4m3fn
    assert made.keys.lengths.tolist() == case.lengths(0)
    for request in range(made.keys.num_requests):
        values, scales = load_keys(made.keys, request)
        assert torch.isfinite(values.float()).all()
        mantissa, _ = torch.frexp(scales)
        assert (mantissa == 0.5).all(), "scales are powers of two"
        again = quantize_fp8(dequantize_fp8(values, scales))
        assert torch.equal(dequantize_fp8(*again), dequantize_fp8(values, scales)), "a fixed point of the format"
    if case.kind == "prefill":
        assert made.query.positions.tolist() == [195, 196, 197, 198, 199]
        assert made.query.requests.tolist() == [0] * 5
    elif case is DRAFTS:
        assert made.query.positions.tolist() == [197, 198, 199] * 2
        assert made.query.requests.tolist() == [0] * 3 + [1] * 3
    else:
        assert made.query.positions.tolist() == [199] * 3
        assert made.query.requests.tolist() == [0, 1, 2]


def everything(made):
    return [made.keys.pages, made.query.q.view(torch.uint8), made.query.weights]


def test_the_seed_decides_and_copies_differ():
    one, two = (everything(make_inputs(DECODE, "normal", 7, CPU)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for other in (make_inputs(DECODE, "normal", 8, CPU), make_inputs(DECODE, "normal", 7, CPU, copy=1)):
        assert not any(torch.equal(a, b) for a, b in zip(one, everything(other), strict=True))
    mixed = parse_case("decode-3xmixed-h2-d64")
    assert make_inputs(mixed, "normal", 7, CPU, copy=1).keys.lengths.tolist() == mixed.lengths(7)


def test_weights_hold_every_factor():
    """Against the definition: normal weights, so their spread over (H D)**-0.5 and the query's scale is about 1."""
    case = parse_case("decode-64x64-h64-d64")
    query = make_inputs(case, "normal", 0, CPU).query
    _, scales = quantize_fp8(query.q.float())
    raw = query.weights * (64 * 64) ** 0.5 / scales
    size = float(raw.std())
    assert min(abs(size * 2.0**shift - 1) for shift in range(-12, 12)) < 0.4
    assert (query.weights < 0).any()
    assert (query.weights > 0).any()


def test_cruel_scores_are_cruel():
    scores = {name: paged_index_score(*vars(make_inputs(DECODE, name, 0, CPU)).values()) for name in DRAWN}
    assert len(scores["normal"][0].unique()) > 150
    assert len(scores["cruel-plateaus"][0].unique()) <= 7
    rising, falling = scores["cruel-ascending"], scores["cruel-descending"]
    assert (rising.diff(dim=1) >= 0).all()
    assert (falling.diff(dim=1) <= 0).all()
    for row in (*rising, *falling):
        assert len(row.unique()) > 100
        assert (row > 0).all()


def test_attention_inputs():
    case = parse_case("mla-decode-3-h5-k32-n100")
    made = make_attend_inputs(case, 0, CPU)
    assert made.q.shape == (3, 5, 576)
    assert made.latents.shape == (3 * 128, 576)
    for row, slots in enumerate(made.slots.tolist()):
        assert slots == sorted(set(slots))
        assert len(slots) == 32
        assert row * 128 <= slots[0]
        assert slots[-1] < row * 128 + 100
    short = make_attend_inputs(parse_case("mla-decode-1-h5-k32-n10"), 0, CPU)
    assert short.slots.tolist() == [[*range(10), *[-1] * 22]]
    assert make_attend_inputs(parse_case("layer-3x100-h4"), 0, CPU).slots is None


@pytest.fixture
def recording(tmp_path):
    def write(requests=3, rows=8, heads=4, dim=64, length=220, **changes):
        torch.manual_seed(1)
        held = {"q": torch.randn(requests, rows, heads, dim), "k": torch.randn(requests, length, dim)}
        held = {**held, "weights": torch.randn(requests, rows, heads), **changes}
        path = tmp_path / "recorded.safetensors"
        save_file({name: value.bfloat16() for name, value in held.items() if value is not None}, path)
        return path, held

    return write


def test_recorded_inputs_are_the_last_of_the_file(recording):
    path, held = recording()
    made = make_inputs(DECODE, "recorded", 0, CPU, path)
    values, scales = load_keys(made.keys, 2)
    want = quantize_fp8(held["k"][2, -200:].bfloat16())
    assert torch.equal(values.float(), want[0].float())
    assert torch.equal(scales, want[1])
    q, q_scales = quantize_fp8(held["q"][:, -1].bfloat16())
    assert torch.equal(made.query.q.float(), q.float())
    want_weights = held["weights"][:, -1].bfloat16().float() * q_scales * (4 * 64) ** -0.5
    assert torch.equal(made.query.weights, want_weights)
    prefill = make_inputs(PREFILL, "recorded", 0, CPU, path)
    assert torch.equal(prefill.query.q.float(), quantize_fp8(held["q"][0, -5:].bfloat16())[0].float())


@pytest.mark.parametrize(
    "sizes", [{"requests": 2}, {"heads": 5}, {"dim": 32}, {"length": 199}, {"weights": torch.randn(3, 8, 5)}, {"k": torch.randn(3, 220)}]
)
def test_a_recording_that_is_too_small_says_what_is_needed(recording, sizes):
    path, _ = recording(**sizes)
    with pytest.raises(ThresherError, match=r"decode-3x200-h4-d64-k16 needs q \[3\+, 1\+, 4, 64\], k \[3\+, 200\+, 64\]"):
        make_inputs(DECODE, "recorded", 0, CPU, path)


def test_no_recording(recording, tmp_path):
    with pytest.raises(ThresherError, match="--recorded"):
        make_inputs(DECODE, "recorded", 0, CPU)
    with pytest.raises(ThresherError, match="safetensors file"):
        make_inputs(DECODE, "recorded", 0, CPU, tmp_path / "none")
    path, _ = recording(k=None)
    with pytest.raises(ThresherError, match="without k"):
        make_inputs(DECODE, "recorded", 0, CPU, path)
    (tmp_path / "bad").write_text("text")
    with pytest.raises(ThresherError, match="safetensors file"):
        make_inputs(DECODE, "recorded", 0, CPU, tmp_path / "bad")


def test_an_unknown_name():
    with pytest.raises(ThresherError, match="inputs must be one of normal, cruel-plateaus"):
        make_inputs(DECODE, "gentle", 0, CPU)
