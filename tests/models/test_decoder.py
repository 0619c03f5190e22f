"""The paged decoder against a forward pass that holds everything at once: dense, sparse, dealt over ranks, rolled back."""

import pytest
import torch
from torch.nn import functional as F

from thresher.cache.placement import Placement
from thresher.distributed import IDSA, ExactMerge, Single
from thresher.errors import ThresherError
from thresher.models.decoder import Decoder
from thresher.models.llama import causal_attention
from thresher.selectors import DSA, HISA, MISA, Dense, LayerPlan, MISARerank, Oracle, Random, Shared, Window

from .tiny import CONFIG, dense_logits, tiny_indexers, tiny_model, tokens

CONTEXT, STEP = 150, 6
IDS = tokens(CONTEXT + 40)
NEW = IDS[CONTEXT : CONTEXT + STEP]
LAYERS = CONFIG.num_hidden_layers
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def indexers():
    return tiny_indexers()


@pytest.fixture
def decoder(model, indexers):
    made = Decoder(model, indexers)
    made.prefill(IDS[:CONTEXT])
    return made


def everywhere(method):
    return [method] * LAYERS


def chosen(decoder):
    """Per layer and new token, the logical positions attended to in the last step, over all ranks."""
    layers = []
    for layer, pieces in enumerate(decoder.layers):
        rows: list[set[int]] = []
        for rank, piece in enumerate(pieces):
            picked = piece.state.selections[layer].indices.long()
            logical = decoder.placement.to_logical(rank, picked).tolist()
            rows = rows or [set() for _ in logical]
            for row, positions in zip(rows, logical, strict=True):
                new = {p for p in positions if p >= 0}
                assert not row & new, "a token lives on one rank only"
                row |= new
        layers.append(rows)
    return layers


def masked_logits(model, ids, sets):
    """One pass over all of ``ids``: dense rows first, and the last rows attending to ``sets[layer][row]`` alone."""
    count = len(ids)

    def attend(given):
        mask = torch.ones(count, count, dtype=torch.bool).tril()
        for row, allowed in enumerate(sets[given.layer], start=count - len(sets[given.layer])):
            mask[row] = False
            mask[row, sorted(allowed)] = True
        q, k, v = (t.transpose(0, 1).double() for t in (given.q, given.k, given.v))
        groups = q.shape[0] // k.shape[0]
        out = F.scaled_dot_product_attention(q, k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0), mask)
        return out.transpose(0, 1).to(given.q.dtype)

    return model.logits(model(ids, torch.arange(count), attend))[-len(sets[0]) :]


class Watch:
    """Keeps what an observer is shown."""

    def __init__(self):
        self.seen = []

    def look(self, layer, query, keys, attention, state=None):
        self.seen.append((layer, query, keys, attention, attention.load_keys(0), state))


def test_prefill_gives_the_dense_logits(model, indexers):
    got = Decoder(model, indexers).prefill(IDS[:CONTEXT])
    torch.testing.assert_close(got, dense_logits(model, IDS[:CONTEXT])[-1], **CLOSE)


@pytest.mark.parametrize("parts", [[40], [1] * 12, [1, 17, 3]])
def test_steps_under_dense_are_one_dense_pass(model, decoder, parts):
    want, start, rows = dense_logits(model, IDS), CONTEXT, []
    for part in parts:
        rows.append(decoder.step(IDS[start : start + part], everywhere(Single(Dense()))))
        start += part
    torch.testing.assert_close(torch.cat(rows), want[CONTEXT:start], rtol=1e-4, atol=1e-4)
    assert decoder.length == start


def test_a_request_can_start_with_a_step(model, indexers):
    got = Decoder(model, indexers).step(IDS[:30], everywhere(Single(Dense())))
    torch.testing.assert_close(got, dense_logits(model, IDS[:30]), rtol=1e-4, atol=1e-4)


def test_dsa_with_room_for_everything_is_dense_bit_for_bit(decoder):
    dense = decoder.step(NEW, everywhere(Single(Dense())))
    for topk in (CONTEXT + STEP, 400):
        decoder.rollback(CONTEXT)
        assert torch.equal(decoder.step(NEW, everywhere(Single(DSA(topk)))), dense)
    decoder.rollback(CONTEXT)
    assert not torch.equal(decoder.step(NEW, everywhere(Single(DSA(20)))), dense)


SPARSE = {
    "dsa": DSA(24),
    "misa": MISA(4, 16, 24),
    "misa_rerank": MISARerank(3, 16, 48, 24),
    "hisa": HISA(8, 6, 24),
    "window": Window(24, 2),
    "random": Random(24),
    "oracle": Oracle(24),
}


@pytest.mark.parametrize("name", SPARSE)
def test_a_sparse_step_attends_to_its_sets_and_nothing_else(model, decoder, name):
    got = decoder.step(NEW, everywhere(Single(SPARSE[name])))
    sets = chosen(decoder)
    assert all(len(row) == 24 for rows in sets for row in rows)
    torch.testing.assert_close(got, masked_logits(model, IDS[: CONTEXT + STEP], sets), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SPARSE)
