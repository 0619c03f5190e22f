"""The copied rows give the attention's own dot products over its slowest RoPE pairs."""

import dataclasses

import pytest
import torch

from thresher.errors import ThresherError
from thresher.models.indexer import Indexer
from thresher.train.config import STARTS
from thresher.train.initial import copy_slow_pairs, new_indexers, slow_pairs

from ..models.tiny import CONFIG, INDEXER, layer_inputs, tiny_model, tokens, turn

HEADS, GROUPS, DIM = CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.head_dim


def test_how_many_pairs_fit():
    assert slow_pairs(INDEXER, HEADS, GROUPS, DIM) == 5  # 64 // (2 * 6) in the bottleneck, 24 // 4 in the key
    assert slow_pairs(dataclasses.replace(INDEXER, q_rank=1000), HEADS, GROUPS, DIM) == 6
    assert slow_pairs(dataclasses.replace(INDEXER, q_rank=1000, head_dim=512), HEADS, GROUPS, DIM) == 8


@pytest.mark.parametrize("seed", [0, 5])
def test_dot_products_are_the_attentions_over_its_slow_pairs(seed):
    model = tiny_model(seed=seed)
    layer, hidden = model.layers[1], layer_inputs(model, tokens(30))[1].hidden
    indexer = Indexer(INDEXER).requires_grad_(False)
    indexer.wq_b.weight.zero_()
    indexer.wk.weight.zero_()
    copy_slow_pairs(indexer, layer)
    q = (indexer.wq_a(hidden) @ indexer.wq_b.weight.T).view(30, INDEXER.num_heads, INDEXER.head_dim).double()
    k = indexer.wk(hidden).double()
    assert q[..., : INDEXER.rotary_dim].count_nonzero() == 0, "the dims that RoPE turns are left alone"
    pairs = slow_pairs(INDEXER, HEADS, GROUPS, DIM)
    slow = [d for d in range(DIM) if d % (DIM // 2) >= DIM // 2 - pairs]
    queries = layer.q_proj(hidden).view(30, HEADS, DIM)[..., slow].double()
    keys = layer.k_proj(hidden).view(30, GROUPS, DIM)[..., slow].double()
    for j in range(INDEXER.num_heads):
        head, strength = j % HEADS, 1.0 if j < HEADS else 0.5 if j < 2 * HEADS else 0.0
        want = queries[:, head] @ keys[:, head // (HEADS // GROUPS)].T
        torch.testing.assert_close(q[:, j] @ k.T, strength * want, rtol=1e-4, atol=1e-4)


def test_slow_pairs_are_the_ones_distance_hardly_changes():
    ones = torch.ones(1, DIM, dtype=torch.float64)
    moved = (turn(ones, torch.tensor([40]), CONFIG.rope_theta, DIM) - ones)[0]
    pairs = slow_pairs(INDEXER, HEADS, GROUPS, DIM)
    change = moved.view(2, DIM // 2).square().sum(0)
    assert change[-3:].max() < change[: DIM // 2 - pairs].min()


@pytest.mark.parametrize("start", STARTS)
def test_the_same_for_the_same_seed_and_the_callers_dice_untouched(start):
    model = tiny_model()
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    one, two, other = (new_indexers(INDEXER, model, seed, start) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    for a, b, c in zip(one.parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.requires_grad
        assert a.dim() == 1 or not torch.equal(a, c)
    assert len(one) == len(model.layers)


def test_later_rounds_differ_by_their_random_part():
    indexer = new_indexers(INDEXER, tiny_model(), 0, "attention")[0]
    rows = indexer.wq_b.weight.view(INDEXER.num_heads, INDEXER.head_dim, -1)
    assert not torch.equal(rows[0], 2 * rows[HEADS])
    assert indexer.wq_a.weight.shape == (INDEXER.q_rank, INDEXER.hidden_size)


def test_a_random_start_knows_nothing_of_the_attention():
    one, other = (new_indexers(INDEXER, tiny_model(seed=seed), 0, "random") for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    copied = new_indexers(INDEXER, tiny_model(), 0, "attention")
    assert not torch.equal(one[0].wk.weight, copied[0].wk.weight)
    rounds = INDEXER.num_heads // HEADS * HEADS * INDEXER.head_dim
    torch.testing.assert_close(copied[0].wq_b.weight[rounds:], one[0].wq_b.weight[rounds:] / 2, msg="a last round stays random, at half")


def test_too_few_index_heads_is_one_clear_line():
    with pytest.raises(ThresherError, match="at least 6 heads; got 4"):
        new_indexers(dataclasses.replace(INDEXER, num_heads=4), tiny_model(), 0, "attention")
