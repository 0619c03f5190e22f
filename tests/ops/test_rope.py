"""apply_rope against complex rotation in Python floats."""

from __future__ import annotations

import cmath

import pytest
import torch

from thresher.errors import ThresherError
from thresher.ops import apply_rope


def expected(x: torch.Tensor, positions: torch.Tensor, theta: float, rotary_dim: int, style: str) -> torch.Tensor:
    out = x.double().clone()
    for t, position in enumerate(positions.tolist()):
        for i in range(rotary_dim // 2):
            a, b = (i, i + rotary_dim // 2) if style == "half" else (2 * i, 2 * i + 1)
            turn = cmath.exp(1j * position * theta ** (-2 * i / rotary_dim))
            for row, source in zip(out[t].view(-1, x.shape[-1]), x[t].reshape(-1, x.shape[-1]), strict=True):
                z = complex(float(source[a]), float(source[b])) * turn
                row[a], row[b] = z.real, z.imag
    return out


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize(("shape", "rotary_dim"), [((4, 16), 16), ((4, 3, 16), 8), ((4, 2, 2, 12), 4), ((4, 6), 0)])
def test_matches_the_formula(style, shape, rotary_dim):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 77, 4095])
    got = apply_rope(x, positions, 10000.0, rotary_dim, style)
    # an fp32 angle near 4096 is off by at most 4096 * 2**-24, twice (frequency and product)
    torch.testing.assert_close(got.double(), expected(x, positions, 10000.0, rotary_dim, style), rtol=0, atol=4e-3)
    near = slice(0, 2)
    torch.testing.assert_close(got[near].double(), expected(x[near], positions[near], 10000.0, rotary_dim, style), rtol=0, atol=2e-6)
    assert torch.equal(got[..., rotary_dim:], x[..., rotary_dim:])
    assert torch.equal(got[0], x[0])


def test_styles_are_one_rotation_in_two_layouts():
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    positions = torch.arange(5) * 11
    to_half = torch.cat([torch.arange(0, 16, 2), torch.arange(1, 16, 2)])
    interleaved = apply_rope(x, positions, 1e4, 16, "interleaved")
    assert torch.equal(interleaved[:, to_half], apply_rope(x[:, to_half], positions, 1e4, 16, "half"))
    assert not torch.allclose(interleaved, apply_rope(x, positions, 1e4, 16, "half"), atol=0.1)


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_dot_products_see_the_distance_only(style):
    q, k = torch.randn(2, 32, generator=torch.Generator().manual_seed(4)).unbind(0)

    def dot(i, j):
        pair = apply_rope(torch.stack([q, k]), torch.tensor([i, j]), 1e4, 32, style)
        return float(pair[0] @ pair[1])

    assert dot(9, 4) == pytest.approx(dot(105, 100), abs=1e-3)
    assert dot(9, 4) != pytest.approx(dot(4, 9), abs=1e-3)


def test_keeps_the_dtype_and_computes_in_fp32():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(5)).bfloat16()
    got = apply_rope(x, torch.tensor([5, 6, 7]), 1e4, 8, "half")
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, apply_rope(x.float(), torch.tensor([5, 6, 7]), 1e4, 8, "half").bfloat16())


@pytest.mark.parametrize(
    "change",
    [
        {"style": "neox"},
        {"rotary_dim": 3},
        {"rotary_dim": 10},
        {"rotary_dim": -2},
        {"positions": torch.arange(3)},
        {"positions": torch.rand(2)},
        {"theta": 0.0},
        {"x": torch.zeros(8)},
    ],
)
def test_refuses(change):
    call = {"x": torch.zeros(2, 8), "positions": torch.arange(2), "theta": 1e4, "rotary_dim": 8, "style": "half"} | change
    with pytest.raises(ThresherError, match="must"):
        apply_rope(**call)