def test_token_by_token_picks_what_one_step_picks(decoder, name):
    plan = everywhere(Single(SPARSE[name]))
    together, sets = decoder.step(NEW, plan), chosen(decoder)
    decoder.rollback(CONTEXT)
    for row in range(STEP):
        alone = decoder.step(NEW[row : row + 1], plan)
        assert [layer[0] for layer in chosen(decoder)] == [layer[row] for layer in sets]
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dsa", "misa", "hisa"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_rollback_and_the_same_tokens_give_the_same_bits(decoder, name, ranks):
    method = Single(SPARSE[name]) if ranks == 1 else IDSA(SPARSE[name], ranks)
    other = decoder if ranks == 1 else decoder.dealt(Placement(ranks))
    plan = everywhere(method)
    first = other.step(IDS[CONTEXT : CONTEXT + 40], plan)
    other.rollback(CONTEXT + 11)
    other.step(tokens(50, seed=9), plan)  # another future, into other pages
    other.rollback(CONTEXT)
    assert other.length == CONTEXT
    assert torch.equal(other.step(IDS[CONTEXT : CONTEXT + 40], plan), first)


def test_pages_are_given_back_and_used_again(decoder):
    table = decoder.tables[0]
    before, held = table.num_free, table.table[0].tolist()
    plan = everywhere(Single(Dense()))
    for _ in range(5):
        decoder.step(tokens(100, seed=4), plan)
        assert table.num_free == before - 1
        decoder.rollback(CONTEXT)
        assert table.num_free == before
        assert [p for p in table.table[0].tolist() if p >= 0] == [p for p in held if p >= 0]


def test_a_request_rolled_back_to_nothing_is_a_new_one(model, decoder, indexers):
    decoder.rollback(0)
    other = tokens(70, seed=11)
    assert torch.equal(decoder.prefill(other), Decoder(model, indexers).prefill(other))


