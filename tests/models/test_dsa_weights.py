"""Loading published files: what arrives, and one clear line for each way in which they can be wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from thresher.errors import ThresherError
from thresher.models.dsa_weights import dequantize_blocks, load_model, places
from thresher.models.shards import INDEX
from thresher.models.tiny_checkpoint import quantize_blocks, write_tiny

from .dsa_peer import FAMILIES, tiny_folder
from .dsa_reference import published_tensors

FIRST = "model-00001-of-00003.safetensors"
LAST = "model-00003-of-00003.safetensors"
WQ = "model.layers.0.self_attn.indexer.wq_b.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
each = pytest.mark.parametrize("family", FAMILIES)


def quiet(folder: Path, dtype: torch.dtype = torch.float32):
    return load_model(folder, dtype, write=lambda line: None)


@pytest.fixture
def folder(tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(tiny_folder("deepseek_v32"), tmp_path / "broken"))


def change_json(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def change_tensors(folder: Path, change) -> None:
    """Change the tensors of the shard that holds layer 0, and the index with them."""
    tensors = load_file(folder / FIRST)
    before = set(tensors)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FIRST)

    def move(index):
        for name in before - set(tensors):
            del index["weight_map"][name]
        index["weight_map"].update(dict.fromkeys(set(tensors) - before, FIRST))

    change_json(folder / INDEX, move)


@each
def test_every_tensor_arrives_where_it_belongs(family):
    """All parameters are filled, with the dequantised numbers; bf16 rounds them once."""
    wanted, lines = published_tensors(tiny_folder(family)), []
    model = load_model(tiny_folder(family), torch.float32, write=lines.append)
    got = dict(places(model))
    skipped = set(wanted) - set(got)
    assert len(skipped) == 4
    assert all(name.startswith(f"model.layers.{model.config.num_hidden_layers}.") for name in skipped)
    assert len(lines) == 1
    assert lines[0].startswith("4 tensors of the layers for multi-token prediction are left out")
    assert all(torch.equal(place.memory, wanted[name]) for name, place in got.items())
    assert sum(place.memory.numel() for place in got.values()) == sum(p.numel() for p in model.parameters())
    assert not any(p.requires_grad for p in model.parameters())
    half = dict(places(quiet(tiny_folder(family), torch.bfloat16)))
    for name, place in half.items():
        exact = name.endswith(("gate.weight", "correction_bias", "weights_proj.weight")) or "k_norm" in name
        assert torch.equal(place.memory, wanted[name] if exact else wanted[name].bfloat16())


def test_keys_and_values_come_out_of_one_tensor():
    """Row n * (nope + v) + i of ``kv_b_proj`` is dim i of head n's key, or from nope on of its value."""
    model, wanted = quiet(tiny_folder("glm_moe_dsa")), published_tensors(tiny_folder("glm_moe_dsa"))
    kv_b, nope, value = wanted["model.layers.2.self_attn.kv_b_proj.weight"], model.config.qk_nope_head_dim, model.config.v_head_dim
    held = model.layers[2].attention.kv_b
    assert held.shape == (4, nope + value, 512)
    assert torch.equal(held[3, nope + 1], kv_b[3 * (nope + value) + nope + 1])


def test_bf16_and_tied_checkpoints(tmp_path):
    folder = write_tiny(tmp_path / "plain", "glm_moe_dsa", quantization_config=None, tie_word_embeddings=True)
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    assert not any("scale_inv" in name or name == "lm_head.weight" for name in names)
    model = quiet(folder)
    hidden = torch.randn(2, 192)
    assert torch.equal(model.logits(hidden), hidden @ model.embed.weight.T)
    change_json(folder / "config.json", lambda data: data.update(tie_word_embeddings=False))
    with pytest.raises(ThresherError, match=r"must hold the tensor lm_head\.weight"):
        quiet(folder)


