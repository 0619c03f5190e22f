"""``python -m thresher.models.tiny_checkpoint --family deepseek_v32 --out DIR``: a random checkpoint in the published file format.

For tests: a few layers, heads and experts in FP8 with block scales, some of them cut off, sharded, with tensors of a layer for multi-token
prediction, and a config in the published spelling. Latents and index keys have their true sizes, since the caches have no other.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from thresher.cache.fp8 import fp8_scale
from thresher.errors import ThresherError, require
from thresher.models.dsa_config import BLOCK, parse_config
from thresher.models.dsa_weights import SCALE, places
from thresher.models.published import PUBLISHED, random_model
from thresher.models.shards import INDEX

NUM_SHARDS = 3

_SMALL: Mapping[str, Any] = MappingProxyType(
    {
        "first_k_dense_replace": 1,
        "hidden_size": 192,
        "index_n_heads": 16,
        "index_topk": 24,
        "intermediate_size": 320,
        "max_position_embeddings": 2560,
        "moe_intermediate_size": 72,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 96,
        "vocab_size": 160,
    }
)
TINY: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "deepseek_v32": {
            **_SMALL,
            "n_group": 4,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "num_hidden_layers": 3,
            "qk_nope_head_dim": 32,
            "rope_scaling": {**PUBLISHED["deepseek_v32"]["rope_scaling"], "original_max_position_embeddings": 64},
            "topk_group": 2,
            "v_head_dim": 40,
        },
        "glm_moe_dsa": {
            **_SMALL,
            "eos_token_id": [1, 2],
            "indexer_types": ["full", "full", "shared", "shared", "full"],
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 5,
            "qk_nope_head_dim": 48,
            "v_head_dim": 64,
        },
    }
)
"""What a tiny checkpoint's config has otherwise than the published one."""


def write_tiny(folder: Path, family: str, seed: int = 0, **changes: object) -> Path:
    """Write a tiny checkpoint into ``folder``, made where it is not there.

    Args:
        folder: new or empty.
        family: ``"deepseek_v32"`` or ``"glm_moe_dsa"``.
        seed: equal seeds give equal files.
        changes: fields of the config, in the published spelling; ``quantization_config=None`` gives bf16 weights.

    Returns:
        ``folder``.

    Raises:
        ThresherError: an unknown family, a folder with something in it, or sizes that do not fit together.
    """
    from safetensors.torch import save_file

    require(family in TINY, f"family must be one of {', '.join(TINY)}", repr(family), "name one")
    folder.mkdir(parents=True, exist_ok=True)
    require(not any(folder.iterdir()), "the folder must be empty", folder, "name a new one")
    data = {**PUBLISHED[family], **TINY[family], **changes}
    config = parse_config(data)
    tensors: dict[str, Tensor] = {}
    for name, place in places(random_model(config, torch.float32, seed=seed)):
        if place.may_be_fp8 and config.quantized:
            tensors[name], tensors[name + SCALE] = quantize_blocks(place.memory)
        else:
            stays = name.endswith("bias") or "k_norm" in name
            tensors[name] = place.memory.clone() if stays else place.memory.bfloat16()
    for layer in range(config.num_nextn_predict_layers):
        for name in ("enorm", "hnorm", "input_layernorm", "shared_head.norm"):
            norm = torch.ones(config.hidden_size, dtype=torch.bfloat16)
            tensors[f"model.layers.{config.num_hidden_layers + layer}.{name}.weight"] = norm
    names = list(tensors)
    size = -(-len(names) // NUM_SHARDS)
    placed: dict[str, str] = {}
    for number in range(NUM_SHARDS):
        shard = f"model-{number + 1:05}-of-{NUM_SHARDS:05}.safetensors"
        held = names[number * size : (number + 1) * size]
        save_file({name: tensors[name].contiguous() for name in held}, folder / shard)
        placed.update(dict.fromkeys(held, shard))
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))})
    _write(folder / "config.json", dict(sorted(data.items())))
    return folder


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight ``[R, C]`` as float8_e4m3fn and one fp32 scale, a power of two, for each block of 128 x 128, those at the edges cut off."""
    rows, columns = weight.shape
    tall, wide = -(-rows // BLOCK), -(-columns // BLOCK)
    blocks = pad(weight, (0, wide * BLOCK - columns, 0, tall * BLOCK - rows)).view(tall, BLOCK, wide, BLOCK)
    scales = fp8_scale(blocks.abs().amax((1, 3)))
    values = (blocks / scales[:, None, :, None]).view(tall * BLOCK, wide * BLOCK)[:rows, :columns]
    return values.to(torch.float8_e4m3fn), scales


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m thresher.models.tiny_checkpoint", description="A random checkpoint for tests.")
    parser.add_argument("--family", choices=sorted(TINY), required=True)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        folder = write_tiny(given.out, given.family, given.seed)
    except ThresherError as error:
        parser.error(str(error))
    print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
