"""The indexer's queries and keys against the paper's formula in fp64, before and after quantisation."""

import pytest
import torch

from thresher.cache.index_keys import pack_keys
from thresher.errors import ThresherError
from thresher.ops.index_score import paged_index_score
from thresher.ops.quantize import dequantize_fp8

from .tiny import INDEXER, index_parts, index_scores, tiny_indexers


@pytest.fixture(scope="module")
def case():
    made = torch.Generator().manual_seed(0)
    positions = torch.cat([torch.arange(40), torch.tensor([500, 8000])])
    return tiny_indexers(1)[0], torch.randn(42, INDEXER.hidden_size, generator=made), positions


def test_queries_and_keys_before_quantisation(case):
    indexer, hidden, positions = case
    q, w, k = index_parts(indexer, hidden, positions)
    got_q, got_w = indexer.queries(hidden, positions)
    # Far positions cost angle precision: 8000 radians in fp32 are good to about 5e-4.
    torch.testing.assert_close(got_q.double(), q, rtol=1e-4, atol=2e-3)
    torch.testing.assert_close(got_q[:40].double(), q[:40], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_w.double(), w, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(indexer.keys(hidden, positions)[:40].double(), k[:40], rtol=1e-5, atol=2e-5)


def test_scores_of_what_is_served_agree_with_the_formula(case):
    indexer, hidden, positions = case
    hidden, positions = hidden[:40], positions[:40]
    query = indexer.index_query(hidden, positions)
    values, scales = indexer.index_keys(hidden, positions)
    assert values.dtype == query.q.dtype == torch.float8_e4m3fn
    assert query.requests.tolist() == [0] * 40
    want = index_scores(indexer, hidden, positions).tril()
    got = paged_index_score(query, pack_keys([(values, scales)])).double().tril().nan_to_num(neginf=0)
    assert (got - want).norm() < 0.05 * want.norm()
    # Hadamard and quantisation are the only differences: with them undone by hand the scores are the served ones.
    k = dequantize_fp8(values, scales).double()
    by_hand = sum(query.weights[:, j, None].double() * (query.q[:, j].double() @ k.T).relu() for j in range(INDEXER.num_heads))
    torch.testing.assert_close(got, by_hand.tril(), rtol=1e-5, atol=1e-6)


def test_a_row_depends_on_its_own_token_alone(case):
    indexer, hidden, positions = case
    values, scales = indexer.index_keys(hidden, positions)
    alone = [indexer.index_keys(hidden[i : i + 1], positions[i : i + 1]) for i in range(10)]
    # Other shapes of matmul may round otherwise, so a few of the values may land one e4m3 step away.
    same = torch.cat([v.view(torch.uint8) for v, _ in alone]) == values[:10].view(torch.uint8)
    assert same.double().mean() > 0.98
    assert torch.equal(torch.cat([s for _, s in alone]), scales[:10])


def test_requests_are_kept(case):
    indexer, hidden, positions = case
    requests = torch.arange(42) % 3
    query = indexer.index_query(hidden, positions, requests)
    assert query.requests.tolist() == requests.tolist()
    assert query.positions.tolist() == positions.tolist()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_broken_hidden_states_are_one_clear_line(case, poison):
    indexer, hidden, positions = case
    broken = hidden.clone()
    broken[7, 3] = poison
    with pytest.raises(ThresherError, match="index keys must be finite") as caught:
        indexer.index_keys(broken, positions)
    assert "\n" not in str(caught.value)
    with pytest.raises(ThresherError, match="finite") as caught:
        indexer.index_query(broken, positions)
    assert "\n" not in str(caught.value)
