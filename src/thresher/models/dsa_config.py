"""What the ``config.json`` of a published DSA checkpoint says: DeepSeek-V3.2 and V3.2-Exp (``deepseek_v32``), GLM-5 (``glm_moe_dsa``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from thresher.cache.latents import LATENT_DIM, ROPE_DIM
from thresher.errors import require
from thresher.models.dsa_rope import Rope, parse_rope
from thresher.selectors import DSA, LayerPlan, Selector, Shared

BLOCK = 128
"""Rows and columns of the weight blocks that share one FP8 scale."""


@dataclass(frozen=True)
class Family:
    """What belongs to a ``model_type``: the architecture's name, and which dims the indexer's RoPE pairs (no config of V3.2 says it)."""

    architecture: str
    index_rope: str


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "deepseek_v32": Family("DeepseekV32ForCausalLM", "half"),
        "glm_moe_dsa": Family("GlmMoeDsaForCausalLM", "interleaved"),
    }
)

# Fields that would change the arithmetic; where a config has one, it must have the value that this decoder computes with.
FIXED: Mapping[str, object] = MappingProxyType(
    {
        "hidden_act": "silu",
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_interleave": True,
        "kv_lora_rank": LATENT_DIM,
        "qk_rope_head_dim": ROPE_DIM,
    }
)


@dataclass(frozen=True)
class DsaConfig:
    """Sizes of a DSA model; names as published.

    Attributes:
        family: ``"deepseek_v32"`` or ``"glm_moe_dsa"``.
        index_rope: ``"half"`` or ``"interleaved"``, the layout of the indexer's RoPE.
        rope: the RoPE of attention and indexer.
        sparse_mlp: whether each layer has experts.
        index_layers: for each layer, the layer whose indexer selects for it: itself, or one before.
        eos_token_ids: tokens that end a text.
        quantized: whether weights may be FP8 with block scales.
    """

    family: str
    index_rope: str
    rope: Rope
    sparse_mlp: tuple[bool, ...]
    index_layers: tuple[int, ...]
    eos_token_ids: tuple[int, ...]
    quantized: bool
    tie_word_embeddings: bool
    norm_topk_prob: bool
    rms_norm_eps: float
    routed_scaling_factor: float
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_shared_experts: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    max_position_embeddings: int
    num_nextn_predict_layers: int

    @property
    def softmax_scale(self) -> float:
        """Of the attention, YaRN's factor included."""
        return (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5 * self.rope.softmax_factor

    def plan(self, selector: Selector | None = None) -> LayerPlan:
        """``selector`` (the model's own DSA if None) where a layer has an indexer; elsewhere the selection of the layer it shares with."""
        selector = selector or DSA(topk=self.index_topk)
        return LayerPlan(tuple(selector if source == layer else Shared(source) for layer, source in enumerate(self.index_layers)))


def parse_config(data: Mapping[str, Any]) -> DsaConfig:
    """A published config as this decoder needs it. Fields that are not read do not matter, whatever they hold.

    Args:
        data: the object in ``config.json``.

    Raises:
        ThresherError: naming the field: an unknown architecture, a field that is missing, of another kind or out of range, or one that
            asks for other arithmetic.
    """
    family = data.get("model_type")
    known = isinstance(family, str) and family in FAMILIES
    require(known, f"model_type must be one of {', '.join(FAMILIES)}", repr(family), "pass a checkpoint of these architectures")
    assert isinstance(family, str)
    style = FAMILIES[family].index_rope
    fixed = {**FIXED, "architectures": [FAMILIES[family].architecture], "indexer_rope_interleave": style == "interleaved"}
    for name, value in fixed.items():
        got = data.get(name, value)
        require(got == value, f"{name} must be {value}, as in the published {family} checkpoints", repr(got), "this decoder has no other")
    layers = _whole(data, "num_hidden_layers")
    derived: dict[str, Any] = {
        "family": family,
        "index_rope": style,
        "rope": parse_rope(data),
        "sparse_mlp": _sparse_mlp(data, layers),
        "index_layers": _index_layers(data, layers),
        "eos_token_ids": _eos(data),
        "quantized": _quantized(data),
    }
    readers = {"int": _whole, "float": _number, "bool": _flag}
    plain = [field for field in dataclasses.fields(DsaConfig) if field.name not in derived]
    defaulted = {"tie_word_embeddings": False, "num_nextn_predict_layers": 0, **data}
    derived |= {field.name: readers[str(field.type)](defaulted, field.name) for field in plain}
    config = DsaConfig(**derived)
    _check(config)
    return config


def _field(data: Mapping[str, Any], name: str) -> Any:
    """A field that must be there."""
    require(data.get(name) is not None, f"config.json must have the field {name}", "none", "fetch the published config.json")
    return data[name]


def _whole(data: Mapping[str, Any], name: str) -> int:
    value = _field(data, name)
    least = 0 if name == "num_nextn_predict_layers" else 1
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(ok, f"{name} must be a whole number of at least {least}", repr(value), "fetch the published config.json")
    return int(value)


def _number(data: Mapping[str, Any], name: str) -> float:
    value = _field(data, name)
    ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
    require(ok, f"{name} must be a positive number", repr(value), "fetch the published config.json")
    return float(value)


def _flag(data: Mapping[str, Any], name: str) -> bool:
    value = _field(data, name)
    require(isinstance(value, bool), f"{name} must be true or false", repr(value), "fetch the published config.json")
    return bool(value)


def _sparse_mlp(data: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """From ``mlp_layer_types``, or from ``first_k_dense_replace`` and ``moe_layer_freq``."""
    if data.get("mlp_layer_types") is not None:
        return tuple(kind == "sparse" for kind in _kinds(data, "mlp_layer_types", ("dense", "sparse"), layers))
    first, every = _field(data, "first_k_dense_replace"), data.get("moe_layer_freq", 1)
    ok = isinstance(first, int) and isinstance(every, int) and first >= 0 and every >= 1
    must = "first_k_dense_replace must be a whole number, and moe_layer_freq one of at least 1"
    require(ok, must, f"{first!r} and {every!r}", "fetch the published config.json")
    return tuple(layer >= first and layer % every == 0 for layer in range(layers))


def _index_layers(data: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """From ``indexer_types``, or from ``index_topk_freq`` and ``index_skip_topk_offset``; without them every layer has an indexer."""
    if data.get("indexer_types") is not None:
        full = [kind == "full" for kind in _kinds(data, "indexer_types", ("full", "shared"), layers)]
    else:
        pattern = data.get("index_topk_pattern")
        require(pattern is None, "index_topk_pattern must come with indexer_types", repr(pattern), "write indexer_types into config.json")
        every, offset = data.get("index_topk_freq", 1), data.get("index_skip_topk_offset", 2)
        ok = isinstance(every, int) and isinstance(offset, int) and every >= 1
        must = "index_topk_freq must be a whole number of at least 1, and index_skip_topk_offset one"
        require(ok, must, f"{every!r} and {offset!r}", "fetch the published config.json")
        full = [max(layer - offset + 1, 0) % every == 0 for layer in range(layers)]
    require(full[0], "indexer_types must start with a full layer", "shared", "fetch the published config.json")
    sources: list[int] = []
    for layer, own in enumerate(full):
        sources.append(layer if own else sources[-1])
    return tuple(sources)


def _kinds(data: Mapping[str, Any], name: str, kinds: tuple[str, str], layers: int) -> list[str]:
    given = data[name]
    ok = isinstance(given, list) and len(given) == layers and all(kind in kinds for kind in given)
    must = f"{name} must be a list of {layers}, each {kinds[0]} or {kinds[1]}"
    require(ok, must, f"{len(given)} entries" if isinstance(given, list) else repr(given), "fetch the published config.json")
    return given


def _eos(data: Mapping[str, Any]) -> tuple[int, ...]:
    given = _field(data, "eos_token_id")
    tokens = given if isinstance(given, list) else [given]
    ok = all(isinstance(token, int) for token in tokens)
    require(ok, "eos_token_id must be a token or a list of them", repr(given), "fetch the published config.json")
    return tuple(tokens)


def _quantized(data: Mapping[str, Any]) -> bool:
    """Whether the weights are FP8 in blocks; any other quantisation is refused."""
    given = data.get("quantization_config")
    if given is None:
        return False
    for name, value in (("quant_method", "fp8"), ("fmt", "e4m3"), ("weight_block_size", [BLOCK, BLOCK])):
        got = given.get(name) if isinstance(given, dict) else given
        require(got == value, f"{name} of quantization_config must be {value}", repr(got), "fetch the FP8 or the bf16 checkpoint")
    return True


def _check(config: DsaConfig) -> None:
    """Sizes that must fit one another."""
    dim = config.index_head_dim
    ok = dim & (dim - 1) == 0 and dim >= config.qk_rope_head_dim
    require(ok, "index_head_dim must be a power of two with room for the RoPE dims", dim, "fetch the published config.json")
    group, left = divmod(config.n_routed_experts, config.n_group)
    require(left == 0 and group >= 2, "n_group must part n_routed_experts into groups of 2 or more", config.n_group, "check config.json")
    require(config.topk_group <= config.n_group, f"topk_group must be at most n_group, {config.n_group}", config.topk_group, "lower it")
    room = group * config.topk_group
    must = f"num_experts_per_tok must be at most the {room} experts of the groups that are kept"
    require(config.num_experts_per_tok <= room, must, config.num_experts_per_tok, "check config.json")
