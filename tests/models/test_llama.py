"""The dense arithmetic is transformers' to the last digits, and the attention callback sees every layer."""

import pytest
import torch

from .tiny import CONFIG, dense_logits, layer_inputs, tiny_model, tokens, turn

NAMES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "input_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
}


def their_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "layers":
        return f"model.layers.{parts[1]}.{NAMES[parts[2]]}.weight"
    return f"{NAMES[parts[0]]}.weight"


@pytest.mark.parametrize("count", [1, 2, 77])
def test_hidden_states_and_logits_are_those_of_transformers(count):
    transformers = pytest.importorskip("transformers")
    model = tiny_model()
    config = transformers.LlamaConfig(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.hidden_size,
        intermediate_size=CONFIG.intermediate_size,
        num_hidden_layers=CONFIG.num_hidden_layers,
        num_attention_heads=CONFIG.num_attention_heads,
        num_key_value_heads=CONFIG.num_key_value_heads,
        head_dim=CONFIG.head_dim,
        max_position_embeddings=CONFIG.max_position_embeddings,
        rms_norm_eps=CONFIG.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_theta},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    other = transformers.LlamaForCausalLM(config).eval()
    missing, unexpected = other.load_state_dict({their_name(n): p for n, p in model.named_parameters()}, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    other.tie_weights()
    ids = tokens(count)
    with torch.no_grad():
        got = other(ids[None], output_hidden_states=True)
    for given, theirs in zip(layer_inputs(model, ids), got.hidden_states, strict=False):
        normed = torch.nn.functional.rms_norm(theirs[0], (48,), model.layers[given.layer].input_norm.weight, CONFIG.rms_norm_eps)
        torch.testing.assert_close(given.hidden, normed, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dense_logits(model, ids), got.logits[0], rtol=1e-5, atol=1e-5)


def test_layer_inputs_carry_rope_and_positions():
    model = tiny_model()
    ids = tokens(20)
    given = layer_inputs(model, ids)
    assert [g.layer for g in given] == [0, 1, 2]
    for g, layer in zip(given, model.layers, strict=True):
        assert g.positions.tolist() == list(range(20))
        for got, weight, heads in ((g.q, layer.q_proj.weight, 6), (g.k, layer.k_proj.weight, 2)):
            want = turn((g.hidden.double() @ weight.double().T).view(20, heads, 16), g.positions, CONFIG.rope_theta, 16)
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_attention_looks_back_only():
    model = tiny_model()
    ids = tokens(40)
    changed = ids.clone()
    changed[30:] = (changed[30:] + 1) % CONFIG.vocab_size
    before, after = dense_logits(model, ids), dense_logits(model, changed)
    torch.testing.assert_close(before[:30], after[:30], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(before[30:], after[30:], atol=1e-2)
