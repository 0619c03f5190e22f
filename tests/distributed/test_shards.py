import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.cache import Placement, load_keys
from thresher.distributed import Shard, local_attention, localise, split_keys, union
from thresher.errors import ThresherError
from thresher.types import Selection

from .cases import Layer


def selection_of(sets: list[set[int]], width: int) -> Selection:
    rows = [sorted(s) + [-1] * (width - len(s)) for s in sets]
    indices = torch.tensor(rows, dtype=torch.int32).reshape(len(sets), width)
    scores = torch.where(indices >= 0, indices * 0.5, float("-inf"))
    return Selection(indices, torch.tensor([len(s) for s in sets]), "logical", scores)


@pytest.mark.parametrize(("ranks", "granularity"), [(1, 1), (2, 1), (3, 2), (7, 1), (16, 5)])
def test_split_keys_deals_the_same_bits(ranks, granularity):
    layer = Layer([0, 1, 13, 40])
    placement = Placement(ranks, granularity)
    for rank, piece in enumerate(split_keys(layer.keys, placement)):
        assert piece.page_size == layer.keys.page_size
        for request, length in enumerate([0, 1, 13, 40]):
            values, scales = load_keys(layer.keys, request)
            mine = [p for p in range(length) if p // granularity % ranks == rank]
            got_values, got_scales = load_keys(piece, request)
            assert torch.equal(got_values.view(torch.uint8), values.view(torch.uint8)[mine])
            assert torch.equal(got_scales, scales[mine])


def test_local_attention_gives_the_ranks_keys():
    layer = Layer([9, 20])
    loaded = local_attention(layer.attention, Placement(4, 2), 3).load_keys(1)
    assert torch.equal(loaded, layer.k[1][[6, 7, 14, 15]])
    assert local_attention(None, Placement(4), 0) is None


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sets(st.integers(0, 60), max_size=12), min_size=1, max_size=4), st.integers(1, 8), st.integers(1, 4))
def test_localise_then_union_is_the_identity(sets, ranks, granularity):
    placement, whole = Placement(ranks, granularity), selection_of(sets, 12)
    parts = [localise(whole, placement, rank) for rank in range(ranks)]
    for rank, part in enumerate(parts):
        assert part.space == "local"
        for row, chosen in enumerate(sets):
            mine = sorted(p for p in chosen if p // granularity % ranks == rank)
            assert placement.to_logical(rank, part.indices[row].long())[: len(mine)].tolist() == mine
            assert part.lengths[row] == len(mine)
    back = union(parts, placement, 12)
    assert torch.equal(back.indices, whole.indices)
    assert torch.equal(back.lengths, whole.lengths)
    assert torch.equal(back.scores, whole.scores)
    assert union(parts, placement).topk == 12 * ranks


def test_bad_calls_give_one_line():
    local = Selection(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int64), "local")
    with pytest.raises(ThresherError, match="selection must be logical"):
        localise(local, Placement(2), 0)
    with pytest.raises(ThresherError, match="one selection for each of the 2 ranks"):
        union([local], Placement(2))
    with pytest.raises(ThresherError, match="must have attend set"):
        Shard(Layer([3]).keys).attend_to(local)
