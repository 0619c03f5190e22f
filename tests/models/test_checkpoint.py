"""Indexers on disk: the bits come back, and nothing damaged is loaded."""

import json
import os

import pytest
import torch

from thresher.errors import ThresherError
from thresher.models.checkpoint import SHIPPED, load_indexers, load_record, save_indexers
from thresher.models.smollm2 import CONFIG

from .tiny import tiny_indexers


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "indexers.safetensors"
    save_indexers(path, tiny_indexers(2), {"note": "misa†", "steps": 7})
    return path


def test_bits_and_record_come_back(saved):
    want, got = dict(tiny_indexers(2).named_parameters()), dict(load_indexers(saved).named_parameters())
    assert want.keys() == got.keys()
    for name, p in got.items():
        assert p.dtype == torch.float32
        assert not p.requires_grad
        assert torch.equal(p.to(torch.bfloat16).view(torch.int16), want[name].to(torch.bfloat16).view(torch.int16))
    record = load_record(saved)
    assert (record["note"], record["steps"], record["num_layers"], record["indexer"]["num_heads"]) == ("misa†", 7, 2, 16)
    assert sorted(os.listdir(saved.parent)) == ["indexers.json", "indexers.safetensors"]


def test_saving_what_was_loaded_gives_the_same_file(saved, tmp_path):
    again = tmp_path / "again.safetensors"
    save_indexers(again, load_indexers(saved), {})
    assert again.read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("place", [0, 9, 0.5, -1])
def test_one_flipped_bit_is_noticed(saved, place):
    data = bytearray(saved.read_bytes())
    data[int(place * len(data)) if isinstance(place, float) else place] ^= 1
    saved.write_bytes(data)
    with pytest.raises(ThresherError, match="sha256") as caught:
        load_indexers(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 100])
def test_a_cut_file_is_noticed(saved, size):
    saved.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(ThresherError, match="sha256"):
        load_indexers(saved)


def change(path, **changes):
    beside = path.with_suffix(".json")
    beside.write_text(json.dumps({**json.loads(beside.read_text()), **changes}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: p.unlink(), "must exist"),
        (lambda p: p.with_suffix(".json").unlink(), "must exist"),
        (lambda p: p.with_suffix(".json").write_text("{'sha256'"), "must be JSON"),
        (lambda p: p.with_suffix(".json").write_bytes(b"\xff\xfe{"), "must be JSON"),
        (lambda p: p.with_suffix(".json").write_text("[1, 2]"), "must name sha256"),
        (lambda p: p.with_suffix(".json").write_text('{"sha256": "0"}'), "must name sha256"),
        (lambda p: change(p, num_layers=3), "must fit the record's sizes"),
        (lambda p: change(p, num_layers=1), "must fit the record's sizes"),
        (lambda p: change(p, indexer={"hidden_size": 48, "num_heads": 8, "head_dim": 32, "q_rank": 64}), "must fit the record's sizes"),
    ],
)
def test_damage_is_one_clear_line(saved, spoil, words):
    spoil(saved)
    with pytest.raises(ThresherError, match=words) as caught:
        load_indexers(saved)
    assert "\n" not in str(caught.value)


def test_the_indexers_that_come_with_the_package():
    record, indexers = load_record(), load_indexers()
    assert SHIPPED.stat().st_size <= 24e6
    assert len(indexers) == CONFIG.num_hidden_layers
    config = indexers[0].config
    assert config.num_heads >= 32
    assert (config.head_dim, config.hidden_size, config.rope_theta) == (64, CONFIG.hidden_size, CONFIG.rope_theta)
    assert config.q_rank < config.hidden_size
    assert [len(row) for row in record["head_weights"]] == [config.num_heads] * len(indexers)
    recall = record["held_out"]["recall"]
    assert len(recall["dsa"]) == len(indexers)
    assert recall["dsa"] == [1.0] * len(indexers)
    assert {"misa", "misa_rerank", "hisa", "idsa", "random"} <= recall.keys()
    assert record["data"].keys() >= {"stdlib"}
