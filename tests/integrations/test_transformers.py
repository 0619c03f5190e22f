"""DSA models of transformers inside ``use`` with ``DSA`` are themselves: the same sets, and the same bits where the sets are equal."""

from __future__ import annotations

import copy

import pytest
import torch

import thresher
from thresher.selectors import DSA, HISA, Window

from .models import TOPK, both, decode, indexers, make_cache, make_ids, make_model, run, same_sets


@both
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tokens", [TOPK - 4, TOPK, TOPK + 1, 48])
def test_prefill_with_dsa_is_the_model_s_own(family, attention, tokens):
    model, ids = make_model(family, attention), make_ids(3, tokens)
    own, theirs = run(model, ids)
    with thresher.use(model, DSA(TOPK)):
        hidden, ours = run(model, ids)
    assert ours.indices[0].dtype == torch.int32
    assert ours.indices[0].shape == theirs.indices[0].shape
    if same_sets(theirs, ours):
        assert torch.equal(hidden, own)


@both
def test_prefill_in_bf16_with_dsa_is_the_model_s_own(family):
    model, ids = make_model(family, dtype=torch.bfloat16), make_ids(2, 48, seed=1)  # no near-tie here
    own, theirs = run(model, ids)
    with thresher.use(model, DSA(TOPK)):
        hidden, ours = run(model, ids)
    if same_sets(theirs, ours):
        assert torch.equal(hidden, own)


@both
def test_topk_is_the_selector_s(family):
    model, ids = copy.deepcopy(make_model(family)), make_ids(2, 30)
    with thresher.use(model, DSA(5)):
        hidden, ours = run(model, ids)
    for indexer in indexers(model):
        indexer.index_topk = 5
    own, theirs = run(model, ids)
    if same_sets(theirs, ours):
        assert torch.equal(hidden, own)


@both
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_decoding_with_dsa_is_the_model_s_own(family, kind):
    model, ids = make_model(family), make_ids(2, 24)
    own, theirs = decode(model, ids, make_cache(model, kind))
    with thresher.use(model, DSA(TOPK)):
        hidden, ours = decode(model, ids, make_cache(model, kind))
    if same_sets(theirs, ours):
        assert torch.equal(hidden, own)


@both
def test_a_cache_goes_on_after_the_block(family):
    """What was decoded by any selector left the index keys that the model itself would have; here, all tokens being picked either way."""
    model, ids = make_model(family), make_ids(2, 24)
    cache = make_cache(model)
    with thresher.use(model, Window(TOPK)):
        decode(model, ids[:, :TOPK], cache)
    hidden, _ = decode(model, ids[:, TOPK:], cache)
    own, _ = decode(model, ids, make_cache(model))
    torch.testing.assert_close(hidden, own[:, TOPK:], atol=1e-5, rtol=1e-5)


@both
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents(family, attention):
    model, ids, lengths = make_model(family, attention), make_ids(1, 40), (17, 1, 22)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    own, theirs = run(model, ids, position_ids=positions)
    with thresher.use(model, DSA(TOPK)):
        hidden, ours = run(model, ids, position_ids=positions)
    if same_sets(theirs, ours):
        assert torch.equal(hidden, own)
    with thresher.use(model, Window(5, sinks=2)):
        _, picked = run(model, ids, position_ids=positions)
    start = 0
    for length in lengths:
        for t in range(length):
            want = {*range(min(2, t + 1)), *range(max(0, t - 2), t + 1)}
            assert {start + column for column in want} == set(picked.sets[0][0, start + t].nonzero()[:, 0].tolist())
        start += length


@both
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padding(family, attention):
    """Padding changes nothing for the tokens after it: the sinks of a window are the first of them, not of the padding."""
    model, short, long = make_model(family, attention), make_ids(1, 20), make_ids(1, 29, seed=1)
    ids = torch.cat([torch.nn.functional.pad(short, (9, 0)), long])
    mask = (ids > 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for selector in (DSA(TOPK), Window(6, sinks=2), HISA(block_size=4, num_blocks=3, topk=8)):
        with thresher.use(model, selector):
            alone, sets = run(model, short)
            hidden, padded = run(model, ids, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(hidden[:1, 9:], alone, atol=1e-4, rtol=1e-4)
        for one, two in zip(sets.sets, padded.sets, strict=True):
            assert torch.equal(one[0], two[0, 9:, 9:])


@both
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_on_either_side_with_dsa_is_the_model_s_own(family, attention):
    model, ids = make_model(family, attention), make_ids(2, 30)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :9] = mask[1, 22:] = 0
    own, theirs = run(model, ids, attention_mask=mask)
    with thresher.use(model, DSA(TOPK)):
        hidden, ours = run(model, ids, attention_mask=mask)
    if same_sets(theirs, ours):
        assert torch.equal(hidden, own)


WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "uncached": {"use_cache": False},
}


def generate(model, way):
    """12 tokens after a prompt with padding before it, and after one without."""
    ids = make_ids(2, 20)
    ids[0, :7] = 0
    torch.manual_seed(2)
    options = {"do_sample": False, **WAYS[way]}
    return model.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=12, **options)[:, 20:]


@both
@pytest.mark.parametrize("way", WAYS)
def test_generate_with_dsa_writes_what_the_model_does(family, way):
    model = make_model(family)
    own = generate(model, way)
    with thresher.use(model, DSA(TOPK)):
        assert torch.equal(generate(model, way), own)


@both
def test_beams_keep_their_own_tokens(family):
    """Rows of the cache change places between steps; a selector that kept something of its own would look at another beam's."""
    model, ids = make_model(family), make_ids(2, 20)
    with thresher.use(model, HISA(block_size=4, num_blocks=3, topk=8)):
        cached, whole = (model.generate(ids, num_beams=4, do_sample=False, max_new_tokens=10, use_cache=use) for use in (True, False))
    assert torch.equal(cached, whole)
    assert not torch.equal(cached, model.generate(ids, num_beams=4, do_sample=False, max_new_tokens=10))


@both
def test_nothing_is_kept_of_tokens_that_a_cache_lost(family):
    """Cut, with its rows in another order, filled anew, emptied: decoding is that of the tokens that the cache holds."""
    model, ids, others, cache = make_model(family), make_ids(2, 24), make_ids(2, 24, seed=1), make_cache(make_model(family))
    with thresher.use(model, HISA(block_size=4, num_blocks=3, topk=8)):
        decode(model, ids, cache, start=20)
        cache.crop(-7)
        cache.reorder_cache(torch.tensor([1, 0]))
        rest, _ = decode(model, others[:, 17:], cache)
        want, _ = run(model, torch.cat([ids[:, :17].flip(0), others[:, 17:]], dim=1))
        torch.testing.assert_close(rest, want[:, 17:], atol=1e-4, rtol=1e-4)
        static = make_cache(model, "static")
        decode(model, ids, static, start=20)
        static.reset()
        again, _ = decode(model, others, static, start=12)
        torch.testing.assert_close(again, run(model, others)[0][:, 12:], atol=1e-4, rtol=1e-4)