@pytest.mark.parametrize("granularity", [1, 5])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_dealing_out_changes_nothing_that_should_not_change(decoder, ranks, granularity):
    placement = Placement(ranks, granularity)
    dense = decoder.step(NEW, everywhere(Single(Dense())))
    decoder.rollback(CONTEXT)
    sparse, sets = decoder.step(NEW, everywhere(Single(DSA(24)))), chosen(decoder)
    decoder.rollback(CONTEXT)
    other = decoder.dealt(placement)
    held = [sum(p // granularity % ranks == r for p in range(CONTEXT)) for r in range(ranks)]
    assert [t.length(0) for t in other.tables.values()] == held
    for method in (IDSA(Dense(), ranks, granularity=granularity), ExactMerge(Dense(), ranks, granularity)):
        torch.testing.assert_close(other.step(NEW, everywhere(method)), dense, **CLOSE)
        other.rollback(CONTEXT)
    for method in (IDSA(DSA(400), ranks, granularity=granularity), ExactMerge(DSA(400), ranks, granularity)):
        torch.testing.assert_close(other.step(NEW, everywhere(method)), dense, **CLOSE)
        other.rollback(CONTEXT)
    got = other.step(NEW, everywhere(ExactMerge(DSA(24), ranks, granularity)))
    assert chosen(other) == sets
    torch.testing.assert_close(got, sparse, **CLOSE)
    assert decoder.length == CONTEXT, "the one-rank decoder is left as it was"


@pytest.mark.parametrize("kind", [IDSA, ExactMerge])
@pytest.mark.parametrize("name", ["dsa", "hisa", "misa", "misa_rerank"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_attend_to_the_union_of_their_sets(model, decoder, kind, name, ranks):
    method = kind(SPARSE[name], ranks)
    other, watch = decoder.dealt(method.placement), Watch()
    got = other.step(NEW, everywhere(method))
    sets = chosen(other)
    torch.testing.assert_close(got, masked_logits(model, IDS[: CONTEXT + STEP], sets), rtol=1e-4, atol=1e-4)
    # The first layer's inputs are the same whatever is attended to, so there the union made for measuring must be this one.
    decoder.step(NEW, everywhere(Single(Dense())), watch)
    _, query, keys, attention, _, _ = watch.seen[0]
    measured = method.select(query, keys, None, attention)
    assert [{p for p in row if p >= 0} for row in measured.indices.tolist()] == sets[0]


@pytest.mark.parametrize("ranks", [1, 3])
def test_layers_that_share_an_earlier_set(model, decoder, ranks):
    layers = LayerPlan.from_text("0=dsa:topk=24;1-2=shared:layer=0", LAYERS)
    plan = [IDSA(s, ranks, 16 if s.topk else None) if ranks > 1 else Single(s) for s in layers]
    other = decoder.dealt(Placement(ranks)) if ranks > 1 else decoder
    for start in (CONTEXT, CONTEXT + STEP):
        got = other.step(IDS[start : start + STEP], plan)
        sets = chosen(other)
        assert sets[0] == sets[1] == sets[2]
        if start == CONTEXT:
            torch.testing.assert_close(got, masked_logits(model, IDS[: CONTEXT + STEP], sets), rtol=1e-4, atol=1e-4)


def test_hybrid_plans_use_each_layers_own(model, decoder):
    plan = [Single(s) for s in (Dense(), DSA(10), Window(6, 1))]
    got = decoder.step(NEW, plan)
    sets = chosen(decoder)
    assert [[len(row) for row in rows] for rows in sets] == [list(range(CONTEXT + 1, CONTEXT + STEP + 1)), [10] * STEP, [6] * STEP]
    torch.testing.assert_close(got, masked_logits(model, IDS[: CONTEXT + STEP], sets), rtol=1e-4, atol=1e-4)


def test_an_observer_sees_every_layer_and_changes_nothing(model, decoder):
    plan = everywhere(Single(HISA(8, 6, 24)))
    blind = decoder.step(NEW, plan)
    decoder.rollback(CONTEXT)
    watch = Watch()
    assert torch.equal(decoder.step(NEW, plan, watch), blind)
    assert [entry[0] for entry in watch.seen] == list(range(LAYERS))
    for layer, query, keys, attention, loaded, state in watch.seen:
        assert query.positions.tolist() == list(range(CONTEXT, CONTEXT + STEP))
        assert keys.lengths.tolist() == [CONTEXT + STEP]
        assert attention.q.shape == (STEP, 6, 16)
        assert loaded.shape == (CONTEXT + STEP, 2, 16)
        assert state.layer == layer
    first = []
    model(IDS[: CONTEXT + STEP], torch.arange(CONTEXT + STEP), lambda given: first.append(given.k) or causal_attention(given))
    torch.testing.assert_close(watch.seen[0][4], first[0], **CLOSE)


def test_whole_keys_are_in_position_order_over_ranks(decoder):
    one, many = decoder._whole_keys(1)(0), decoder.dealt(Placement(3, 2))._whole_keys(1)(0)
    assert torch.equal(one, many)


def test_generate_is_greedy_and_stops(model, decoder):
    plan = everywhere(Single(Dense()))
    got = list(decoder.generate(NEW, plan, 5))
    ids = [*IDS[: CONTEXT + STEP].tolist()]
    for token in got:
        assert token == int(dense_logits(model, torch.tensor(ids))[-1].argmax())
        ids.append(token)
    assert len(got) == 5 or got == [] or int(dense_logits(model, torch.tensor(ids))[-1].argmax()) == CONFIG.eos_token_id


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda d: d.prefill(IDS[:3]), "prefill starts a request"),
        (lambda d: d.step(NEW, [Single(DSA(9))]), "the plan must name 3 layers; got 1"),
        (lambda d: d.step(NEW, everywhere(IDSA(DSA(9), 2))), "placement must be the decoder's"),
        (lambda d: d.dealt(Placement(2)).step(NEW, everywhere(Single(DSA(9)))), "placement must be the decoder's"),
        (lambda d: d.dealt(Placement(2)).step(NEW, everywhere(IDSA(DSA(9), 2, granularity=4))), "placement must be the decoder's"),
        (lambda d: d.dealt(Placement(2)).dealt(Placement(1)), "only a one-rank decoder"),
        (lambda d: d.step(tokens(400), everywhere(Single(Dense()))), "must fit the model's 512 tokens; got 550"),
        (lambda d: d.rollback(CONTEXT + 1), r"must lie in \[0, 150\]; got 151"),
        (lambda d: d.rollback(-1), r"must lie in \[0, 150\]; got -1"),
        (lambda d: d.step(NEW, everywhere(Single(MISA(17, 16, 9)))), "active_heads must be at most the query's 16 heads; got 17"),
        (lambda d: d.step(NEW, everywhere(Single(Shared(1)))), r"Shared\(layer=1\) needs that layer's selection"),
    ],
)
def test_mistakes_are_one_clear_line(decoder, call, words):
    with pytest.raises(ThresherError, match=words) as caught:
        call(decoder)
    assert "\n" not in str(caught.value)


def test_no_text_or_too_much_of_it(model, indexers):
    with pytest.raises(ThresherError, match="must hold a token"):
        Decoder(model, indexers).prefill(IDS[:0])
    with pytest.raises(ThresherError, match="must fit the model's 20 tokens; got 21"):
        Decoder(model, indexers, capacity=20).prefill(IDS[:21])
    full = Decoder(model, indexers, capacity=20)
    full.prefill(IDS[:20])
    before = full.length
    with pytest.raises(ThresherError, match="must fit"):
        full.step(IDS[20:21], everywhere(Single(Dense())))
    assert full.length == before, "a refused step changes nothing"


def test_a_nan_in_the_model_is_one_clear_line(indexers):
    broken = tiny_model()
    broken.embed.weight[int(IDS[5])] = float("nan")
    with pytest.raises(ThresherError, match="index keys must be finite") as caught:
        Decoder(broken, indexers).prefill(IDS[:CONTEXT])
    assert "\n" not in str(caught.value)
