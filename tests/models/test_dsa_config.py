"""Published configs: what is read out of them, beside transformers' own reading, and what is refused."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from thresher.errors import ThresherError
from thresher.models.dsa_config import parse_config
from thresher.models.dsa_layers import DsaModel
from thresher.models.dsa_rope import Rope, Rotation, rotate, rotation
from thresher.models.dsa_weights import places
from thresher.models.published import PUBLISHED, random_model, true_shapes
from thresher.models.tiny_checkpoint import TINY
from thresher.ops import apply_rope
from thresher.selectors import DSA, MISA, Shared

FAMILIES = tuple(PUBLISHED)
V32, GLM = FAMILIES
each = pytest.mark.parametrize("family", FAMILIES)


def changed(family: str, **changes):
    return {**PUBLISHED[family], **changes}


def test_deepseek_v32():
    config = parse_config(PUBLISHED[V32])
    assert (config.index_rope, config.quantized, config.eos_token_ids) == ("half", True, (1,))
    assert (sum(config.sparse_mlp), config.sparse_mlp[:4]) == (58, (False, False, False, True))
    assert config.index_layers == tuple(range(61))
    assert config.softmax_scale == pytest.approx(192**-0.5 * 1.3688879454113936**2)
    assert config.plan().layers == (DSA(2048),) * 61


def test_glm_5_and_its_shared_layers():
    config = parse_config(PUBLISHED[GLM])
    assert (config.index_rope, config.eos_token_ids, config.softmax_scale) == ("interleaved", (154820, 154827, 154829), 256**-0.5)
    assert config.index_layers == tuple(range(78))
    kinds = ["full" if layer in (0, 1, 2, *range(6, 78, 4)) else "shared" for layer in range(78)]
    by_list = parse_config(changed(GLM, indexer_types=kinds))
    by_rule = parse_config(changed(GLM, index_topk_freq=4, index_skip_topk_offset=3, index_topk_pattern=None))
    assert by_list.index_layers == by_rule.index_layers
    assert by_list.index_layers[:11] == (0, 1, 2, 2, 2, 2, 6, 6, 6, 6, 10)
    assert by_list.plan(MISA()).layers[2:7] == (MISA(), Shared(2), Shared(2), Shared(2), MISA())


@each
def test_read_as_transformers_reads_it(family):
    transformers = pytest.importorskip("transformers", minversion="5.24")
    names = {V32: "DeepseekV32", GLM: "GlmMoeDsa"}
    for data in deepcopy((PUBLISHED[family], changed(family, **TINY[family]))):  # transformers writes into what it is given
        config = parse_config(data)
        theirs = getattr(transformers, names[family] + "Config").from_dict({**data, "quantization_config": None})
        assert [kind == "sparse" for kind in theirs.mlp_layer_types] == list(config.sparse_mlp)
        kinds = getattr(theirs, "indexer_types", None) or ["full"] * config.num_hidden_layers
        assert [kind == "full" for kind in kinds] == [source == layer for layer, source in enumerate(config.index_layers)]
        module = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=["x"])
        positions = torch.tensor([0, 1, 77, 4097, 131071])
        cos, sin = getattr(module, names[family] + "RotaryEmbedding")(theirs)(torch.zeros(1), positions[None])
        turn = rotation(config.rope, 64, positions)
        assert torch.equal(cos[0, :, :32], turn.cos)
        assert torch.equal(sin[0, :, :32], turn.sin)
        attention = getattr(module, names[family] + "Attention")
        with torch.device("meta"):
            assert attention(theirs, 0).scaling == pytest.approx(config.softmax_scale, rel=1e-12)


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_without_yarn_it_is_the_operation_s_rotation(style):
    x, positions = torch.randn(5, 3, 80, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 500, 7, 2000])
    got = rotate(x, rotation(Rope(10000.0), 64, positions), style)
    torch.testing.assert_close(got, apply_rope(x, positions, 10000.0, 64, style), rtol=0, atol=2e-3)  # its frequencies come from fp64
    torch.testing.assert_close(got[:2], apply_rope(x, positions, 10000.0, 64, style)[:2], rtol=0, atol=1e-6)
    still = Rotation(torch.ones(5, 32), torch.zeros(5, 32))
    assert torch.equal(rotate(x.bfloat16(), still, style), x.bfloat16().float())


@each
@pytest.mark.parametrize("missing", ["hidden_size", "index_n_heads", "index_topk", "kv_lora_rank", "norm_topk_prob", "rms_norm_eps",
                                     "first_k_dense_replace", "eos_token_id", "num_hidden_layers", "topk_group", "model_type"])  # fmt: skip
def test_a_missing_field_is_named(family, missing):
    data = {name: value for name, value in PUBLISHED[family].items() if name != missing}
    with pytest.raises(ThresherError, match=rf"\b{missing}\b"):
        parse_config(data)


def yarn(**changes):
    return changed(V32, rope_scaling={**PUBLISHED[V32]["rope_scaling"], **changes})


REFUSED = {
    "another model": (changed(V32, model_type="llama"), "model_type must be one of deepseek_v32, glm_moe_dsa; got 'llama'"),
    "another architecture": (changed(V32, architectures=["LlamaForCausalLM"]), "architectures must be .'DeepseekV32ForCausalLM'"),
    "text for a size": (changed(V32, hidden_size="7168"), "hidden_size must be a whole number of at least 1; got '7168'"),
    "a bool for a size": (changed(V32, index_topk=True), "index_topk must be a whole number of at least 1; got True"),
    "no layers": (changed(V32, num_hidden_layers=0), "num_hidden_layers must be a whole number of at least 1; got 0"),
    "a number for a bool": (changed(V32, norm_topk_prob=1), "norm_topk_prob must be true or false; got 1"),
    "eps": (changed(V32, rms_norm_eps=0), "rms_norm_eps must be a positive number; got 0"),
    "eos": (changed(V32, eos_token_id="</s>"), "eos_token_id must be a token or a list of them"),
    "softmax routing": (changed(V32, scoring_func="softmax"), "scoring_func must be sigmoid.*got 'softmax'"),
    "other routing": (changed(V32, topk_method="greedy"), "topk_method must be noaux_tc.*got 'greedy'"),
    "biases": (changed(V32, attention_bias=True), "attention_bias must be False.*got True"),
    "another latent": (changed(V32, kv_lora_rank=256), "kv_lora_rank must be 512.*got 256"),
    "another rope part": (changed(V32, qk_rope_head_dim=32), "qk_rope_head_dim must be 64.*got 32"),
    "the other layout": (changed(V32, indexer_rope_interleave=True), "indexer_rope_interleave must be False.*got True"),
    "the other layout of GLM": (changed(GLM, indexer_rope_interleave=False), "indexer_rope_interleave must be True.*got False"),
    "an index dim": (changed(V32, index_head_dim=96), "index_head_dim must be a power of two"),
    "a small index dim": (changed(V32, index_head_dim=32), "index_head_dim must be a power of two with room for the RoPE dims; got 32"),
    "groups": (changed(V32, n_group=7), "n_group must part n_routed_experts"),
    "lone experts": (changed(V32, n_group=256), "n_group must part n_routed_experts into groups of 2 or more"),
    "kept groups": (changed(V32, topk_group=9), "topk_group must be at most n_group, 8; got 9"),
    "experts": (changed(V32, num_experts_per_tok=129), "num_experts_per_tok must be at most the 128 experts"),
    "layer kinds": (changed(GLM, indexer_types=["full"] * 77), "indexer_types must be a list of 78, each full or shared; got 77 entries"),
    "an unknown kind": (changed(GLM, indexer_types=["half"] * 78), "indexer_types must be a list of 78, each full or shared"),
    "nothing to share": (changed(GLM, indexer_types=["shared"] * 78), "indexer_types must start with a full layer"),
    "a pattern": (changed(GLM, index_topk_pattern="FSSS"), "index_topk_pattern must come with indexer_types"),
    "a rule": (changed(GLM, index_topk_freq=0), "index_topk_freq must be a whole number of at least 1"),
    "mlp kinds": (changed(GLM, mlp_layer_types="dense"), "mlp_layer_types must be a list of 78, each dense or sparse; got 'dense'"),
    "dense layers": (changed(GLM, first_k_dense_replace=-1), "first_k_dense_replace must be a whole number"),
    "other weights": (changed(V32, quantization_config={"quant_method": "awq"}), "quant_method of quantization_config must be fp8"),
    "other blocks": (
        changed(V32, quantization_config={**PUBLISHED[V32]["quantization_config"], "weight_block_size": [64, 64]}),
        r"weight_block_size of quantization_config must be \[128, 128\]; got \[64, 64\]",
    ),
    "another scaling": (yarn(type="linear"), "rope_type must be default or yarn; got 'linear'"),
    "a field of RoPE": (yarn(truncate=False), "a yarn RoPE must have no fields but .*; got truncate"),
    "no theta": ({k: v for k, v in PUBLISHED[V32].items() if k != "rope_theta"}, "must have the field rope_theta of its RoPE"),
    "a RoPE number": (yarn(factor="40"), "factor must be a number; got '40'"),
    "no RoPE": (changed(GLM, rope_parameters={"rope_type": "default"}), "must have the field rope_theta of its RoPE"),
    "a list for RoPE": (changed(GLM, rope_parameters=[1]), "rope_parameters must be an object"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    data, message = REFUSED[case]
    with pytest.raises(ThresherError, match=message) as caught:
        parse_config(data)
    assert "\n" not in str(caught.value)


def test_yarn_without_its_length_is_named():
    scaling = {name: value for name, value in PUBLISHED[V32]["rope_scaling"].items() if name != "original_max_position_embeddings"}
    with pytest.raises(ThresherError, match="the field original_max_position_embeddings"):
        parse_config(changed(V32, rope_scaling=scaling))


@each
def test_published_shapes_add_up_to_the_published_size(family):
    """671 and 744 billion parameters, with the layer for multi-token prediction and its embedding left out."""
    with torch.device("meta"):
        layers = {3: DsaModel(true_shapes(family, 4, 256), torch.bfloat16)}
    config = parse_config(PUBLISHED[family])
    sizes = {name: place.memory.numel() for name, place in places(layers[3])}
    dense, sparse = (sum(n for name, n in sizes.items() if name.startswith(f"model.layers.{layer}.")) for layer in (0, 3))
    rest = sum(n for name, n in sizes.items() if ".layers." not in name)
    total = rest + sum(sparse if experts else dense for experts in config.sparse_mlp)
    assert total / 1e9 == pytest.approx({V32: 671.9, GLM: 743.9}[family], abs=0.1)


def test_as_many_names_as_were_published():
    """GLM-5.2-FP8's index names 118629 tensors; 1569 of them are of the layer for multi-token prediction: one with experts and an indexer,
    and four tensors more. Beside each FP8 weight lie its scales."""
    config = parse_config(changed(GLM, index_topk_freq=4, index_skip_topk_offset=3))
    with torch.device("meta"):
        held = {name: 1 + place.may_be_fp8 for name, place in places(DsaModel(config, torch.bfloat16))}
    assert sum(held.values()) == 118629 - 1569
    assert sum(count for name, count in held.items() if name.startswith("model.layers.74.")) == 1569 - 4


@each
def test_true_shapes_on_a_device(family):
    """Few layers and experts, each as published: nothing is read, and the device decides where they are made."""
    model = random_model(true_shapes(family, 2, 16, first_k_dense_replace=1, vocab_size=1024), device="meta")
    got = {name: tuple(place.memory.shape) for name, place in places(model)}
    at = "model.layers.1."
    heads, low, hidden, index = (128, 1536, 7168, 64) if family == V32 else (64, 2048, 6144, 32)
    nope, value = (128, 128) if family == V32 else (192, 256)
    assert got[at + "self_attn.q_b_proj.weight"] == (heads * (nope + 64), low)
    assert got[at + "self_attn.kv_a_proj_with_mqa.weight"] == (576, hidden)
    assert got[at + "self_attn.kv_b_proj.weight"] == (heads * (nope + value), 512)
    assert got[at + "self_attn.o_proj.weight"] == (hidden, heads * value)
    assert got[at + "self_attn.indexer.wq_b.weight"] == (index * 128, low)
    assert got[at + "self_attn.indexer.wk.weight"] == (128, hidden)
    assert got[at + "mlp.experts.15.down_proj.weight"] == (hidden, 2048)
    assert at + "mlp.experts.16.down_proj.weight" not in got
    assert got["lm_head.weight"] == (1024, hidden)
    assert model.device.type == "meta"
    with pytest.raises(ThresherError, match="family must be one of"):
        true_shapes("llama", 1, 16)
