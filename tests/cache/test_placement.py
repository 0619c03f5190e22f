import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.cache import Placement
from thresher.errors import ThresherError


def dealt(placement: Placement, length: int) -> list[list[int]]:
    """Logical positions of each rank, dealt one by one."""
    ranks = [[] for _ in range(placement.ranks)]
    for position in range(length):
        if placement.kind == "replicated":
            for mine in ranks:
                mine.append(position)
            continue
        if placement.kind == "contiguous":
            rank = position // -(-placement.capacity // placement.ranks)
        else:
            rank = (position // placement.granularity) % placement.ranks
        ranks[rank].append(position)
    return ranks


PLACEMENTS = st.one_of(
    st.builds(Placement, st.integers(1, 9), st.integers(1, 6)),
    st.builds(lambda r, c: Placement(r, kind="contiguous", capacity=c), st.integers(1, 9), st.integers(70, 90)),
    st.builds(lambda r: Placement(r, kind="replicated"), st.integers(1, 9)),
)


@settings(max_examples=150, deadline=None)
@given(PLACEMENTS, st.integers(0, 70))
def test_every_map_agrees_with_dealing_one_by_one(placement, length):
    every = torch.arange(length)
    for rank, mine in enumerate(dealt(placement, length)):
        logical = torch.tensor(mine, dtype=torch.int64)
        local = torch.arange(len(mine))
        if placement.kind == "replicated":
            with pytest.raises(ThresherError, match="must live on one rank"):
                placement.owner(logical)
        else:
            assert placement.owner(logical).tolist() == [rank] * len(mine)
        assert placement.holds(every, rank).tolist() == [position in mine for position in range(length)]
        assert torch.equal(placement.to_local(logical), local)
        assert torch.equal(placement.to_logical(rank, local), logical)
        assert placement.local_length(torch.tensor([length]), rank).tolist() == [len(mine)]
        ends = [sum(p <= position for p in mine) - 1 for position in range(length)]
        assert placement.local_end(every, rank).tolist() == ends


@pytest.mark.parametrize("granularity", [1, 3])
def test_local_length_is_the_engines_formula(granularity):
    for ranks in (1, 2, 5, 8):
        for s in range(60):
            for rank in range(ranks):
                base = s // granularity // ranks * granularity
                want = base + min(max(s - base * ranks - rank * granularity, 0), granularity)
                got = Placement(ranks, granularity).local_length(torch.tensor(s), rank)
                assert got.item() == want


def test_no_token_stays_no_token():
    none = torch.tensor([[-1, 5], [-1, -1]])
    for placement in (Placement(3, 2), Placement(3, kind="contiguous", capacity=9)):
        assert (placement.owner(none)[none < 0] == -1).all()
        assert not placement.holds(none, 2)[none < 0].any()
        assert (placement.to_local(none)[none < 0] == -1).all()
        assert placement.to_logical(1, torch.tensor([-1, 0])).tolist()[0] == -1
        assert placement.local_end(torch.tensor([-1]), 0).tolist() == [-1]


def test_contiguous_ranks_may_be_empty():
    placement = Placement(4, kind="contiguous", capacity=5)
    assert placement.local_length(torch.tensor([5, 5, 5]), 2).tolist() == [1, 1, 1]
    assert placement.local_length(torch.tensor([5]), 3).tolist() == [0]
    assert placement.local_end(torch.tensor([0, 4]), 3).tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Placement(0), "ranks must be at least 1"),
        (lambda: Placement(2, 0), "granularity must be at least 1"),
        (lambda: Placement(2, kind="striped"), "kind must be one of"),
        (lambda: Placement(2, kind="contiguous"), "needs a capacity"),
        (lambda: Placement(2).to_logical(2, torch.tensor([0])), r"rank must lie in \[0, 2\)"),
        (lambda: Placement(2).owner(torch.tensor([0], dtype=torch.int32)), "positions must be int64"),
        (lambda: Placement(2, kind="contiguous", capacity=8).owner(torch.tensor([8])), "positions must be below 8"),
        (lambda: Placement(2, kind="contiguous", capacity=8).local_length(torch.tensor([9]), 0), "positions must be below 8"),
    ],
)
def test_bad_calls_give_one_line(call, words):
    with pytest.raises(ThresherError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
