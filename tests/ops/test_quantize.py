"""quantize_fp8 byte by byte, against an encoder written from the definition of e4m3."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from thresher.errors import ThresherError
from thresher.ops import dequantize_fp8, quantize_fp8


def code_value(code: int) -> float:
    """e4m3fn: sign, 4 exponent bits (bias 7), 3 mantissa bits, subnormals, no infinities, 0x7F is NaN."""
    exponent, mantissa = (code >> 3) & 15, code & 7
    if code & 0x7F == 0x7F:
        return math.nan
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if code & 0x80 else size


MAGNITUDES = [code_value(c) for c in range(0x7F)]


def encode(x: float) -> int:
    """Nearest magnitude, ties to the even code; the sign of zero is kept."""
    code = min(range(0x7F), key=lambda c: (abs(MAGNITUDES[c] - abs(x)), c & 1))
    return code | (0x80 if math.copysign(1.0, x) < 0 else 0)


def expected_scale(amax: float) -> float:
    amax = max(amax, float(np.float32(1e-4)))
    scale = 2.0**-60
    while scale * 448 < amax:
        scale *= 2
    return scale


def check(x: torch.Tensor) -> None:
    values, scales = quantize_fp8(x)
    assert values.dtype == torch.float8_e4m3fn
    assert values.shape == x.shape
    assert scales.dtype == torch.float32
    assert scales.shape == x.shape[:-1]
    for row, code, scale in zip(x.double().tolist(), values.view(torch.uint8).tolist(), scales.tolist(), strict=True):
        assert scale == expected_scale(max(map(abs, row)))
        assert code == [encode(v / scale) for v in row]


def test_random_vectors_of_many_sizes():
    rows = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    check(rows * 10.0 ** torch.arange(-12, 12)[:, None])


@pytest.mark.parametrize("exponent", [-21, -12, -1, 0, 1, 9, 100, 118])
def test_the_scale_turns_exactly_at_448_times_a_power_of_two(exponent):
    edge = torch.tensor(448.0 * 2.0**exponent)
    below, above = edge.nextafter(torch.tensor(0.0)), edge.nextafter(torch.tensor(torch.inf))
    _, scales = quantize_fp8(torch.stack([below, edge, above])[:, None])
    assert scales.tolist() == [2.0**exponent, 2.0**exponent, 2.0 ** (exponent + 1)]
    assert [expected_scale(float(v)) for v in (below, edge, above)] == scales.tolist()


@pytest.mark.parametrize("exponent", [-13, 0, 3, 60])
def test_powers_of_two_as_amax(exponent):
    x = torch.tensor([[1.0, -1.0, 0.5, 0.25]]) * 2.0**exponent
    _, scales = quantize_fp8(x)
    assert scales.item() == 2.0 ** (exponent - 8)
    assert torch.equal(dequantize_fp8(*quantize_fp8(x)), x)


def test_rounding_is_to_nearest_even_between_all_neighbours():
    middles = [(a + b) / 2 for a, b in pairwise(MAGNITUDES)]
    near = [np.nextafter(np.float32(m), np.float32(s)).item() for m in middles for s in (0, 448)]
    line = torch.tensor([448.0, *MAGNITUDES, *middles, *near])
    check(torch.stack([line, -line]))


def test_small_and_zero_vectors_stop_at_the_floor():
    x = torch.tensor([[0.0, -0.0, 0.0], [1e-4, -1e-4, 0.0], [1e-30, -1e-40, 1e-45]])
    check(x)
    assert quantize_fp8(x)[1].tolist() == [2.0**-22] * 3


def test_largest_finite_numbers_survive():
    big = torch.finfo(torch.float32).max
    values, scales = quantize_fp8(torch.tensor([[big, -big, 1.0]]))
    assert values.float().tolist() == [[256.0, -256.0, 0.0]]
    assert scales.item() == 2.0**120
    assert torch.isfinite(dequantize_fp8(*quantize_fp8(torch.tensor([0.95 * big])))).all()


def test_error_is_within_half_a_step():
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    values, scales = quantize_fp8(x)
    error = (dequantize_fp8(values, scales) - x).abs()
    assert (error <= torch.maximum(x.abs() * 2.0**-4, scales[:, None] * 2.0**-10)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_is_read_as_it_is(dtype):
    check(torch.randn(4, 8, generator=torch.Generator().manual_seed(2)).to(dtype))


def test_shapes_batches_and_strides():
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(3))
    values, scales = quantize_fp8(x)
    alone, scale = quantize_fp8(x[1, 2])
    assert scale.shape == ()
    assert torch.equal(values[1, 2].view(torch.uint8), alone.view(torch.uint8))
    assert scales[1, 2] == scale
    moved = quantize_fp8(x.transpose(0, 1))[0]
    assert torch.equal(moved.view(torch.uint8), values.view(torch.uint8).transpose(0, 1))
    assert quantize_fp8(torch.zeros(0, 5))[1].shape == (0,)


def test_all_codes_decode():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    got = dequantize_fp8(codes[:, None], torch.full((256,), 0.5)).double()[:, 0]
    want = torch.tensor([code_value(c) * 0.5 for c in range(256)], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    strided = codes.view(16, 16).T
    assert torch.equal(dequantize_fp8(strided, torch.ones(16)).nan_to_num(), strided.float().nan_to_num())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_raises_and_says_how_many(bad):
    x = torch.ones(5, 4)
    x[2, 1] = x[4, 3] = bad
    with pytest.raises(ThresherError, match=r"x must be finite; got 2 of 5 vectors"):
        quantize_fp8(x)


def test_refuses_shapes_and_dtypes():
    for bad in (torch.arange(4), torch.tensor(1.0), torch.zeros(3, 0)):
        with pytest.raises(ThresherError, match="x must be"):
            quantize_fp8(bad)
    values, scales = quantize_fp8(torch.ones(2, 4))
    for args in ((values.float(), scales), (values, scales.double()), (values, scales[:1])):
        with pytest.raises(ThresherError, match="must be"):
            dequantize_fp8(*args)
