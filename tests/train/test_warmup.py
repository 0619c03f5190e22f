"""The training loop on a tiny model: it learns, it stops in time, and what was stopped goes on as if it had not been."""

import dataclasses
import itertools
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from thresher.errors import ThresherError
from thresher.train import warmup
from thresher.train.config import WarmupConfig
from thresher.train.data import Corpus
from thresher.train.held_out import evaluate, mean_head_weights
from thresher.train.initial import new_indexers
from thresher.train.warmup import accumulate, learning_rate, sample_queries, train

from ..models.tiny import INDEXER, index_parts, layer_inputs, tiny_indexers, tiny_model, tokens

CONFIG = WarmupConfig(
    steps=10, sequences=1, length=220, queries=44, lr=2e-3, warmup_steps=3, active_heads=4, copies=2, planted=0.5, numbers=0.5
)


def corpus(config=CONFIG):
    return Corpus({"a": tokens(3000), "b": tokens(4000, seed=8)}, config, torch.arange(10, 20))


def learn(indexers, run, config=CONFIG, **options):
    seen = []
    done = train(tiny_model(), indexers, corpus(config), config, run, seen.append, **options)
    return done, seen


def test_learning_rate_grows_then_falls_to_a_twentieth():
    config = WarmupConfig()
    rates = [learning_rate(config, step) for step in range(config.steps)]
    top = config.warmup_steps - 1
    assert rates[0] == pytest.approx(config.lr / config.warmup_steps, rel=1e-3)
    assert all(a < b for a, b in itertools.pairwise(rates[: top + 1]))
    assert all(a > b for a, b in itertools.pairwise(rates[top:]))
    assert 0.98 * config.lr < max(rates) <= config.lr
    assert rates[config.steps // 2] == pytest.approx(config.lr * 0.525, rel=1e-3)
    assert rates[-1] == pytest.approx(config.lr / 20, rel=1e-3)


def test_queries_lie_one_in_each_equal_part():
    rng = np.random.default_rng(0)
    drawn = torch.stack([sample_queries(CONFIG, rng) for _ in range(200)])
    part = CONFIG.length // CONFIG.queries
    assert (drawn // part == torch.arange(CONFIG.queries)).all()
    assert {int(x) for x in (drawn % part).flatten()} == set(range(part))


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_thirty_steps_lower_what_they_are_asked_to_lower(tmp_path, spread):
    config = dataclasses.replace(CONFIG, steps=30, lr=1e-2, spread=spread, balance=0.0, queries=110, planted=0.0)
    indexers = new_indexers(INDEXER, tiny_model(), 0, "attention")
    unseen, places = tokens(220, seed=77), torch.arange(5, 220, 5)
    before = accumulate(tiny_model(), indexers, unseen, places, config)
    done, seen = learn(indexers, tmp_path / "run", config)
    after = accumulate(tiny_model(), indexers, unseen, places, config)
    assert done == 30
    if spread:
        assert (after[1] < 0.8 * before[1]).all(), "the heads are set apart, in every layer"
    else:
        assert (after[0] < 0.85 * before[0]).all(), "KL, in every layer"
    assert [line.step for line in seen] == [20]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 30]
    assert all(len(line[name]) == 3 for line in lines for name in ("kl", "spread", "imbalance"))
    assert seen[0].kl == pytest.approx(sum(lines[0]["kl"]) / 3)
    assert lines[1]["lr"] == pytest.approx(learning_rate(config, 29))


def test_the_model_is_frozen(tmp_path):
    model = tiny_model()
    train(model, new_indexers(INDEXER, model, 0, "attention"), corpus(), dataclasses.replace(CONFIG, steps=2), tmp_path, lambda line: None)
    for (name, p), q in zip(model.named_parameters(), tiny_model().parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.grad is None


def test_gradients_of_layers_do_not_mix():
    """A layer's gradient is that of its own loss: the same whatever the other layers' indexers are."""

    def gradient(seed_of_others):
        one, other = new_indexers(INDEXER, tiny_model(), 0, "attention"), new_indexers(INDEXER, tiny_model(), seed_of_others, "attention")
        mixed = torch.nn.ModuleList([other[0], one[1], other[2]])
        accumulate(tiny_model(), mixed, tokens(100), torch.arange(0, 100, 7), CONFIG)
        return [p.grad for p in mixed[1].parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradient(0), gradient(5), strict=True))


def test_sequences_of_a_step_are_averaged():
    sums = []
    for sequences in (1, 2):
        indexers = new_indexers(INDEXER, tiny_model(), 0, "attention")
        for _ in range(sequences):
            accumulate(tiny_model(), indexers, tokens(100), torch.arange(0, 100, 7), dataclasses.replace(CONFIG, sequences=sequences))
        sums.append([p.grad for p in indexers.parameters()])
    for a, b in zip(*sums, strict=True):
        torch.testing.assert_close(a, b)


def fresh(seed=0):
    return new_indexers(INDEXER, tiny_model(), seed, "attention")


@pytest.fixture
def ticking(monkeypatch):
    """Each look at the clock takes a second: one before the loop, one before each step."""
    with monkeypatch.context() as patch:
        patch.setattr(warmup, "time", SimpleNamespace(monotonic=itertools.count().__next__))
        yield


def files_of(run):
    return sorted(os.listdir(run))


def assert_same(one, other, within=1e-6):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert float((a - b).detach().abs().max()) <= within, name


@pytest.mark.slow
def test_stopped_and_resumed_is_as_if_it_had_run_straight_on(tmp_path, ticking):
    straight, halted, resumed = fresh(), fresh(), fresh(123)  # other weights, to be replaced by the saved ones
    assert learn(straight, tmp_path / "straight")[0] == 10
    assert learn(halted, tmp_path / "halted", seconds=6)[0] == 5
    assert files_of(tmp_path / "halted") == ["log.jsonl", "state.safetensors"], "no temporary file is left"
    assert learn(resumed, tmp_path / "halted")[0] == 10
    assert_same(straight, resumed)
    assert not torch.equal(straight[0].wk.weight, halted[0].wk.weight)
    lines = [json.loads(line) for line in (tmp_path / "halted" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10]
    assert files_of(tmp_path / "halted") == ["log.jsonl", "state.safetensors"]


def test_a_run_that_died_goes_on_from_its_last_save(tmp_path, monkeypatch):
    straight, died, resumed = fresh(), fresh(), fresh(123)
    assert learn(straight, tmp_path / "straight")[0] == 10
    calls = itertools.count(1)

    def unplugged(*arguments):
        if next(calls) == 8:
            raise RuntimeError("power cut")
        return accumulate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(warmup, "SAVED_EVERY", 4)
        patch.setattr(warmup, "LOGGED_EVERY", 3)
        patch.setattr(warmup, "accumulate", unplugged)
        with pytest.raises(RuntimeError, match="power cut"):
            learn(died, tmp_path / "died")
    log = tmp_path / "died" / "log.jsonl"
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [3, 6]
    assert learn(resumed, tmp_path / "died")[0] == 10
    assert_same(straight, resumed)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == [3, 10], "what was logged past the save is dropped"


def test_a_finished_run_is_left_as_it_is(tmp_path):
    config = dataclasses.replace(CONFIG, steps=2)
    first, again = fresh(), fresh(9)
    learn(first, tmp_path, config)
    log = (tmp_path / "log.jsonl").read_text()
    assert learn(again, tmp_path, config) == (2, [])
    assert_same(first, again, within=0)
    assert (tmp_path / "log.jsonl").read_text() == log


def test_a_state_of_other_settings_is_refused(tmp_path):
    learn(fresh(), tmp_path, dataclasses.replace(CONFIG, steps=1))
    before = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(ThresherError) as caught:
        learn(fresh(), tmp_path, dataclasses.replace(CONFIG, steps=1, seed=5))
    assert "\n" not in str(caught.value)
    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_a_failed_save_leaves_the_last_one(tmp_path, monkeypatch, ticking):
    learn(fresh(), tmp_path, seconds=2)
    kept = (tmp_path / "state.safetensors").read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        learn(fresh(), tmp_path, seconds=2)
    assert (tmp_path / "state.safetensors").read_bytes() == kept


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"sequences": 0}, "sequences must be at least 1"),
        ({"queries": 0}, "queries must be at least 1"),
        ({"queries": 221}, "queries must be at most the length, 220; got 221"),
        ({"warmup_steps": 0}, "warmup_steps must be at least 1"),
        ({"active_heads": 0}, "active_heads must be at least 1"),
        ({"planted": 1.5}, "planted must be between 0 and 1"),
        ({"numbers": -0.1}, "numbers must be between 0 and 1"),
        ({"numbers": float("nan")}, "numbers must be between 0 and 1"),
        ({"start": "warm"}, "start must be one of random, attention; got 'warm'"),
    ],
)
def test_settings_that_cannot_be_are_one_clear_line(changes, words):
    with pytest.raises(ThresherError, match=words) as caught:
        dataclasses.replace(CONFIG, **changes)
    assert "\n" not in str(caught.value)


