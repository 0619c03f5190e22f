"""The warm-up's loss against its formula in fp64, written head by head."""

import math

import pytest
import torch

from thresher.models.indexer import Indexer, IndexerConfig
from thresher.train.loss import attention_target, layer_loss

from ..models.tiny import CONFIG, INDEXER, index_parts, layer_inputs, tiny_indexers, tiny_model, tokens

LENGTH, ACTIVE = 90, 3
QUERIES = torch.tensor([0, 1, 17, 40, 63, 89])


@pytest.fixture(scope="module")
def given():
    return layer_inputs(tiny_model(), tokens(LENGTH))[1]


def plain_target(given, row):
    """p of one query: softmax over what it sees, head by head, averaged."""
    total = torch.zeros(LENGTH, dtype=torch.float64)
    for head in range(CONFIG.num_attention_heads):
        keys = given.k[: row + 1, head // (CONFIG.num_attention_heads // CONFIG.num_key_value_heads)].double()
        total[: row + 1] += (keys @ given.q[row, head].double() / math.sqrt(CONFIG.head_dim)).softmax(0) / CONFIG.num_attention_heads
    return total


def plain_loss(indexer, given, queries):
    """kl, spread, imbalance in fp64, query by query; gradients flow to the indexer."""
    q, w, k = index_parts(indexer, given.hidden.double(), given.positions)
    kls, shares = [], []
    for row in queries.tolist():
        terms = torch.relu(q[row] @ k[: row + 1].T)  # [H, seen]
        log_q = (w[row] @ terms).log_softmax(0)
        p = plain_target(given, row)[: row + 1]
        kls.append((p * (p.log() - log_q)).sum())
        mass = w[row].abs() * terms.mean(1)
        shares.append(mass / mass.sum())
    share = torch.stack(shares)
    spread = 1 - share.sort(1, descending=True).values[:, :ACTIVE].sum(1).mean()
    imbalance = share.shape[1] * (share.mean(0) ** 2).sum() - 1
    return torch.stack(kls).mean(), spread, imbalance


def test_target_is_the_head_mean_of_causal_attention(given):
    future = given.positions > QUERIES[:, None]
    got = attention_target(given, QUERIES, future)
    for i, row in enumerate(QUERIES.tolist()):
        torch.testing.assert_close(got[i].double(), plain_target(given, row), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.sum(1), torch.ones(len(QUERIES)))
    assert got[future].count_nonzero() == 0


def test_values_agree_with_the_formula(given):
    indexer = tiny_indexers(2)[1]
    got = layer_loss(indexer, given, QUERIES, ACTIVE)
    kl, spread, imbalance = plain_loss(indexer, given, QUERIES)
    # The terms are bf16 products, good to about 2**-8.
    assert float(got.kl) == pytest.approx(float(kl), rel=0.02, abs=2e-3)
    assert float(got.spread) == pytest.approx(float(spread), abs=0.01)
    assert float(got.imbalance) == pytest.approx(float(imbalance), rel=0.03, abs=0.01)
    assert float(kl) > 0.01, "the case is not one where any indexer would do"


def test_gradients_agree_with_the_formula(given):
    ours, plain = tiny_indexers(1)[0].requires_grad_(True), tiny_indexers(1)[0].requires_grad_(True)
    for pick in (0, 1, 2):
        ours.zero_grad(), plain.zero_grad()
        loss = layer_loss(ours, given, QUERIES, ACTIVE)
        (loss.kl, loss.spread, loss.imbalance)[pick].backward()
        plain_loss(plain, given, QUERIES)[pick].backward()
        for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
            cosine = torch.nn.functional.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0)
            assert cosine > 0.98, (name, pick, float(cosine))
            assert float(a.grad.norm() / b.grad.norm()) == pytest.approx(1, abs=0.1)


def test_nothing_flows_into_the_model(given):
    hidden = given.hidden.clone().requires_grad_(True)
    watched = type(given)(given.layer, hidden, given.positions, given.q, given.k, given.v)
    layer_loss(tiny_indexers(1)[0].requires_grad_(True), watched, QUERIES, ACTIVE).kl.backward()
    assert hidden.grad is None


def test_later_tokens_do_not_matter(given):
    indexer = tiny_indexers(1)[0]
    early = QUERIES[QUERIES <= 40]
    cut = type(given)(given.layer, *(t[:41] for t in (given.hidden, given.positions, given.q, given.k, given.v)))
    whole, part = layer_loss(indexer, given, early, ACTIVE), layer_loss(indexer, cut, early, ACTIVE)
    assert float(whole.kl) == pytest.approx(float(part.kl), rel=1e-3)


def test_the_first_token_costs_nothing(given):
    assert float(layer_loss(tiny_indexers(1)[0], given, torch.tensor([0]), ACTIVE).kl) == pytest.approx(0, abs=1e-6)


def one_layer(weights):
    """An indexer whose heads are all the same but for their weights, which are ``weights`` for a hidden state of all ones."""
    indexer = tiny_indexers(1)[0]
    assert isinstance(indexer, Indexer)
    rows = indexer.wq_b.weight.data.view(INDEXER.num_heads, INDEXER.head_dim, -1)
    rows[:] = rows[:1].clone()
    indexer.weights_proj.weight.data = torch.tensor(weights)[:, None].expand(-1, INDEXER.hidden_size) / INDEXER.hidden_size
    return indexer


def test_spread_and_imbalance_at_their_extremes(given):
    heads = INDEXER.num_heads
    hidden = given.hidden.abs() + 0.1  # every head's weight has the sign of its row
    same = type(given)(given.layer, hidden, given.positions, given.q, given.k, given.v)
    flat = layer_loss(one_layer([1.0] * heads), same, QUERIES[2:], ACTIVE)
    assert float(flat.spread) == pytest.approx(1 - ACTIVE / heads, abs=1e-3)
    assert float(flat.imbalance) == pytest.approx(0, abs=1e-3)
    lone = layer_loss(one_layer([0.0] * 5 + [-1.0] + [0.0] * (heads - 6)), same, QUERIES[2:], ACTIVE)
    assert float(lone.spread) == pytest.approx(0, abs=1e-3)
    assert float(lone.imbalance) == pytest.approx(heads - 1, rel=1e-3)
    few = layer_loss(one_layer([1.0] * ACTIVE + [0.0] * (heads - ACTIVE)), same, QUERIES[2:], ACTIVE)
    assert float(few.spread) == pytest.approx(0, abs=1e-3)
    assert float(few.imbalance) == pytest.approx(heads / ACTIVE - 1, rel=1e-3)


def test_silent_heads_give_numbers_not_nans(given):
    silent = layer_loss(one_layer([0.0] * INDEXER.num_heads), given, QUERIES, ACTIVE)
    uniform = sum(
        float((p[p > 0] * (p[p > 0] * (row + 1)).log()).sum()) for row in QUERIES.tolist() for p in [plain_target(given, row)]
    ) / len(QUERIES)
    assert float(silent.kl) == pytest.approx(uniform, rel=1e-3)
    assert math.isfinite(float(silent.spread))
    assert math.isfinite(float(silent.imbalance))


def test_config_defaults_are_an_indexers():
    assert IndexerConfig(hidden_size=576).num_heads >= 32
