import math

import pytest
import torch

from thresher.cache.fp8 import dequantize_fp8, quantize_fp8
from thresher.errors import ThresherError


def expected_scale(amax: float) -> float:
    """Smallest power of two not below max(amax, 1e-4) / 448, by exact integer ratios."""
    top, bottom = torch.tensor(max(amax, 1e-4), dtype=torch.float32).item().as_integer_ratio()
    exponent = -140
    while top * 2**200 > 448 * bottom * 2 ** (200 + exponent):
        exponent += 1
    return math.ldexp(1.0, exponent)


@pytest.mark.parametrize("power", [-14, -3, 0, 1, 20, 110])
@pytest.mark.parametrize("steps", [-1, 0, 1])
def test_scale_at_the_edges_of_a_power_of_two(power, steps):
    edge = torch.tensor(math.ldexp(448.0, power))
    for _ in range(abs(steps)):
        edge = torch.nextafter(edge, torch.tensor(math.inf * steps))
    values, scale = quantize_fp8(torch.stack([edge, -edge / 3, torch.tensor(0.0)]))
    assert scale.item() == expected_scale(edge.item())
    assert values.float().abs().max() <= 448


def test_random_values_round_to_nearest_even():
    torch.manual_seed(0)
    x = torch.randn(50, 32) * torch.logspace(-6, 6, 50)[:, None]
    values, scales = quantize_fp8(x)
    assert scales.tolist() == [expected_scale(a) for a in x.abs().amax(1).tolist()]
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    grid = grid[~grid.isnan()]
    gap = (x.double()[..., None] / scales.double()[:, None, None] - grid).abs().amin(-1)
    assert torch.equal((values.double() - x.double() / scales.double()[:, None]).abs(), gap)
    ties, _ = quantize_fp8(torch.tensor([448.0, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10]))
    assert ties.float().tolist() == [448.0, 16.0, 20.0, 0.0, 2 * 2.0**-9]


def test_zero_and_shapes():
    values, scales = quantize_fp8(torch.zeros(2, 3, 8, dtype=torch.bfloat16))
    assert values.shape == (2, 3, 8)
    assert scales.shape == (2, 3)
    assert scales.unique().tolist() == [2.0**-22]
    assert dequantize_fp8(values, scales).abs().max() == 0
    empty, none = quantize_fp8(torch.zeros(0, 8))
    assert empty.shape == (0, 8)
    assert none.shape == (0,)


def test_dequantize_gives_the_product():
    values, scales = quantize_fp8(torch.tensor([[1.0, -3.5], [1000.0, 0.25]]))
    assert dequantize_fp8(values, scales).tolist() == [[1.0, -3.5], [1024.0, 0.25]]
    assert scales.tolist() == [2.0**-7, 4.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_is_refused(bad):
    x = torch.ones(4, 8)
    x[2, 7] = bad
    with pytest.raises(ThresherError, match="must be finite"):
        quantize_fp8(x)


@pytest.mark.parametrize("bad", [torch.ones(3, dtype=torch.int32), torch.ones(2, 0), torch.tensor(1.0)])
def test_wrong_tensors_are_refused(bad):
    with pytest.raises(ThresherError):
        quantize_fp8(bad)