def test_a_weight_and_its_scales_may_lie_in_different_shards(folder):
    wanted = published_tensors(folder)
    first, last = load_file(folder / FIRST), load_file(folder / LAST)
    name = WQ + "_scale_inv"
    last[name] = first.pop(name)
    save_file(first, folder / FIRST)
    save_file(last, folder / LAST)
    change_json(folder / INDEX, lambda index: index["weight_map"].update({name: LAST}))
    assert torch.equal(dict(places(quiet(folder)))[WQ].memory, wanted[WQ])


@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (130, 5), (72, 300), (257, 256)])
def test_blocks_that_are_cut_off(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 100, shape[0])[:, None]
    values, scales = quantize_blocks(weight)
    assert scales.shape == tuple(-(-size // 128) for size in shape)
    got = dequantize_blocks(values, scales)
    for row in range(0, shape[0], 50):
        for column in range(0, shape[1], 50):
            assert got[row, column] == values[row, column].float() * scales[row // 128, column // 128]
    blocks = torch.arange(shape[0]) // 128
    largest = torch.stack([weight[blocks == b].abs().max() for b in range(len(scales))])
    assert ((got - weight).abs() <= largest[blocks][:, None] * 2**-4).all()


BROKEN_FILES = {
    "no config": (lambda f: (f / "config.json").unlink(), "the folder must hold config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{'a'"), "config.json must be JSON"),
    "no object": (lambda f: (f / "config.json").write_text("[1]"), "config.json must hold a JSON object; got list"),
    "no index": (lambda f: (f / INDEX).unlink(), f"the folder must hold {INDEX}"),
    "no map": (lambda f: (f / INDEX).write_text("{}"), f"{INDEX} must have a weight_map"),
    "missing shard": (lambda f: (f / LAST).unlink(), f"the folder must hold the shard {LAST}"),
    "truncated shard": (lambda f: (f / LAST).write_bytes((f / LAST).read_bytes()[:-1]), f"{LAST} must be a whole safetensors file"),
    "truncated header": (lambda f: (f / LAST).write_bytes((f / LAST).read_bytes()[:99]), f"{LAST} must be a whole safetensors file"),
    "empty shard": (lambda f: (f / LAST).write_bytes(b""), f"{LAST} must be a whole safetensors file"),
    "a pickle": (lambda f: torch.save({"a": torch.ones(1)}, f / LAST), f"{LAST} must be a whole safetensors file"),
    "not in the shard": (
        lambda f: change_json(f / INDEX, lambda index: index["weight_map"].update({WQ: LAST})),
        rf"{FIRST} must hold nothing but what the index puts there; got \['{WQ}'\] too",
    ),
    "a shard elsewhere": (
        lambda f: change_json(f / INDEX, lambda index: index["weight_map"].update({WQ: "../other/x.safetensors"})),
        rf"the index must put {WQ} in a .safetensors file of the folder; got '../other/x.safetensors'",
    ),
    "an absolute path": (
        lambda f: change_json(f / INDEX, lambda index: index["weight_map"].update({WQ: "/x.safetensors"})),
        rf"the index must put {WQ} in a .safetensors file of the folder; got '/x.safetensors'",
    ),
    "another format": (
        lambda f: change_json(f / INDEX, lambda index: index["weight_map"].update({WQ: "pytorch_model.bin"})),
        rf"the index must put {WQ} in a .safetensors file of the folder; got 'pytorch_model.bin'",
    ),
}
BROKEN_TENSORS = {
    "missing": (lambda t: t.pop(DOWN), f"must hold the tensor {DOWN}; got none"),
    "missing scales": (lambda t: t.pop(DOWN + "_scale_inv"), f"must hold the block scales {DOWN}_scale_inv; got none"),
    "extra": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(3)}),
        r"no tensor that this model has no place for; got model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    "a layer too many": (
        lambda t: t.update({"model.layers.4.input_layernorm.weight": torch.ones(192)}),
        r"no place for; got model\.layers\.4\.input_layernorm\.weight",
    ),
    "scales without FP8": (lambda t: t.update({DOWN: t[DOWN].bfloat16()}), f"no place for; got {DOWN}_scale_inv"),
    "another shape": (lambda t: t.update({WQ: t[WQ][:-128]}), rf"{WQ} must be \[2048, 96\], as config.json says; got \(1920, 96\)"),
    "another dtype": (lambda t: t.update({WQ: t[WQ].view(torch.uint8)}), f"{WQ} must be BF16, F32 or F8_E4M3; got U8"),
    "the other FP8": (lambda t: t.update({WQ: t[WQ].view(torch.float8_e5m2)}), f"{WQ} must be BF16, F32 or F8_E4M3; got F8_E5M2"),
    "an FP8 norm": (
        lambda t: t.update({"model.layers.0.input_layernorm.weight": torch.ones(192).to(torch.float8_e4m3fn)}),
        r"model\.layers\.0\.input_layernorm\.weight must be BF16 or F32; got F8_E4M3",
    ),
    "scales of another shape": (
        lambda t: t.update({DOWN + "_scale_inv": torch.ones(2, 2)}),
        rf"{DOWN}_scale_inv must be F32 \[2, 3\], one for a block of 128 x 128; got F32 \[2, 2\]",
    ),
    "scales of another dtype": (
        lambda t: t.update({DOWN + "_scale_inv": t[DOWN + "_scale_inv"].bfloat16()}),
        rf"{DOWN}_scale_inv must be F32 \[2, 3\].*got BF16",
    ),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_broken_files(folder, case):
    damage, message = BROKEN_FILES[case]
    damage(folder)
    refused(folder, message)