def test_mean_head_weights_by_hand():
    model, indexers, sequences = tiny_model(), tiny_indexers(), [tokens(30), tokens(30, seed=5)]
    got = mean_head_weights(model, indexers, sequences)
    assert [len(row) for row in got] == [16, 16, 16]
    for layer in range(3):
        want = torch.zeros(16, dtype=torch.float64)
        for ids in sequences:
            given = layer_inputs(model, ids)[layer]
            q, w, _ = index_parts(indexers[layer], given.hidden, given.positions)
            want += (w.abs() * q.norm(dim=-1)).mean(0) / 2
        # The stored weight is |w| times the query's scale, a power of two near its largest entry: alike up to a factor.
        ratio = torch.tensor(got[layer]) / want
        assert float(ratio.max() / ratio.min()) < 3
        assert math.isfinite(float(ratio.sum()))


def test_held_out_figures():
    model = tiny_model(dataclasses.replace(tiny_model().config, max_position_embeddings=1024, num_hidden_layers=2))
    indexers = tiny_indexers(2)
    weights = mean_head_weights(model, indexers, [tokens(700)])
    got = evaluate(model, indexers, [tokens(700)], weights)
    assert got["recall"]["dsa"] == [1.0, 1.0]
    for kind in ("recall", "mass"):
        for rows in got[kind].values():
            assert len(rows) == 2
            assert all(0 <= value <= 1 for value in rows)
    assert all(value == pytest.approx(512 / 700, abs=0.05) for value in got["recall"]["random"])
    for name, rows in got["mass"].items():
        assert all(top >= value - 1e-6 for top, value in zip(got["mass"]["oracle"], rows, strict=True) if name != "idsa"), name
