"""The whole demo on a tiny random model: what it writes, and what it counts as found."""

import dataclasses
import json
import shutil

import pytest
import torch

from thresher.cache.placement import Placement
from thresher.distributed import Single
from thresher.errors import ThresherError
from thresher.eval import demo
from thresher.eval.demo import Row, run_demo
from thresher.eval.needle import Needle
from thresher.models.checkpoint import save_indexers
from thresher.selectors import DSA

from ..models.tiny import CONFIG, tiny_indexers, tiny_model

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

LENGTHS, DEPTHS = (600, 1100), (0.9,)
ROWS = ["dense", "dsa", "misa", "misa_rerank", "hisa", "idsa", "random", "dsa_wide", "misa_static", "misa_random"]
FIELDS = ["found", "total", "recall", "recall_worst_layer", "chance", "mass", "tokens_read", "index_flops_ratio", "index_bytes_ratio"]


@pytest.fixture(scope="module")
def byte_tokenizer():
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return made


@pytest.fixture(scope="module")
def small(byte_tokenizer):
    """Stands in for SmolLM2: two layers, bytes as tokens."""
    config = dataclasses.replace(CONFIG, vocab_size=257, num_hidden_layers=2, max_position_embeddings=1280, eos_token_id=256)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "load_model", lambda dtype, device: tiny_model(config).to(device))
        patch.setattr(demo, "load_tokenizer", lambda: byte_tokenizer)
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_indexers(path, tiny_indexers(2), {"head_weights": [[float(head) for head in range(16)]] * 2})
    return path


@pytest.fixture(scope="module")
def ran(small, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "demo"
    return out, run_demo(str(out), LENGTHS, DEPTHS, weights=weights)


def test_everything_promised_is_written(ran):
    out, table = ran
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "metrics.json", "needle.png", "recall.png", "table.txt"]
    assert (out / "table.txt").read_text() == table + "\n"
    for picture in ("needle.png", "recall.png"):
        assert (out / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_metrics_have_every_row_and_field(ran):
    metrics = json.loads((ran[0] / "metrics.json").read_text())
    rows = metrics["selectors"]
    assert list(rows) == ROWS
    for name, row in rows.items():
        assert row.keys() >= set(FIELDS), name
        assert row["total"] == 2
        assert 0 <= row["found"] <= 2
        assert 0 <= row["recall_worst_layer"] <= row["recall"] <= 1
        assert 0 < row["mass"] <= 1 + 1e-6
    assert rows["dense"]["tokens_read"] == 1100
    assert rows["dsa"]["recall"] == rows["dsa"]["recall_worst_layer"] == 1
    assert rows["dsa"]["tokens_read"] == 512
    assert rows["dsa"]["chance"] == 512 / 1100
    assert rows["dsa"]["index_flops_ratio"] == rows["dsa"]["index_bytes_ratio"] == 1
    assert rows["idsa"]["index_flops_ratio"] == 1
    assert rows["misa"]["index_flops_ratio"] == pytest.approx((8 * 1100 + 16 * 18) / (16 * 1100))
    assert rows["random"]["recall"] == pytest.approx(512 / 1100, abs=0.1)
    assert len(metrics["cases"]) == len(ROWS) * 2
    assert {(case["length"], case["depth"]) for case in metrics["cases"]} == {(n, d) for n in LENGTHS for d in DEPTHS}
    assert all(isinstance(case["answer"], str) for case in metrics["cases"])
    assert all(len(line) == 2 for line in metrics["recall_by_layer"].values())


def test_config_is_enough_to_repeat_it(ran):
    config = json.loads((ran[0] / "config.json").read_text())
    assert (config["lengths"], config["depths"], config["topk"]) == ([600, 1100], [0.9], 512)
    assert config["selectors"]["1100"]["dsa"] == "dsa:topk=512"
    assert len(config["indexers_sha256"]) == 64


def test_an_earlier_run_is_kept_unless_told_otherwise(ran, weights, tmp_path):
    out = shutil.copytree(ran[0], tmp_path / "run")
    before = (out / "metrics.json").read_bytes()
    with pytest.raises(ThresherError, match="must be new or empty"):
        run_demo(str(out), LENGTHS, DEPTHS, weights=weights)
    assert (out / "metrics.json").read_bytes() == before
    run_demo(str(out), LENGTHS[1:], DEPTHS, overwrite=True, weights=weights)
    assert json.loads((out / "config.json").read_text())["lengths"] == [1100]


@pytest.mark.parametrize(("lengths", "depths"), [((), (0.1,)), ((1100,), ())])
def test_nothing_to_do_is_one_clear_line(small, weights, tmp_path, lengths, depths):
    with pytest.raises(ThresherError, match="needs a length and a depth"):
        run_demo(str(tmp_path / "new"), lengths, depths, weights=weights)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("lengths", "depths", "words"),
    [
        ((300,), (0.5,), "must exceed"),  # as long as what is kept: there would be nothing to recall
        ((-5, 1100), (0.5,), "length must exceed"),
        ((5000,), (0.5,), "must fit the model's 1280 tokens"),
        ((1100,), (1.5,), "depth must be between 0 and 1"),
        ((1100,), (float("nan"),), "depth must be between 0 and 1"),
    ],
)
def test_cases_that_cannot_be_asked_are_one_clear_line(small, weights, tmp_path, lengths, depths, words):
    with pytest.raises(ThresherError, match=words) as caught:
        run_demo(str(tmp_path / "new"), lengths, depths, weights=weights)
    assert "\n" not in str(caught.value)


class Script:
    """A decoder that says what it is told."""

    def __init__(self, tokenizer, text):
        self.ids, self.length, self.placement, self.model = tokenizer.encode(text).ids, 50, Placement(1), tiny_model()
        self.said, self.back = 0, []

    def generate(self, ids, plan, max_tokens, observer=None):
        for token in self.ids[:max_tokens]:
            self.said += 1
            yield token

    def rollback(self, length):
        self.back.append(length)


@pytest.mark.parametrize(
    ("text", "hit", "said"),
    [
        (" 48213. And then", True, 7),  # the full stop shows that the number is whole
        (" 482137 is the number", False, 16),
        (" 1 2 3 4 48213 5", True, 15),
        ("house is number 48213", False, 16),
        ("", False, 0),
    ],
)
def test_an_answer_is_read_until_it_is_settled(byte_tokenizer, text, hit, said):
    row, script, needle = Row(), Script(byte_tokenizer, text), Needle([1] * 50, [2, 3], "48213", 52, 0.5, (3, 9))
    with torch.inference_mode():
        demo._answer(script, [Single(DSA(4))], needle, row, byte_tokenizer, None)
    assert row.found == {(52, 0.5): hit}
    assert script.said == said
    assert script.back == [50], "the context is as it was for the next selector"
    assert len(row.seconds_per_token) == max(0, said - 1)
