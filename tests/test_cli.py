"""The command line: what goes wrong is one line and exit code 2, never a traceback; what goes right streams text."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from thresher import cli
from thresher.models import generate
from thresher.models.checkpoint import save_indexers
from thresher.selectors import SELECTORS

from .models.tiny import CONFIG, tiny_indexers, tiny_model

PROMPT = "The quick brown fox jumps over the lazy dog. " * 6


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Indexers that fit the small model."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_indexers(path, tiny_indexers(2), {"head_weights": [[1.0] * 16] * 2})
    return path


@pytest.fixture
def prompt(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT, encoding="utf-8")
    return path


class Letters:
    """A tokenizer with one token for each of 256 letters."""

    def encode(self, text):
        return SimpleNamespace(ids=[ord(letter) % 256 for letter in text])

    def decode(self, ids):
        return "".join(chr(0x100 + i) for i in ids)


@pytest.fixture
def small(monkeypatch):
    """Stands in for SmolLM2: two layers, letters as tokens, 512 of them at most."""
    model = tiny_model(dataclasses.replace(CONFIG, vocab_size=257, num_hidden_layers=2, eos_token_id=256))
    # Left alone, tied embeddings of this size would make it repeat its last token whatever it attends to.
    model.embed.weight.data *= 0.05
    for layer in model.layers:
        layer.o_proj.weight.data *= 4
    monkeypatch.setattr(generate, "load_tokenizer", Letters)
    monkeypatch.setattr(generate, "CONFIG", model.config)
    monkeypatch.setattr(generate, "load_model", lambda device: model)


@pytest.fixture
def no_model(monkeypatch):
    """The mistake must be noticed before the seconds it takes to load the model."""

    def load(*args, **kwargs):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(generate, "load_model", load)


@pytest.fixture
def refused(capsys):
    """``refused(words, arguments...)``: exit code 2 and one line on stderr that holds every one of ``words``."""

    def check(words, *arguments):
        assert cli.main([str(a) for a in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("thresher: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        for word in words:
            assert word in err, err

    return check


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--selector", "bogus"], ["a selector must be one of", "'bogus'", *SELECTORS]),
        (["--selector", "MISA"], ["a selector must be one of"]),
        (["--selector", ""], ["a selector must be one of"]),
        (["--selector", "misa:block_size=0"], ["block_size must be an int of at least 1", "0"]),
        (["--selector", "hisa:block_size=0"], ["block_size must be an int of at least 1"]),
        (["--selector", "misa:active_heads=0"], ["active_heads must be an int of at least 1"]),
        (["--selector", "misa:heads=4"], ["options of misa must be among: active_heads, block_size, topk", "'heads'"]),
        (["--selector", "dsa:topk=many"], ["topk must be an int", "'many'"]),
        (["--selector", "dsa:topk=0"], ["topk must be an int of at least 1"]),
        (["--selector", "hisa:block_size=8,num_blocks=8"], ["num_blocks * block_size must be at least topk=512", "64"]),
        (["--selector", "misa_rerank:candidates=100"], ["candidates must be at least topk=512"]),
        (["--selector", "shared:layer=0"], ["must share with an earlier layer"]),
        (["--selector", "0=dense"], ["each of the 2 layers must have a selector"]),
        (["--selector", "0-2=dsa"], ["below 2"]),
        (["--compare", "bogus"], ["a selector must be one of"]),
        (["--placement", "ring:ranks=2"], ["a placement must be one of single, replicated, idsa, exact", "'ring'"]),
        (["--placement", "idsa"], ["idsa needs ranks"]),
        (["--placement", "idsa:ranks=0"], ["ranks must be at least 1"]),
        (["--placement", "idsa:ranks=4,local_topk=100"], ["local_topk must lie in [128, 512]", "100"]),
        (["--max-tokens", "0"], ["max_tokens must be at least 1", "0"]),
        (["--max-tokens", "-3"], ["max_tokens must be at least 1", "-3"]),
    ],
)
def test_bad_options_are_refused_before_the_model_is_loaded(refused, no_model, prompt, weights, options, words):
    refused(words, "generate", "--prompt-file", prompt, "--weights", weights, *options)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["must hold text", "empty"]),
        (b" \n\t ", ["must hold text"]),
        (b"caf\xe9 in latin-1", ["must be UTF-8 text"]),
        (b"\xff\xfeh\x00i\x00", ["must be UTF-8 text"]),
    ],
)
def test_a_bad_prompt_file(refused, no_model, tmp_path, weights, content, words):
    path = tmp_path / "p.txt"
    path.write_bytes(content)
    refused([*words, str(path)], "generate", "--prompt-file", path, "--weights", weights)


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_no_prompt_file(refused, no_model, tmp_path, weights, name):
    refused(["the prompt file must be readable"], "generate", "--prompt-file", tmp_path / name, "--weights", weights)


def test_corrupt_weights(refused, no_model, prompt, weights, tmp_path):
    bad = tmp_path / "bad.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 4
    bad.write_bytes(data)
    bad.with_suffix(".json").write_bytes(weights.with_suffix(".json").read_bytes())
    refused(["bad.safetensors must have sha256", "corrupt"], "generate", "--prompt-file", prompt, "--weights", bad)
    refused(["sha256"], "demo", "--out", tmp_path / "run", "--weights", bad)


def test_missing_weights(refused, no_model, prompt, tmp_path):
    refused(["the weights file and its .json record must exist"], "generate", "--prompt-file", prompt, "--weights", tmp_path / "none")


def test_a_prompt_longer_than_the_model_allows(refused, small, tmp_path, weights):
    path = tmp_path / "long.txt"
    path.write_text("x" * 500)
    refused(["must fit the model's 512 tokens", "500 + 64"], "generate", "--prompt-file", path, "--weights", weights)
    refused(["500 + 13"], "generate", "--prompt-file", path, "--weights", weights, "--max-tokens", 13)


@pytest.mark.parametrize("selector", ["misa:active_heads=17", "misa_rerank:active_heads=17", "misa_random:active_heads=17"])
def test_more_active_heads_than_there_are(refused, small, prompt, weights, selector):
    refused(["active_heads must be at most the query's 16 heads", "17"], *run(prompt, weights, "--selector", selector))


def test_nan_in_the_weights(refused, small, prompt, tmp_path):
    broken = tiny_indexers(2)
    broken[1].wk.weight[3, 3] = float("nan")
    path = tmp_path / "nan.safetensors"
    save_indexers(path, broken, {})
    refused(["index keys must be finite"], *run(prompt, path))


@pytest.mark.parametrize("command", [["demo"], ["train", "warmup"]])
def test_a_run_directory_that_exists(refused, tmp_path, command):
    (tmp_path / "config.json").write_text("{}")
    refused(["the run directory must be new or empty", str(tmp_path)], *command, "--out", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_folder_that_is_no_run_is_not_overwritten(refused, tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    refused(["must hold config.json"], "demo", "--out", tmp_path, "--overwrite")
    assert (tmp_path / "thesis.txt").exists()


def test_training_text_that_is_not_there(refused, tmp_path):
    refused(["each text must be a file"], "train", "warmup", "--out", tmp_path / "run", "--text", tmp_path / "none.txt")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [[], ["fly"], ["generate"], ["demo", "--device", "abacus"], ["generate", "--max-tokens", "x"]])
def test_words_that_are_no_command_exit_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "thresher" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["demo", "--help"], ["generate", "--help"], ["train", "warmup", "--help"], ["record", "--help"]]
)
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 0
    assert "usage: thresher" in capsys.readouterr().out


def test_interrupted(monkeypatch, capsys, prompt, weights):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "run_generate", stop)
    assert cli.main(run(prompt, weights)) == 130
    assert capsys.readouterr().err == "thresher: interrupted\n"


def test_a_missing_optional_part_says_what_to_install(monkeypatch, capsys, prompt, weights):
    def absent(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'gguf'")

    monkeypatch.setattr(generate, "run_generate", absent)
    assert cli.main(run(prompt, weights)) == 2
    err = capsys.readouterr().err
    assert "No module named 'gguf'" in err
    assert "[demo]" in err
    assert err.count("\n") == 1


def run(prompt: Path, weights: Path, *options: str) -> list[str]:
    return ["generate", "--prompt-file", str(prompt), "--weights", str(weights), "--max-tokens", "8", *options]


def text_of(capsys, *arguments):
    assert cli.main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def test_placements_that_keep_everything_give_the_dense_text(capsys, small, prompt, weights):
    """The prompt is shorter than topk, so whatever selects, nothing is left out."""
    dense = text_of(capsys, *run(prompt, weights, "--selector", "dense"))
    assert len(dense) > 1
    for placement in ("single", "idsa:ranks=3,local_topk=512", "exact:ranks=2,granularity=4"):
        assert text_of(capsys, *run(prompt, weights, "--selector", "dsa", "--placement", placement)) == dense
    compared = text_of(capsys, *run(prompt, weights, "--selector", "0=dense;1=dsa", "--compare", "dense"))
    assert compared == dense + "[same text as dense]\n"


def test_comparing_says_where_texts_part(capsys, small, prompt, weights):
    compared = text_of(capsys, *run(prompt, weights, "--selector", "window:topk=1,sinks=0", "--compare", "dense"))
    dense = text_of(capsys, *run(prompt, weights, "--selector", "dense"))
    narrow = text_of(capsys, *run(prompt, weights, "--selector", "window:topk=1,sinks=0"))
    assert narrow != dense, "the case must be one where the selector matters"
    assert compared.startswith(narrow + "[parts from dense after ")
    at = int(compared.split("after ")[1].split(" ")[0])
    assert narrow[:at] == dense[:at]
    assert narrow[at : at + 1] != dense[at : at + 1]


@pytest.mark.parametrize("prompt_text", ["x", "é", "x" * 504])
def test_the_shortest_and_longest_prompts(capsys, small, tmp_path, weights, prompt_text):
    path = tmp_path / "p.txt"
    path.write_text(prompt_text, encoding="utf-8")
    assert text_of(capsys, *run(path, weights)).endswith("\n")


def thresher(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "thresher", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        check=False,
        **options,
    )


def test_as_a_program_a_mistake_is_one_line_and_no_traceback(prompt, weights):
    done = thresher("generate", "--prompt-file", prompt, "--weights", weights, "--selector", "bogus")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("thresher: a selector must be one of dense, dsa")


@pytest.mark.slow
def test_the_real_model_goes_on_with_a_text(tmp_path):
    """As a user would run it: the shipped indexers, SmolLM2, two ranks, compared with dense; then each rank a process of its own."""
    path = tmp_path / "p.txt"
    path.write_text("The capital of France is")
    selector = "misa_rerank:active_heads=4,block_size=64,candidates=1024"
    options = ("generate", "--prompt-file", path, "--selector", selector, "--max-tokens", "3", "--compare", "dense")
    done = thresher(*options, "--placement", "idsa:ranks=2")
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "thresher", *map(str, options)]
    apart = subprocess.run([*launched, "--placement", "idsa"], capture_output=True, text=True, timeout=300, check=False)
    assert (apart.returncode, apart.stdout) == (0, done.stdout), apart.stderr
    assert done.stderr == ""
    assert done.returncode == 0
    assert done.stdout.startswith(" Paris")
    assert done.stdout.endswith("[same text as dense]\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(refused, small, prompt, weights):
    refused(["cuda"], *run(prompt, weights, "--device", "cuda"))
