"""Token-by-token agreement with transformers in fp32 on a tiny checkpoint of each family.

Sets must be equal, but for keys whose scores are as good as equal: both sides sum in fp32 in orders of their own, and are off by at most
``eps``, which bounds a dot of D terms, a sum of H heads and an angle of fp32 (as in tests/ops/test_transformers_indexer.py).
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from thresher.models.dsa_decoder import DsaDecoder
from thresher.models.dsa_layers import DsaModel

from .dsa_peer import FAMILIES, TOPK, peer_cache, rows, run_peer, text, tiny_model, watch

pytest.importorskip("transformers", minversion="5.24")

CLOSE = {"rtol": 0, "atol": 1e-5}
LONG = 90
pytestmark = pytest.mark.parametrize("family", FAMILIES)


def decoder(family: str, **options) -> DsaDecoder:
    return DsaDecoder(tiny_model(family), 128, precision="fp32", **options)


def agree(watched, layer: int, first: int, mine: list[set[int]], theirs: list[set[int]]) -> None:
    """Sets of the tokens from position ``first`` on are the same, or differ by a near-tie."""
    q, weights, keys = (x.double() for x in watched.whole(layer))
    heads, dim = q.shape[1:]
    scores = torch.einsum("th,ths->ts", weights, torch.einsum("thd,sd->ths", q, keys).relu())
    reach = (weights.abs() * q.norm(dim=-1)).sum(1) * keys.norm(dim=-1).max()
    eps = reach * (2 * (dim + heads + 4) * 2.0**-24 + 2 * len(keys) * 2.0**-22)
    assert eps.max() < 0.02 * scores[-1].std(), "the tolerance must be too small to hide a wrong formula"
    for t, (ours, other) in enumerate(zip(mine, theirs, strict=True), start=first):
        assert len(ours) == len(other) == min(t + 1, TOPK)
        kth = scores[t, list(ours)].min()
        assert all(abs(scores[t, s] - kth) <= eps[t] for s in ours ^ other)


def compare(watched, first: int, selections, hidden, logits, other) -> int:
    """Hold one call against transformers'; returns how many tokens come before the first whose sets differ. Their states must be close."""
    their_hidden, their_logits, their_sets = other
    assert set(their_sets) == set(watched.index)
    same = len(hidden)
    for layer, theirs in their_sets.items():
        mine = rows(selections[layer])
        agree(watched, layer, first, mine, theirs)
        same = min([same, *(t for t, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)])
    torch.testing.assert_close(hidden[:same], their_hidden[:same], **CLOSE)
    torch.testing.assert_close(logits[:same], their_logits[:same], **CLOSE)
    return same


@pytest.mark.parametrize("length", [TOPK // 2, TOPK, LONG], ids=["below k", "at k", "above k"])
def test_prefill(family, length):
    made, ids = decoder(family), text(length)
    with watch(made.model) as watched:
        hidden = made.run(ids)
    other = run_peer(family, ids)
    assert compare(watched, 0, made.selections, hidden, made.model.logits(hidden), other) > 0.9 * length
    made.rollback(0)
    torch.testing.assert_close(made.prefill(ids), other[1][-1], **CLOSE)


def test_decode_token_by_token(family):
    """From below k to well above it, each side with its own cache."""
    made, ids, cache = decoder(family), text(LONG, seed=1), peer_cache(family)
    start = TOPK - 6
    with watch(made.model) as watched:
        made.prefill(ids[:start])
        run_peer(family, ids[:start], cache)
        for t in range(start, LONG):
            hidden = made.run(ids[t : t + 1])
            if compare(watched, t, made.selections, hidden, made.model.logits(hidden), run_peer(family, ids[t : t + 1], cache)) == 0:
                break  # a near-tie: what follows is another text
    assert t > 3 * TOPK


def test_two_documents_as_two_requests(family):
    """Each text must come out as if it were alone, whatever the other one is and wherever its pages lie."""
    texts = [text(70, seed=2), text(41, seed=3)]
    made = decoder(family, num_requests=2)
    alone = [run_peer(family, ids) for ids in texts]
    grown = [made.run(ids[:30], requests=torch.full((30,), request)) for request, ids in enumerate(texts)]
    for t in range(30, 41):
        both = made.run(torch.stack([ids[t] for ids in texts]), requests=torch.tensor([0, 1]))
        grown = [torch.cat([held, both[request : request + 1]]) for request, held in enumerate(grown)]
    grown[0] = torch.cat([grown[0], made.run(texts[0][41:], requests=torch.zeros(29, dtype=torch.int64))])
    for hidden, (theirs, _, _) in zip(grown, alone, strict=True):
        torch.testing.assert_close(hidden, theirs, **CLOSE)


def test_the_other_rope_layout_is_told_apart(family):
    """The indexer of one family pairs dims i and i + 32, the other's 2i and 2i + 1: swapped, sets and hidden states go wrong."""
    model = tiny_model(family)
    other = "half" if model.config.index_rope == "interleaved" else "interleaved"
    swapped = DsaModel(dataclasses.replace(model.config, index_rope=other), torch.float32).requires_grad_(False)
    swapped.load_state_dict(model.state_dict())
    made, ids = DsaDecoder(swapped, 128, precision="fp32"), text(LONG)
    hidden = made.run(ids)
    theirs, _, sets = run_peer(family, ids)
    assert rows(made.selections[0])[-1] != sets[0][-1]
    assert (hidden - theirs).abs().max() > 0.01


def test_shared_layers_take_the_set_of_the_layer_before(family):
    made = decoder(family)
    made.run(text(LONG))
    sources = {"deepseek_v32": (0, 1, 2), "glm_moe_dsa": (0, 1, 1, 1, 4)}[family]
    assert made.model.config.index_layers == sources
    for layer, source in enumerate(sources):
        assert torch.equal(made.selections[layer].indices, made.selections[source].indices)
    differ = {(a, b) for a in set(sources) for b in set(sources) if rows(made.selections[a]) != rows(made.selections[b])}
    assert len(differ) == len(set(sources)) * (len(set(sources)) - 1)


def test_greedy_text(family):
    ids = text(40, seed=4)
    ours = list(decoder(family).generate(ids, 12))
    theirs = []
    for _ in range(len(ours)):
        theirs.append(int(run_peer(family, torch.cat([ids, torch.tensor(theirs, dtype=torch.int64)]))[1][-1].argmax()))
    assert ours == theirs
    assert ours
