import pytest
import torch

from thresher.cache import LayerState
from thresher.distributed import IDSA, ExactMerge, Replicated, Single, expected_coverage, local_topk, run
from thresher.errors import ThresherError
from thresher.selectors import DSA, HISA, MISA, Dense, MISARerank, Oracle, Random, Shared, Window

from .cases import Layer, attention_over, plain_scores, sets_of

LENGTHS = [3, 0, 61, 140, 1]
RANKS = [1, 2, 3, 4, 7]
COARSE = [False, True]


@pytest.mark.parametrize("coarse", COARSE)
@pytest.mark.parametrize("granularity", [1, 3])
@pytest.mark.parametrize("ranks", RANKS)
def test_exact_merge_of_dsa_is_one_device_bit_for_bit(ranks, granularity, coarse):
    layer = Layer(LENGTHS, queries=20, coarse=coarse)
    for topk in (1, 8, 50, 200):
        want = DSA(topk).select(layer.query, layer.keys)
        got = ExactMerge(DSA(topk), ranks, granularity).select(layer.query, layer.keys)
        assert torch.equal(got.indices, want.indices)
        assert torch.equal(got.lengths, want.lengths)
        assert torch.equal(got.scores.view(torch.int32), want.scores.view(torch.int32))
        assert got.space == "logical"


def test_ties_are_really_there():
    layer = Layer(LENGTHS, queries=20, coarse=True)
    scores = plain_scores(layer, 3)
    assert len(set(scores)) < len(scores) / 2