@pytest.mark.parametrize("case", BROKEN_TENSORS)
def test_broken_tensors(folder, case):
    damage, message = BROKEN_TENSORS[case]
    change_tensors(folder, damage)
    refused(folder, message)


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ThresherError, match=message) as caught:
        quiet(folder)
    assert "\n" not in str(caught.value)
    assert re.search("; got .*; ", str(caught.value))


def test_an_indexer_of_another_shape_is_named(folder):
    change_json(folder / "config.json", lambda data: data.update(index_n_heads=32))
    refused(folder, rf"{WQ} must be \[4096, 96\], as config.json says; got \(2048, 96\)")


def test_fp8_needs_a_config_that_says_so(folder):
    change_json(folder / "config.json", lambda data: data.pop("quantization_config"))
    refused(folder, "must be BF16 or F32; got F8_E4M3")


def test_all_is_checked_before_memory_is_taken(folder, monkeypatch):
    """A config that asks for far more than the files hold fails on a tensor's shape, not on memory."""
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *given, **named: pytest.fail("memory was taken"))
    change_json(folder / "config.json", lambda data: data.update(hidden_size=2**20, vocab_size=2**22))
    refused(folder, r"model\.embed_tokens\.weight must be \[4194304, 1048576\]")


def test_the_dtype_is_one_of_two():
    with pytest.raises(ThresherError, match="dtype must be bfloat16 or float32; got torch"):
        load_model(tiny_folder("deepseek_v32"), torch.float16)


def test_the_command_writes_what_the_function_does(tmp_path):
    """Small, and in at least two shards; a second run into the same folder is refused in one line."""
    command = [sys.executable, "-m", "thresher.models.tiny_checkpoint", "--family", "glm_moe_dsa", "--out", str(tmp_path / "new")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{tmp_path / 'new'}: ")
    made, wanted = tmp_path / "new", tiny_folder("glm_moe_dsa")
    assert sorted(path.name for path in made.iterdir()) == sorted(path.name for path in wanted.iterdir())
    assert all((made / path.name).read_bytes() == path.read_bytes() for path in wanted.iterdir())
    assert sum(path.stat().st_size for path in made.iterdir()) < 10 * 2**20
    assert len(list(made.glob("*.safetensors"))) >= 2
    with pytest.raises(ThresherError, match="the folder must be empty"):
        write_tiny(made, "glm_moe_dsa")
    with pytest.raises(ThresherError, match="family must be one of deepseek_v32, glm_moe_dsa; got 'llama'"):
        write_tiny(tmp_path / "other", "llama")
