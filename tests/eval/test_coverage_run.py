"""``thresher eval coverage``: its texts, the whole command on a tiny model and on the shipped one, recorded scores, and mistakes."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from thresher import cli
from thresher.bench.recording import recorded_tensors
from thresher.cache import pack_keys
from thresher.cache.placement import Placement
from thresher.distributed import IDSA, Single, local_topk
from thresher.errors import ThresherError
from thresher.eval import coverage_run
from thresher.eval.coverage import measure, placements
from thresher.eval.coverage_error import local_budgets
from thresher.eval.coverage_run import LAST, Settings, read_layers, run_coverage
from thresher.eval.coverage_texts import TEXTS, period_of, table_text, text_ids
from thresher.eval.plots import error_by_budget, missing_by_ranks
from thresher.models.checkpoint import load_indexers, save_indexers
from thresher.models.decoder import Decoder
from thresher.models.smollm2 import load_tokenizer
from thresher.selectors import DSA, Dense
from thresher.types import Selection

from ..models.tiny import CONFIG, layer_inputs, tiny_indexers, tiny_model, tokens

ROOT = Path(__file__).parents[2]

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def byte_tokenizer():
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return made


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_the_same_every_time_and_as_long_as_asked(byte_tokenizer, name):
    for length, k in ((700, 100), (64, 8), (130, 2)):
        ids = text_ids(byte_tokenizer, name, length, k)
        assert len(ids) == length
        assert ids == text_ids(byte_tokenizer, name, length, k)
        period = period_of(name, length, k)
        if period is not None:
            assert ids[period:] == ids[:-period]
    assert period_of("short_period", 700, 100) == 7


def test_the_table_has_rows_alike_in_width():
    lines = table_text(500).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(set(lines)) == len(lines)


def test_rows_of_numbers_are_a_period_of_the_shipped_model():
    pytest.importorskip("gguf")
    ids = text_ids(load_tokenizer(), "numbers", 640, 80)
    ends = [i for i, token in enumerate(ids) if token == ids[31]]
    assert ends == list(range(31, 640, 32))
    assert len({tuple(ids[i : i + 32]) for i in range(0, 640, 32)}) == 20, "only the layout repeats, not what is in it"


def stand_in(patch, tokenizer):
    """For SmolLM2: two layers, bytes as tokens."""
    config = dataclasses.replace(CONFIG, vocab_size=257, num_hidden_layers=2, eos_token_id=256)
    patch.setattr(coverage_run, "load_model", lambda dtype, device: tiny_model(config).to(device))
    patch.setattr(coverage_run, "load_tokenizer", lambda: tokenizer)
    return tiny_model(config)


@pytest.fixture
def small(monkeypatch, byte_tokenizer):
    return stand_in(monkeypatch, byte_tokenizer)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_indexers(path, tiny_indexers(2), {})
    return path


SMALL = Settings(length=200, topk=24, queries=40, ranks=(2, 8), granularity=(1, 16), texts=("prose", "short_period"))
WAYS = ["dense", "dsa", *(f"m={m}" for m in local_budgets(24, 8, local_topk(24, 8, 1e-4, 200)))]


@pytest.fixture(scope="module")
def ran(byte_tokenizer, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "coverage"
    user = out.parent / "mine.txt"
    user.write_text("ab" * 100, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch, byte_tokenizer)
        return out, run_coverage(str(out), dataclasses.replace(SMALL, files=[str(user)]), weights=weights)


def test_everything_promised_is_written(ran):
    out, table = ran
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "coverage.png", "error.png", "metrics.json", "table.txt"]
    assert (out / "table.txt").read_text() == table + "\n"
    for picture in ("coverage.png", "error.png"):
        assert (out / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    config = json.loads((out / "config.json").read_text())
    assert (config["length"], config["topk"], config["texts"]) == (200, 24, ["prose", "short_period"])
    assert set(config["tokens_sha256"]) == {"prose", "short_period", "mine.txt"}


def test_the_figures_of_a_run(ran, small, weights, byte_tokenizer):
    metrics = json.loads((ran[0] / "metrics.json").read_text())
    assert list(metrics["coverage"]) == list(metrics["error"]) == ["prose", "short_period", "mine.txt"]
    ids = torch.tensor(text_ids(byte_tokenizer, "prose", 200, 24))
    layers = read_layers(small, load_indexers(weights), ids, SMALL, None, lambda: None)
    assert [len(picked.indices) for picked in layers] == [40, 40]
    for name, row in metrics["coverage"]["prose"].items():
        assert [entry["ranks"] for entry in row] == [2, 8]
        for entry in row:
            want = measure(layers, placements(entry["ranks"], SMALL.granularity, 200)[name], 200)
            assert (entry["missing"], entry["needed"], entry["obeys"]) == (want.missing, want.needed, want.needed <= want.local_topk)
            assert (entry["held"], entry["worst"]) == pytest.approx((want.held, want.worst))
    for figures in metrics["error"].values():
        assert list(figures) == WAYS
        assert figures["dsa"]["from_dsa_by_layer"] == figures["dense"]["from_dense_by_layer"] == [0, 0]
        assert min(figures["dsa"]["from_dense_by_layer"]) > 0
        # 8 ranks of at most 25 tokens, each keeping 24 of them, leave next to nothing out.
        assert max(figures["m=24"]["from_dense_by_layer"]) < 0.3 * max(figures["dsa"]["from_dense_by_layer"])
        assert figures["dense"]["next_as_dense"] == figures["dsa"]["next_as_dsa"] == figures["dsa"]["next_of"] == LAST
        assert figures["m=3"]["tokens"] == figures["dsa"]["tokens"] == 24


def test_errors_and_next_tokens_against_their_definitions(ran, small, weights, byte_tokenizer):
    figures = json.loads((ran[0] / "metrics.json").read_text())["error"]["prose"]
    ids, indexers = torch.tensor(text_ids(byte_tokenizer, "prose", 200, 24)), load_indexers(weights)
    methods = {"dense": Single(Dense()), "dsa": Single(DSA(24)), "m=5": IDSA(DSA(24), 8, 5)}
    following = {}
    for name, method in methods.items():
        decoder = Decoder(small, indexers, method.placement)
        decoder.prefill(ids[:-LAST])
        following[name] = decoder.step(ids[-LAST:], [method] * 2).argmax(-1)
    for name in methods:
        assert figures[name]["next_as_dsa"] == int((following[name] == following["dsa"]).sum())
        assert figures[name]["next_as_dense"] == int((following[name] == following["dense"]).sum())
    for layer, given in enumerate(layer_inputs(small, ids)):
        query = indexers[layer].index_query(given.hidden[-LAST:], given.positions[-LAST:])
        keys = pack_keys([indexers[layer].index_keys(given.hidden, given.positions)])
        k, v = (x.double().repeat_interleave(3, 1) for x in (given.k, given.v))
        outs = {}
        for name, method in methods.items():
            rows = []
            for row, picked in enumerate(method.select(query, keys).indices.tolist()):
                at = [position for position in picked if position >= 0]
                p = (torch.einsum("nd,knd->nk", given.q[row - LAST].double(), k[at]) / 4).softmax(-1)
                rows.append(torch.einsum("nk,knd->nd", p, v[at]).flatten())
            outs[name] = torch.stack(rows)
        for name in methods:
            for of in ("dsa", "dense"):
                want = ((outs[name] - outs[of]).norm(dim=1) / outs[of].norm(dim=1)).mean()
                assert figures[name][f"from_{of}_by_layer"][layer] == pytest.approx(float(want), rel=1e-3, abs=1e-6)


def test_recorded_scores_give_what_the_model_gives(small, weights, tmp_path):
    ids, indexers = tokens(200), load_indexers(weights)
    path = tmp_path / "recorded.safetensors"
    save_file(recorded_tensors(small, indexers, ids, (1, 0), 190), path)
    settings = dataclasses.replace(SMALL, recorded=path, texts=())
    table = run_coverage(str(tmp_path / "run"), settings)
    assert "177 rows" in table  # 190 and 1, of which the first 14 see no more than k
    layers = read_layers(small, indexers, ids, dataclasses.replace(SMALL, queries=190), None, lambda: None)
    last = Selection(layers[0].indices[-1:], layers[0].lengths[-1:])
    run = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert run["error"] == {}
    for entry in run["coverage"]["recorded"]["g=1"]:
        want = measure([layers[1], last], Placement(entry["ranks"]), 200)
        assert entry["rows"] == want.rows == 177
        assert entry["needed"] == want.needed
        assert tuple(entry["held_by_layer"]) == pytest.approx(want.held_by_layer)
    assert not (tmp_path / "run" / "error.png").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": None}, "must hold q, k and weights"),
        ({"weights": torch.zeros(7, 3)}, "must be q"),
        ({"k": torch.ones(2, 60, 8)}, "must be q"),
        ({"k": torch.ones(1, 7, 8)}, "must be q"),
        ({"rows": torch.tensor([9, -1])}, "must be q"),
        ({"rows": torch.tensor([0]), "q": torch.ones(0, 4, 8), "weights": torch.ones(0, 4)}, "must be q"),
        ({"k": torch.zeros(1, 20, 8)}, "recorded contexts must exceed topk=24"),
    ],
)
def test_recorded_files_that_do_not_fit(tmp_path, change, words):
    held = {"q": torch.ones(8, 4, 8), "weights": torch.ones(8, 4), "k": torch.ones(1, 60, 8), "rows": torch.tensor([8]), **change}
    path = tmp_path / "bad.safetensors"
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, path)
    with pytest.raises(ThresherError, match=words):
        run_coverage(str(tmp_path / "run"), dataclasses.replace(SMALL, recorded=path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ranks", "0"], "ranks must be different numbers of at least 1; got 0"),
        (["--ranks", "2", "2"], "ranks must be different"),
        (["--granularity", "-4"], "granularity must be different numbers"),
        (["--topk", "0"], "topk must be at least 1"),
        (["--length", "271"], "length must lie in 272..8192"),
        (["--length", "9000"], "length must lie in 272..8192"),
        (["--queries", "15"], "queries must lie in 16..2048"),
        (["--error-ranks", "-1"], "error_ranks must be at least 0"),
        (["--texts", "poem"], "a text must be one of prose, code"),
        (["--texts"], "there must be a text"),
        (["--texts", "prose", "prose"], "texts must have different names"),
        (["--text", "none.txt"], "a text must be a readable file; got none.txt"),
        (["--text", "a.txt", "--recorded", "b.safetensors"], "measured instead of texts"),
        (["--recorded", "none.safetensors"], "must be a safetensors file"),
        (["--weights", "none.safetensors"], "the weights file and its .json record must exist"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_loaded(monkeypatch, capsys, tmp_path, options, words):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(coverage_run, "load_model", load)
    monkeypatch.setattr(coverage_run, "load_tokenizer", load)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", "coverage", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("thresher: ")
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["eval", "--help"], ["eval", "coverage", "--help"]])
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 0
    assert "coverage" in capsys.readouterr().out


def test_texts_that_cannot_be_used_leave_an_earlier_run_alone(ran, small, weights, tmp_path):
    out = shutil.copytree(ran[0], tmp_path / "run")
    before = (out / "metrics.json").read_bytes()
    short, latin = tmp_path / "short.txt", tmp_path / "latin.txt"
    short.write_text("x" * 199)
    latin.write_bytes(b"caf\xe9" * 100)
    wrong = (([short], True, "must hold 200 tokens; got 199"), ([latin], True, "UTF-8"), ([], False, "new or empty"))
    for files, overwrite, words in wrong:
        settings = dataclasses.replace(SMALL, files=[str(path) for path in files])
        with pytest.raises(ThresherError, match=words):
            run_coverage(str(out), settings, overwrite=overwrite, weights=weights)
        assert (out / "metrics.json").read_bytes() == before


def test_nothing_to_draw_is_one_line(tmp_path):
    for draw in (
        lambda: missing_by_ranks(tmp_path / "x.png", {}, 1e-4, "t"),
        lambda: missing_by_ranks(tmp_path / "x.png", {"prose": {}}, 1e-4, "t"),
        lambda: error_by_budget(tmp_path / "x.png", {"prose": []}, {"prose": 0.1}, "t"),
    ):
        with pytest.raises(ThresherError, match="needs"):
            draw()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_shipped_model_keeps_to_the_rule_on_prose_and_breaks_it_on_a_period(tmp_path):
    pytest.importorskip("gguf")
    texts = ("prose", "short_period")
    settings = Settings(length=320, topk=40, queries=48, ranks=(4, 8), granularity=(1, 64), error_ranks=0, texts=texts)
    table = run_coverage(str(tmp_path / "run"), settings)
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())["coverage"]
    prose, period = figures["prose"]["g=1"], figures["short_period"]["g=1"]
    assert all(entry["rows"] == 30 * 48 for entry in (*prose, *period))
    assert all(entry["missing"] < 0.01 for entry in prose)
    assert all(entry["missing"] > 0.1 and entry["needed"] > 1.5 * entry["local_topk"] for entry in period)
    assert "short_period, g=1: BROKEN for R = 4, 8" in table
    assert all(entry["missing"] > 0.1 for entry in figures["prose"]["contiguous"]), "the last tokens are kept most, all on one shard"


def test_the_page_shows_the_record():
    record = (ROOT / "docs" / "coverage" / "table.txt").read_text().split("\n\n")
    shown = re.findall(r"[^`]\n\n```text\n(.*?)\n```", (ROOT / "docs" / "coverage.md").read_text(), re.DOTALL)
    assert len(shown) == 3
    assert set(shown) <= set(record)
