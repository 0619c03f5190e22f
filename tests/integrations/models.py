"""Tiny DSA models of transformers with random weights, and a look at what their indexers return."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", minversion="5.17")

TOPK, HEADS, VOCABULARY = 12, 8, 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": TOPK,
    "index_head_dim": 16,
    "index_n_heads": HEADS,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES = {
    "deepseek_v32": (transformers.DeepseekV32Config, transformers.DeepseekV32ForCausalLM, {"num_hidden_layers": 3}),
    "glm_moe_dsa": (
        transformers.GlmMoeDsaConfig,
        transformers.GlmMoeDsaForCausalLM,
        {"num_hidden_layers": 4, "indexer_types": ["full", "shared", "full", "shared"]},
    ),
}
# What a forward calls its cache: another name since 5.24.
CACHE = "cache" if [int(part) for part in transformers.__version__.split(".")[:2]] >= [5, 24] else "past_key_values"


both = pytest.mark.parametrize("family", FAMILIES)


@cache
def make_model(family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> nn.Module:
    """One for all tests, to be left as it is."""
    config, model, more = FAMILIES[family]
    torch.manual_seed(5)
    made = model(config(**SIZES, **more)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.normal_(std=0.25)
    made.set_attn_implementation(attention)
    return made.to(dtype).requires_grad_(False)


def make_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def make_cache(model: nn.Module, kind: str = "dynamic") -> transformers.Cache:
    if kind == "static":
        return transformers.StaticCache(config=model.config, max_cache_len=40)
    return transformers.DynamicCache(config=model.config)


def indexers(model: nn.Module) -> list[nn.Module]:
    """Of the layers that have one."""
    return [layer.self_attn.indexer for layer in model.model.layers if layer.self_attn.indexer is not None]


@dataclass
class Picked:
    """What indexers returned, call after call.

    Attributes:
        indices: int32 ``[B, S, k]``.
        sets: bool ``[B, S, T]``, the columns that a query both sees and was given.
        seen: bool ``[B, S, T]``.
    """

    indices: list[Tensor] = field(default_factory=list)
    sets: list[Tensor] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)


@contextmanager
def recorded(model: nn.Module) -> Iterator[Picked]:
    picked = Picked()

    def keep(module: nn.Module, args: tuple, indices: Tensor) -> None:
        mask = args[3]
        seen = mask if mask.dtype == torch.bool else mask == 0
        picked.indices.append(indices)
        picked.seen.append(seen)
        picked.sets.append(torch.zeros_like(seen).scatter(-1, indices.long(), True) & seen)

    handles = [indexer.register_forward_hook(keep) for indexer in indexers(model)]
    try:
        yield picked
    finally:
        for handle in handles:
            handle.remove()


def run(model: nn.Module, ids: Tensor, **options: Tensor) -> tuple[Tensor, Picked]:
    """Last hidden states of a prefill, and what the indexers returned."""
    with recorded(model) as picked:
        return model.model(ids, use_cache=False, **options).last_hidden_state, picked


def decode(model: nn.Module, ids: Tensor, cache: transformers.Cache, start: int = 0) -> tuple[Tensor, Picked]:
    """The same of a token at a time, from ``start`` on."""
    if start:
        model.model(ids[:, :start], use_cache=True, **{CACHE: cache})
    with recorded(model) as picked:
        steps = [model.model(token, use_cache=True, **{CACHE: cache}).last_hidden_state for token in ids[:, start:].split(1, dim=1)]
        return torch.cat(steps, dim=1), picked


def same_sets(own: Picked, ours: Picked) -> bool:
    """Whether all sets are equal; false where a near-tie was broken in another way, which fp32 allows. Anything else fails.

    The model's own indices stand by score, so what a near-tie swaps is its last one, for one other. Only the first call with a difference
    is looked at: what follows has other inputs.
    """
    assert len(own.sets) == len(ours.sets) > 0
    for theirs, indices, mine in zip(own.sets, own.indices, ours.sets, strict=True):
        unequal = theirs ^ mine
        rows = unequal.any(-1)
        if rows.any():
            assert rows.sum() <= 1 + 0.005 * rows.numel()
            assert (unequal[rows].sum(-1) == 2).all()
            assert unequal[rows].gather(-1, indices[rows][:, -1:].long()).all()
            return False
    return True
