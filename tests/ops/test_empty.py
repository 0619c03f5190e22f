"""No queries, no keys, no context, nothing to store: rows of -inf or -1, zeros, and nothing written."""

from __future__ import annotations

import pytest
import torch

from thresher import ops

from .arguments import empty, first_tensor

CASES = empty()


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(CASES)])
def test_empty_inputs_are_legal(case):
    name, given, want = empty()[case]
    result = getattr(ops, name)(*given)
    if isinstance(want, dict):
        for part, tensor in want.items():
            assert torch.equal(getattr(result, part), tensor)
    elif want is not None:
        assert torch.equal(first_tensor(result, given), want)


def test_every_function_that_takes_a_batch_is_here():
    vectors = {"hadamard", "apply_rope", "quantize_fp8", "dequantize_fp8"}
    assert {name for name, _, _ in CASES} | vectors == set(ops.__all__)


def test_no_vectors():
    values, scales = ops.quantize_fp8(torch.zeros(0, 8))
    assert values.shape == ops.dequantize_fp8(values, scales).shape == ops.hadamard(torch.zeros(0, 8)).shape == (0, 8)
    assert ops.apply_rope(torch.zeros(0, 3, 8), torch.zeros(0).long(), 1e4, 8, "half").shape == (0, 3, 8)
