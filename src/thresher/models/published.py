"""The published configs, and models of their shapes with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from thresher.errors import require
from thresher.models.dsa_config import DsaConfig, parse_config
from thresher.models.dsa_layers import DsaModel

_COMMON: Mapping[str, Any] = MappingProxyType(
    {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "index_head_dim": 128,
        "index_topk": 2048,
        "initializer_range": 0.02,
        "kv_lora_rank": 512,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 8,
        "num_nextn_predict_layers": 1,
        "qk_rope_head_dim": 64,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "use_cache": True,
    }
)
_FP8: Mapping[str, Any] = MappingProxyType(
    {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
)

PUBLISHED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "deepseek_v32": {
            **_COMMON,
            "architectures": ["DeepseekV32ForCausalLM"],
            "model_type": "deepseek_v32",
            "bos_token_id": 0,
            "eos_token_id": 1,
            "hidden_size": 7168,
            "index_n_heads": 64,
            "intermediate_size": 18432,
            "max_position_embeddings": 163840,
            "n_group": 8,
            "num_attention_heads": 128,
            "num_hidden_layers": 61,
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "quantization_config": {**_FP8, "scale_fmt": "ue8m0"},
            "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 40,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096,
                "type": "yarn",
            },
            "rope_theta": 10000,
            "topk_group": 4,
            "torch_dtype": "bfloat16",
            "v_head_dim": 128,
            "vocab_size": 129280,
        },
        "glm_moe_dsa": {
            **_COMMON,
            "architectures": ["GlmMoeDsaForCausalLM"],
            "model_type": "glm_moe_dsa",
            "dtype": "bfloat16",
            "eos_token_id": [154820, 154827, 154829],
            "hidden_size": 6144,
            "index_n_heads": 32,
            "indexer_rope_interleave": True,
            "intermediate_size": 12288,
            "max_position_embeddings": 202752,
            "n_group": 1,
            "num_attention_heads": 64,
            "num_hidden_layers": 78,
            "num_key_value_heads": 64,
            "q_lora_rank": 2048,
            "qk_nope_head_dim": 192,
            "quantization_config": dict(_FP8),
            "rms_norm_eps": 1e-05,
            "rope_interleave": True,
            "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
            "topk_group": 1,
            "v_head_dim": 256,
            "vocab_size": 154880,
        },
    }
)
"""What ``config.json`` holds, in its own spelling. GLM-5.2 adds ``indexer_types``, which ``parse_config`` reads too."""


def true_shapes(family: str, num_layers: int, num_experts: int, **changes: object) -> DsaConfig:
    """The published config with fewer layers and experts; every layer has its true shape.

    Args:
        family: ``"deepseek_v32"`` or ``"glm_moe_dsa"``.
        num_layers: at least 1; the first three have no experts unless ``first_k_dense_replace`` is among the changes.
        num_experts: routed experts of a layer: for ``deepseek_v32`` a multiple of 8, and at least 16.
        changes: further fields, in the published spelling, e.g. ``vocab_size=1024``.

    Raises:
        ThresherError: an unknown family, or sizes that do not fit together.
    """
    require(family in PUBLISHED, f"family must be one of {', '.join(PUBLISHED)}", repr(family), "name one")
    return parse_config({**PUBLISHED[family], "num_hidden_layers": num_layers, "n_routed_experts": num_experts, **changes})


def random_model(
    config: DsaConfig, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu", seed: int = 0
) -> DsaModel:
    """A model made on its device, frozen: attention is uneven, experts are hit unevenly, and no norm is all ones.

    Args:
        config: the sizes.
        dtype: of the weights.
        device: where they are drawn.
        seed: equal seeds give equal weights on one kind of device.
    """
    with torch.device("meta"):
        shapes = DsaModel(config, dtype)
    model = shapes.to_empty(device=device).requires_grad_(False).eval()
    draw = None if torch.device(device).type == "meta" else torch.Generator(device).manual_seed(seed)
    calm = (2 * config.num_hidden_layers) ** -0.5  # of what is added to the residual stream, twice a layer
    for name, p in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            p.uniform_(0.5, 1.5, generator=draw)
        elif p.dim() == 1:
            p.normal_(std=0.05, generator=draw)
        elif name.startswith("embed"):
            p.normal_(generator=draw)
        else:
            gain = calm if name.endswith(("down", ".o.weight")) else 2.0 if ".q_b." in name else 1.0
            p.normal_(std=gain * p.shape[-1] ** -0.5, generator=draw)
    return model
