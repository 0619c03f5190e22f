"""Recorded inputs: what a benchmark makes of the file is, byte for byte, what the model's own cache and queries hold."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from thresher import cli
from thresher.bench import recording
from thresher.bench.cases import parse_case
from thresher.bench.inputs import make_inputs
from thresher.bench.recording import record_inputs, recorded_tensors, storable
from thresher.bench.run import Settings, run_bench
from thresher.cache import load_keys
from thresher.errors import ThresherError
from thresher.models.checkpoint import save_indexers
from thresher.models.decoder import Decoder
from thresher.ops import dequantize_fp8, quantize_fp8

from ..models.tiny import INDEXER, layer_inputs, tiny_indexers, tiny_model, tokens

CPU = torch.device("cpu")
LENGTH, QUERIES, LAYERS = 150, 7, (2, 0)
SIZES = f"h{INDEXER.num_heads}-d{INDEXER.head_dim}-k16"
PREFILL, DECODE = f"prefill-{QUERIES}x{LENGTH}-{SIZES}", f"decode-2x{LENGTH}-{SIZES}"


def same_bytes(one, other):
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def indexers():
    return tiny_indexers()


@pytest.fixture(scope="module")
def recorded(model, indexers, tmp_path_factory):
    path = tmp_path_factory.mktemp("recorded") / "tiny.safetensors"
    save_file(recorded_tensors(model, indexers, tokens(LENGTH), LAYERS, QUERIES), path)
    return path


def test_the_keys_are_the_bytes_of_the_models_own_cache(model, indexers, recorded):
    decoder = Decoder(model, indexers)
    decoder.prefill(tokens(LENGTH))
    made = {"decode": make_inputs(parse_case(DECODE), "recorded", 0, CPU, recorded).keys}
    made["prefill"] = make_inputs(parse_case(PREFILL), "recorded", 0, CPU, recorded).keys
    halved = 0
    for kind, request, layer in (("decode", 0, 2), ("decode", 1, 0), ("prefill", 0, 2)):
        values, scales = load_keys(decoder._keys(decoder.layers[layer][0]), 0)
        got = load_keys(made[kind], request)
        assert same_bytes(got[0], values)
        assert torch.equal(got[1], scales)
        halved += int((quantize_fp8(dequantize_fp8(values, scales))[1] != scales).sum())
    assert halved > 0, "some keys must be such that dequantised numbers alone would give other bytes"


@torch.no_grad()
def test_the_queries_are_the_indexers_own(model, indexers, recorded):
    seen = layer_inputs(model, tokens(LENGTH))

    def own(layer, rows):
        given = seen[layer]
        return indexers[layer].index_query(given.hidden[-rows:], given.positions[-rows:])

    prefill = make_inputs(parse_case(PREFILL), "recorded", 0, CPU, recorded).query
    want = own(2, QUERIES)
    assert same_bytes(prefill.q, want.q)
    assert torch.equal(prefill.weights, want.weights)
    assert torch.equal(prefill.positions, want.positions)
    # The last query of the first request was computed in the batch of the prefill's.
    decode = make_inputs(parse_case(DECODE), "recorded", 0, CPU, recorded).query
    for row, last in enumerate((want.rows(slice(-1, None)), own(0, 1))):
        assert same_bytes(decode.q[row], last.q[0])
        assert torch.equal(decode.weights[row], last.weights[0])


def test_any_vector_comes_back():
    torch.manual_seed(0)
    x = torch.randn(4096, 32) * torch.exp2(torch.randint(-40, 40, (4096, 1)).float())
    x[::5, 3] = 224.001 * torch.exp2(torch.randint(-14, 40, (820,)).float())  # many whose largest value rounds down to 224
    x[::5] = x[::5].clamp(-x[::5, 3:4], x[::5, 3:4])
    x[1::5] *= -1
    x[7], x[8], x[9] = 0.0, -0.0, 9e-5
    values, scales = quantize_fp8(x)
    stored = storable(values, scales)
    assert stored.dtype == torch.bfloat16
    again = quantize_fp8(stored)
    assert same_bytes(again[0], values)
    assert torch.equal(again[1], scales)
    assert (quantize_fp8(dequantize_fp8(values, scales))[1] != scales).sum() > 400, "the case that storable is there for"


def test_recorded_cases_run(recorded):
    lines = []
    settings = Settings((PREFILL, DECODE, f"decode-1x100-{SIZES}"), inputs=("recorded",), recorded=recorded, device="cpu", repeats=2)
    records = run_bench(settings, lines.append)
    assert [record.inputs for record in records] == ["recorded"] * 3
    for case, need in ((f"prefill-8x{LENGTH}-{SIZES}", r"q \[1\+, 8\+"), (f"decode-3x{LENGTH}-{SIZES}", r"q \[3\+, 1\+")):
        with pytest.raises(ThresherError, match=need + r".*rows \[7, 1\]"):
            run_bench(Settings((case,), inputs=("recorded",), recorded=recorded, device="cpu"), print)


@pytest.fixture
def small(monkeypatch, model, indexers, tmp_path):
    """Stands in for SmolLM2; the tokenizer counts characters."""

    class Letters:
        def encode(self, text, add_special_tokens=True):
            return type("Encoded", (), {"ids": [ord(c) % 97 for c in text], "offsets": [(i, i + 1) for i in range(len(text))]})

    monkeypatch.setattr(recording, "load_tokenizer", Letters)
    monkeypatch.setattr(recording, "load_model", lambda device: model)
    monkeypatch.setattr(recording, "CONFIG", model.config)
    weights = tmp_path / "tiny.safetensors"
    save_indexers(weights, indexers, {})
    return weights


def test_the_command(small, tmp_path, capsys):
    out = tmp_path / "new" / "recorded.safetensors"
    arguments = ["record", "--out", str(out), "--layers", "1", "2", "--length", "400", "--queries", "9", "--weights", str(small)]
    assert cli.main(arguments) == 0
    assert "q [10, 16, 32]" in capsys.readouterr().out
    with safe_open(out, "pt") as file:
        assert file.metadata()["layers"] == "1 2"
        assert file.get_tensor("rows").tolist() == [9, 1]
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert cli.main(["bench", "--case", f"prefill-9x400-{SIZES}", "--inputs", "recorded", "--recorded", str(out), "--device", "cpu"]) == 0
    capsys.readouterr()
    before = out.read_bytes()
    assert cli.main(arguments) == 2
    assert "must not exist yet" in capsys.readouterr().err
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": (0, 3)}, r"layers must be different ones of 0\.\.2; got 0 3"),
        ({"layers": (-1,)}, "layers must be"),
        ({"layers": (1, 1)}, "layers must be"),
        ({"layers": ()}, "got none"),
        ({"length": 513}, r"length must lie in 1\.\.512"),
        ({"queries": 401}, r"queries must lie in 1\.\.400"),
        ({"queries": 0}, "queries must lie in"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_before_the_model_is_loaded(small, tmp_path, monkeypatch, change, words):
    monkeypatch.setattr(recording, "load_model", lambda device: pytest.fail("the model was loaded first"))
    given = {"layers": (0,), "length": 400, "queries": 8, "weights": small, **change}
    with pytest.raises(ThresherError, match=words):
        record_inputs(tmp_path / "out.safetensors", **given)


def test_a_failure_leaves_no_file(small, tmp_path, monkeypatch):
    folder = tmp_path / "out"

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(ThresherError, match="No space left on device"):
        record_inputs(folder / "recorded.safetensors", (0,), 400, 8, weights=small)
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_the_real_model(tmp_path):
    """Some layers of SmolLM2 under the shipped indexers, and the size that the file's layout promises."""
    pytest.importorskip("gguf")
    out = tmp_path / "recorded.safetensors"
    record_inputs(out, (12, 0, 29), 700, 64)
    held = (64 + 2) * 32 * (64 * 2 + 4) + 3 * 700 * 64 * 2
    assert held < out.stat().st_size < held + 2000
    cases = ("prefill-64x700-h32-d64-k128", "decode-3x700-h32-d64-k128")
    assert len(run_bench(Settings(cases, inputs=("recorded",), recorded=out, device="cpu", repeats=1), print)) == 2
