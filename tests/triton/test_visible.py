"""How many keys queries see, by the kernel and by PyTorch."""

from __future__ import annotations

import pytest
import torch

from thresher.cache.device import count_visible
from thresher.cache.index_keys import visible_counts
from thresher.types import IndexKeys, IndexQuery


@pytest.mark.parametrize("num", [0, 1, 130, 300])
def test_counts_are_pytorchs(num):
    """Positions from -1 on and past the end, empty requests, strided tensors."""
    generator = torch.Generator().manual_seed(num)
    lengths = torch.tensor([0, 70, 5000, 64])
    positions = torch.randint(-1, 6000, (2, num), generator=generator).T.contiguous().T[0]
    requests = torch.randint(0, 4, (num,), generator=generator)
    query = IndexQuery(torch.zeros(num, 8, 64), torch.zeros(num, 8), positions, requests)
    keys = IndexKeys(torch.zeros(80, 64, 1, 68, dtype=torch.uint8), torch.zeros(4, 80, dtype=torch.int32), lengths)
    assert torch.equal(count_visible(query, keys), visible_counts(query, keys))


def test_a_request_that_is_not_there_has_no_keys():
    query = IndexQuery(torch.zeros(3, 8, 64), torch.zeros(3, 8), torch.tensor([5, 5, 5]), torch.tensor([-1, 0, 7]))
    keys = IndexKeys(torch.zeros(1, 64, 1, 68, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int32), torch.tensor([3]))
    assert count_visible(query, keys).tolist() == [0, 3, 0]
