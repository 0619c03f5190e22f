"""The interface proof: one way to call selectors carries all five shapes of method.

DSA needs nothing; HISA keeps block means; the oracle reads the attention; Shared reads another layer; IDSA wraps a selector in a placement.
Each goes through a prefill in two chunks, decode, a rejected draft, its rollback, and decode again, and ends as a single fresh call does.
"""

from __future__ import annotations

import pytest

from thresher.cache import LayerState
from thresher.distributed import IDSA
from thresher.errors import ThresherError
from thresher.selectors import DSA, HISA, Oracle, Shared

from .worlds import make_world, rows_of, splice

HIERARCHICAL = HISA(block_size=4, num_blocks=3, topk=6)
CASES = {"dsa": DSA(6), "hisa": HIERARCHICAL, "oracle": Oracle(6), "shared": Shared(layer=0), "idsa": IDSA(HIERARCHICAL, ranks=2)}
LENGTH, DRAFT_AT, ACCEPTED = 41, 30, 32


@pytest.mark.parametrize("selector", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("kind", ["normal", "plateau"])
def test_prefill_decode_rollback(selector, kind):
    world, draft = make_world([LENGTH, 12], 1, kind), make_world([LENGTH, 12], 2, kind)
    selections: dict = {}
    first_layer, layer = LayerState(0, selections), LayerState(1, selections)

    def step(source, start, end):
        """Tokens start..end - 1 of request 0 through both layers; request 1 sits in the batch all along."""
        pairs = [(0, p) for p in range(start, end)] + [(1, 11)]
        query, keys, attention = source.query(pairs), source.view([end, 12]), source.attention(pairs)
        selections.clear()
        selections[0] = DSA(6).select(query, keys, first_layer, attention)
        return rows_of(selector.select(query, keys, layer, attention), query, keys)

    got, neighbour = {}, []

    def run(source, start, end):
        *rows, other = step(source, start, end)
        got.update(zip(range(start, end), rows, strict=True))
        neighbour.append(other)

    run(world, 0, 17)
    run(world, 17, DRAFT_AT)
    for position in range(DRAFT_AT, ACCEPTED):
        run(world, position, position + 1)

    # Draft tokens that the model then rejects: their keys filled a block, which must not survive them.
    mixed = splice(world, draft, ACCEPTED)
    step(mixed, ACCEPTED, ACCEPTED + 6)
    for state in (first_layer, layer):
        state.rollback(0, ACCEPTED)
    for position in range(ACCEPTED, LENGTH):
        run(world, position, position + 1)

    fresh = DSA(6) if isinstance(selector, Shared) else selector
    assert [got[p] for p in range(LENGTH)] == world.select(fresh, world.every_pair([0]))
    [alone] = world.select(fresh, [(1, 11)])
    assert all(row == alone for row in neighbour)


def test_shared_says_what_is_missing():
    world = make_world([5])
    query, keys = world.query(world.every_pair()), world.view()
    with pytest.raises(ThresherError, match="no state"):
        Shared(0).select(query, keys)
    with pytest.raises(ThresherError, match=r"got selections of layers \[\]; run layer 0 first"):
        Shared(0).select(query, keys, LayerState(1))
    few = world.query([(0, 4)])
    with pytest.raises(ThresherError, match="must have 5 rows"):
        Shared(0).select(query, keys, LayerState(1, {0: DSA(2).select(few, keys)}))


def test_oracle_says_what_is_missing():
    world = make_world([5])
    query, keys = world.query(world.every_pair()), world.view()
    with pytest.raises(ThresherError, match="needs the attention inputs"):
        Oracle(2).select(query, keys)
    with pytest.raises(ThresherError, match="must have 5 rows"):
        Oracle(2).select(query, keys, None, world.attention([(0, 4)]))
