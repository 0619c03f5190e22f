"""A rank's step of the exact merge among others, in one process: one exchange, and the bits of what all ranks' lists give."""

import pytest
import torch

from thresher.distributed import ExactMerge
from thresher.selectors import DSA, HISA, MISA

from .cases import Layer


class Told:
    """One of several ranks, told beforehand what the others say."""

    def __init__(self, rank, everyone):
        self.rank, self.ranks, self.everyone, self.calls = rank, len(everyone), everyone, 0

    def gather(self, x):
        assert torch.equal(x, self.everyone[self.rank])
        self.calls += 1
        return torch.stack(self.everyone)


class Said(Exception):
    """What a rank wants to pass on."""


class Saying:
    """A rank that gets no further than its first exchange."""

    def __init__(self, rank):
        self.rank = rank

    def gather(self, x):
        raise Said(x)


def said(over, layer, shard, rank):
    with pytest.raises(Said) as caught:
        over.own_set(layer.query, shard, Saying(rank))
    return caught.value.args[0]


@pytest.mark.parametrize("granularity", [1, 4])
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("selector", [DSA(10), DSA(300), MISA(2, 8, 12), HISA(4, 8, 12)], ids=str)
def test_own_sets_are_the_local_sets(selector, ranks, granularity):
    layer = Layer([3, 0, 61, 140, 1], queries=15, coarse=True)
    over = ExactMerge(selector, ranks, granularity)
    shards = layer.shards(over.placement)
    everyone = [said(over, layer, shard, rank) for rank, shard in enumerate(shards)]
    assert {(x.dtype, tuple(x.shape)) for x in everyone} == {(torch.int32, (2, 15, selector.topk))}
    gathered = [over.candidates(layer.query, shard, rank) for rank, shard in enumerate(shards)]
    scores, logical = (torch.stack(x) for x in zip(*gathered, strict=True))
    for rank, want in enumerate(over.local_sets(layer.query, shards)):
        told = Told(rank, everyone)
        got, owned = over.own_set(layer.query, shards[rank], told), over.owned(scores, logical, rank)
        assert told.calls == 1
        assert got.space == "local"
        for same in (want, owned):
            assert torch.equal(got.indices, same.indices)
            assert torch.equal(got.lengths, same.lengths)
            assert torch.equal(got.scores.view(torch.int32), same.scores.view(torch.int32))
