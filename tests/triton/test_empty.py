"""The kernels' side of tests/ops/test_empty.py: the same empty inputs, the same results."""

from __future__ import annotations

import pytest
import torch

from thresher import ops
from thresher.ops import dispatch

from ..ops.arguments import empty, first_tensor

CUDA_ALONE = {"score_select", "hisa_select"}


def interpreted():
    """Those whose kernels can be interpreted."""
    return [case for case in empty() if case[0] not in CUDA_ALONE]


CASES = interpreted()
OPERATIONS = {name for name, _, _ in CASES}


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(CASES)])
def test_empty_inputs_are_legal(case):
    name, given, want = interpreted()[case]
    result = getattr(ops, name)(*given, impl="triton")
    if isinstance(want, dict):
        for part, tensor in want.items():
            assert torch.equal(getattr(result, part), tensor)
    elif want is not None:
        assert torch.equal(first_tensor(result, given), want)


def test_every_operation_is_here():
    assert set(dispatch.TABLE) == OPERATIONS | CUDA_ALONE
