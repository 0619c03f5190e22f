"""What ``use`` is made of: masks that are read, keys in two precisions, the operator."""

from __future__ import annotations

import pytest
import torch

import thresher
from thresher.errors import ThresherError
from thresher.integrations.masks import read_mask
from thresher.integrations.precision import encode_keys, encode_queries, parts_of
from thresher.integrations.select import Rule, number_of
from thresher.selectors import DSA, Oracle

from .models import FAMILIES, TOPK, indexers, make_ids, make_model, recorded


def test_a_mask_is_read_as_documents():
    mask = torch.zeros(2, 4, 6, dtype=torch.bool)
    mask[0, 1, 2:4] = mask[0, 2, 2:5] = mask[0, 3, 5:6] = True  # row 0 sees nothing; then a document at 2, and one at 5
    mask[1] = torch.ones(4, 6).tril(1).bool()
    seen = read_mask(mask)
    assert seen.first.tolist() == [0, 2, 2, 5, 0, 0, 0, 0]
    assert seen.positions.tolist() == [-1, 1, 2, 0, 1, 2, 3, 4]
    assert [seen.spans[request] for request in seen.requests.tolist()][1:] == [(0, 2, 5), (0, 2, 5), (0, 5, 6), *[(1, 0, 5)] * 4]
    for hidden in (torch.finfo(torch.bfloat16).min, -torch.inf):
        added = torch.zeros(2, 4, 6, dtype=torch.bfloat16).masked_fill(~mask, hidden)
        again = read_mask(added)
        assert torch.equal(again.positions, seen.positions)
        assert again.spans == seen.spans


def test_other_masks_are_refused():
    gap = torch.tensor([[[True, False, True]]])
    with pytest.raises(ThresherError, match="each query must see neighbouring columns"):
        read_mask(gap)
    with pytest.raises(ThresherError, match="must hold 0 and the smallest numbers alone"):
        read_mask(torch.tensor([[[0.0, -1.5, 0.0]]]))


@pytest.mark.parametrize(("dtype", "parts"), [(torch.bfloat16, 2), (torch.float16, 3), (torch.float32, 6)])
def test_keys_in_the_model_s_precision_are_exact(dtype, parts):
    torch.manual_seed(0)
    k, q = torch.randn(200, 16).to(dtype), torch.randn(7, 3, 16).to(dtype)
    assert parts_of(dtype) == parts
    values, scales = encode_keys(k, "model")
    assert values.shape == (200, 16 * parts)
    places = 16.0 ** -torch.arange(parts, dtype=torch.float64)
    whole = (values.double().view(200, parts, 16) * places[:, None]).sum(1) * scales[:, None].double()
    # Half a unit of the smallest number of the last part, next to the largest of the key.
    assert ((whole - k.double()).abs() <= k.double().abs().amax(-1, keepdim=True) * 2.0**-17 * 16.0 ** (1 - parts)).all()
    assert ((whole - k.double()).abs() <= k.double().abs() * torch.finfo(dtype).eps / 2).double().mean() > 0.99
    spread, weights = encode_queries(q, torch.ones(7, 3), dtype, "model")
    dots = spread.double() @ values.double().T * scales
    torch.testing.assert_close(dots, q.double() @ k.double().T, atol=1e-6 if parts == 6 else 1e-9, rtol=0)
    assert torch.equal(weights, torch.ones(7, 3))


def test_keys_must_be_finite():
    for precision in ("model", "fp8"):
        with pytest.raises(ThresherError, match="finite"):
            encode_keys(torch.tensor([[1.0, torch.nan, 0.0, 0.0]]), precision)


def emulated(x):
    """Through Hadamard and FP8 and back, written apart from ours: entries are signs by the parity of common bits, scales powers of two."""
    size = x.shape[-1]
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    turned = x.float() @ torch.tensor(signs) * size**-0.5
    scale = 2.0 ** torch.ceil(torch.log2(turned.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448))
    return ((turned / scale).to(torch.float8_e4m3fn).float() * scale).double()


@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_picks_what_fp8_scores_say(family):
    """Recall against an emulation of FP8 of at least 0.999; against the model's own sets 0.97: what FP8 costs on random weights."""
    model, ids = make_model(family), make_ids(4, 96)
    given = {}

    def keep(module, args, kwargs):
        given[module] = args

    indexer = indexers(model)[0]
    handle = indexer.register_forward_pre_hook(keep, with_kwargs=True)
    with recorded(model) as own:
        model(ids, use_cache=False)
    with thresher.use(model, DSA(TOPK), "fp8"), recorded(model) as ours:
        model(ids, use_cache=False)
    handle.remove()
    with thresher.use(model, DSA(TOPK)):
        hidden, q_resid, embeddings, mask = given[indexer][:4]
        q, k = indexer.forward.__self__.queries_and_keys(hidden, q_resid, embeddings)
    dots = torch.einsum("bshd,btd->bsht", emulated(q), emulated(k)).relu()
    scores = torch.einsum("bsht,bsh->bst", dots, indexer.weights_proj(hidden).double()).masked_fill(~mask, -torch.inf)
    want = torch.zeros_like(mask).scatter(-1, scores.topk(TOPK).indices, True) & mask
    rows = mask.sum(-1) > TOPK
    against_fp8, against_own = ((ours.sets[0] & other)[rows].sum() / (TOPK * rows.sum()) for other in (want, own.sets[0]))
    assert against_fp8 >= 0.999
    assert 0.95 < against_own < 1


def test_the_operator_keeps_the_rules_of_operators():
    torch.manual_seed(0)
    q, weights, k = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3), torch.randn(2, 5, 8)
    mask = torch.ones(1, 5, 5, dtype=torch.bool).tril()
    inputs = [torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6)]
    for selector, attention in ((DSA(3), []), (Oracle(3), inputs)):
        arguments = (number_of(Rule(selector, "model")), 0, 3, q, weights, k, mask, attention, 0.5)
        torch.library.opcheck(torch.ops.thresher.select_columns.default, arguments)
        picked = torch.ops.thresher.select_columns(*arguments)
        assert picked[:, 0].unique().tolist() == [0], "a row with fewer columns repeats its first"
    nothing = torch.ops.thresher.select_columns(*arguments[:6], torch.zeros_like(mask), attention, 0.5)
    assert nothing.shape == (2, 5, 3)
    assert not nothing.any()


def test_equal_rules_have_one_number():
    assert number_of(Rule(DSA(3), "model")) == number_of(Rule(DSA(3), "model"))
    assert len({number_of(rule) for rule in (Rule(DSA(3), "model"), Rule(DSA(3), "fp8"), Rule(DSA(4), "model"))}) == 3
