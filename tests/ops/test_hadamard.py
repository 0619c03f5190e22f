"""hadamard against the popcount formula in fp64."""

from __future__ import annotations

import pytest
import torch

from thresher.errors import ThresherError
from thresher.ops import hadamard


def matrix(dim: int) -> torch.Tensor:
    return torch.tensor([[(-1.0) ** ((i & j).bit_count()) for j in range(dim)] for i in range(dim)], dtype=torch.float64) * dim**-0.5


@pytest.mark.parametrize("dim", [1, 2, 4, 8, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_the_formula(dim, dtype):
    x = torch.randn(3, 5, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
    got = hadamard(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), x.double() @ matrix(dim), rtol=0, atol=1e-5)


def test_is_its_own_inverse_and_keeps_dot_products():
    q, k = torch.randn(2, 6, 128, generator=torch.Generator().manual_seed(0)).unbind(0)
    torch.testing.assert_close(hadamard(hadamard(q)), q, rtol=0, atol=1e-5)
    torch.testing.assert_close(hadamard(q) @ hadamard(k).T, q @ k.T, rtol=0, atol=1e-4)


def test_a_row_has_the_same_bits_alone():
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    together = hadamard(x)
    assert all(torch.equal(together[i], hadamard(x[i])) for i in range(9))


def test_spreads_one_outlier_evenly():
    x = torch.zeros(128)
    x[37] = 1000.0
    assert torch.allclose(hadamard(x).abs(), torch.full((128,), 1000 / 128**0.5))


def test_gradient_is_the_rotation_itself():
    x = torch.randn(4, 8, requires_grad=True)
    up = torch.randn(4, 8)
    hadamard(x).backward(up)
    torch.testing.assert_close(x.grad, hadamard(up))


@pytest.mark.parametrize("bad", [torch.randn(3, 12), torch.randn(2, 0), torch.tensor(1.0), torch.arange(8)])
def test_refuses(bad):
    with pytest.raises(ThresherError, match=r"x must|power of two"):
        hadamard(bad)