@pytest.mark.parametrize("coarse", COARSE)
@pytest.mark.parametrize(("ranks", "granularity"), [(1, 1), (2, 1), (4, 3), (7, 1), (64, 1)])
def test_idsa_keeps_each_ranks_best(ranks, granularity, coarse):
    layer = Layer(LENGTHS, queries=12, coarse=coarse)
    over = IDSA(DSA(16), ranks, granularity=granularity)
    got = over.select(layer.query, layer.keys)
    assert over.budget == local_topk(16, ranks)
    assert got.topk == ranks * over.budget
    for row, chosen in enumerate(sets_of(got)):
        scores = plain_scores(layer, row)
        for rank in range(ranks):
            mine = [p for p in range(len(scores)) if p // granularity % ranks == rank]
            kept = chosen & set(mine)
            assert len(kept) == min(over.budget, len(mine))
            worst = min((scores[p] for p in kept), default=0.0)
            # fp32 sums may order near-equal fp64 scores otherwise.
            assert all(scores[p] <= worst + 1e-4 * (1 + abs(worst)) for p in set(mine) - kept)
            if coarse and kept and ranks == 1:
                assert kept == set(sorted(mine, key=lambda p: (-scores[p], p))[: over.budget])


def test_idsa_covers_what_the_rule_expects():
    k, ranks, length = 64, 4, 600
    layer = Layer([length], queries=40, seed=5)
    layer.query.positions.fill_(length - 1)
    want = sets_of(DSA(k).select(layer.query, layer.keys))
    for m in (16, 20, local_topk(k, ranks, 1e-4, length)):
        got = sets_of(IDSA(DSA(k), ranks, m).select(layer.query, layer.keys))
        share = sum(len(a & b) for a, b in zip(got, want, strict=True)) / (k * len(want))
        # One layer's keys are shared by 40 queries, hence the slack.
        assert share == pytest.approx(expected_coverage(k, ranks, m, length), abs=0.02)
    assert share == 1


def over_ranks():
    for ranks, granularity in ((1, 1), (2, 1), (3, 2), (7, 1)):
        for selector in (DSA(12), MISA(2, 8, 12), MISARerank(2, 8, 20, 12), HISA(4, 8, 12), Window(12), Random(12), Oracle(12), Dense()):
            yield IDSA(selector, ranks, granularity=granularity)
        for selector in (DSA(12), MISARerank(2, 8, 20, 12), HISA(4, 8, 12), Oracle(12), Dense()):
            yield ExactMerge(selector, ranks, granularity)
        for selector in (DSA(12), MISA(2, 8, 12), Oracle(12), Dense()):
            yield Replicated(selector, ranks)
    yield Single(DSA(12))
    yield Single(Oracle(12))


@pytest.mark.parametrize("over", list(over_ranks()), ids=str)
def test_merged_output_is_softmax_over_the_union(over):
    layer = Layer(LENGTHS, queries=10, seed=1)
    out, union = run(over, layer.query, layer.shards(over.placement), layer.attention)
    sets = sets_of(union)
    for row, chosen in enumerate(sets):
        assert all(p <= layer.query.positions[row] for p in chosen)
        assert len(chosen) <= (over.width or 10**9)
    torch.testing.assert_close(out.out.double(), attention_over(layer, sets), rtol=1e-5, atol=1e-5)
    empty = torch.tensor([not chosen for chosen in sets])
    assert (out.lse[empty] == float("-inf")).all()
    assert out.out[empty].count_nonzero() == 0
    again = over.select(layer.query, layer.keys, attention=layer.attention)
    assert sets_of(again) == sets


def test_a_rank_with_no_token_adds_nothing():
    layer = Layer([3], queries=3)
    over = IDSA(DSA(8), 7)
    shards = layer.shards(over.placement)
    part, picked = over.local_step(layer.query, shards[5], 5)
    assert picked.lengths.tolist() == [0, 0, 0]
    assert part.out.count_nonzero() == 0
    assert (part.lse == float("-inf")).all()


@pytest.mark.parametrize("ranks", [2, 5])
def test_candidates_and_owned_as_a_process_group_runs_them(ranks):
    layer = Layer(LENGTHS, queries=15, coarse=True)
    over = ExactMerge(DSA(10), ranks)
    shards = layer.shards(over.placement)
    gathered = [over.candidates(layer.query, shard, rank) for rank, shard in enumerate(shards)]
    scores, logical = torch.stack([g[0] for g in gathered]), torch.stack([g[1] for g in gathered])
    assert scores.shape == logical.shape == (ranks, 15, 10)
    assert logical.dtype == torch.int32
    want = sets_of(DSA(10).select(layer.query, layer.keys))
    for rank in range(ranks):
        owned = over.owned(scores, logical, rank)
        assert owned.space == "local"
        assert [{p * ranks + rank for p in row} for row in sets_of(owned)] == [{p for p in row if p % ranks == rank} for row in want]


def test_global_order_of_hostile_scores():
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor([[[0.0, inf, nan, 1.0]], [[-0.0, nan, -1e38, -inf]], [[1.0, 0.0, -inf, -inf]]])
    logical = torch.tensor([[[9, 3, 6, 12]], [[1, 4, 7, -1]], [[2, 5, -1, -1]]], dtype=torch.int32)
    # Best first: 3 (inf), 2 and 12 (1.0), then the zeros 1, 5, 9, then 7, then the NaNs 4 and 6.
    order = [3, 2, 12, 1, 5, 9, 7, 4, 6]
    for topk in range(1, 13):
        got = ExactMerge(DSA(topk), 3).merged(scores, logical)
        assert sets_of(got) == [set(order[:topk])]
        assert got.topk == topk


def test_every_rank_has_a_state_of_its_own():
    layer = Layer([64, 90], queries=8)
    over = IDSA(MISA(2, 4, 12), 3)
    shards = [type(s)(s.keys, LayerState(0), s.attend) for s in layer.shards(over.placement)]
    assert sets_of(run(over, layer.query, shards)[1]) == sets_of(over.select(layer.query, layer.keys))
    lengths = [s.state.block_means(4, None).update(s.keys).lengths.tolist() for s in shards]
    assert lengths == [[22 // 4, 30 // 4], [21 // 4, 30 // 4], [21 // 4, 30 // 4]]
    state = LayerState(2)
    over.select(layer.query, layer.keys, state)
    assert state == LayerState(2)


def test_shared_picks_the_same_tokens_wherever_they_live():
    layer = Layer([40], queries=5)
    state = LayerState(4)
    state.selections[1] = DSA(6).select(layer.query, layer.keys)
    for over in (IDSA(Shared(1), 3), ExactMerge(Shared(1), 3), Single(Shared(1))):
        assert over.select(layer.query, layer.keys, state) is state.selections[1]


@pytest.mark.parametrize("kind", [IDSA, ExactMerge])
def test_rows_do_not_depend_on_the_batch(kind):
    layer = Layer(LENGTHS, queries=8, coarse=True)
    over = kind(DSA(10), 3)
    whole = over.select(layer.query, layer.keys)
    for row in range(8):
        alone = over.select(layer.query.rows(torch.tensor([row])), layer.keys)
        assert torch.equal(alone.indices[0], whole.indices[row])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: IDSA(DSA(12), 0), "ranks must be at least 1"),
        (lambda: IDSA(DSA(12), 2, granularity=0), "granularity must be at least 1"),
        (lambda: IDSA(DSA(12), 2, 5), r"local_topk must lie in \[6, 12\], so that 2 ranks hold topk=12 tokens; got 5"),
        (lambda: IDSA(DSA(12), 2, 13), "local_topk must lie in"),
        (lambda: ExactMerge(DSA(12), 0), "ranks must be at least 1"),
        (lambda: Replicated(DSA(12), 0), "ranks must be at least 1"),
        (lambda: ExactMerge(DSA(12), 2, 0), "granularity must be at least 1"),
        (lambda: ExactMerge(Window(4), 2).select(Layer([9]).query, Layer([9]).keys), "needs a selector that returns scores; got Window"),
        (lambda: run(IDSA(DSA(12), 2), Layer([9]).query, []), "one shard for each of the 2 ranks; got 0"),
        (lambda: run(Single(DSA(12)), Layer([9]).query, []), "one shard for each of the 1 ranks; got 0"),
    ],
)
def test_bad_calls_give_one_line(call, words):
    with pytest.raises(ThresherError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
