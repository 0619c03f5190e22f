"""A tiny checkpoint in transformers' own classes, and what the two sides see as they run."""

from __future__ import annotations

import json
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from thresher.models.dsa_layers import DsaModel
from thresher.models.dsa_weights import load_model
from thresher.models.tiny_checkpoint import write_tiny

from .dsa_reference import published_tensors

FAMILIES = ("deepseek_v32", "glm_moe_dsa")
TOPK = 24
VOCAB = 160
FOLDER = TemporaryDirectory()
"""Gone when the process ends."""


@cache
def tiny_folder(family: str) -> Path:
    """Made once a process; do not write there."""
    return write_tiny(Path(FOLDER.name) / family, family)


@cache
def tiny_model(family: str, dtype: torch.dtype = torch.float32) -> DsaModel:
    return load_model(tiny_folder(family), dtype, write=lambda line: None)


def text(count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


@cache
def peer(family: str):
    """transformers' model in fp32 with the checkpoint's dequantised weights."""
    import transformers

    names = {"deepseek_v32": "DeepseekV32", "glm_moe_dsa": "GlmMoeDsa"}
    data = json.loads((tiny_folder(family) / "config.json").read_text())
    config = getattr(transformers, names[family] + "Config").from_dict({**data, "quantization_config": None})
    config._attn_implementation = "eager"
    model = getattr(transformers, names[family] + "ForCausalLM")(config).float().eval()
    held = published_tensors(tiny_folder(family))
    experts = range(data["n_routed_experts"])
    state = {}
    for name in model.state_dict():
        base = name.rpartition(".")[0]
        if name.endswith("experts.gate_up_proj"):
            state[name] = torch.stack([torch.cat([held[f"{base}.{e}.{part}_proj.weight"] for part in ("gate", "up")]) for e in experts])
        elif name.endswith("experts.down_proj"):
            state[name] = torch.stack([held[f"{base}.{e}.down_proj.weight"] for e in experts])
        else:
            state[name] = held[name]
    model.load_state_dict(state, strict=True)
    return model


def peer_cache(family: str):
    from transformers import DynamicCache

    return DynamicCache(config=peer(family).config)


@torch.no_grad()
def run_peer(family: str, ids: Tensor, cache=None) -> tuple[Tensor, Tensor, dict[int, list[set[int]]]]:
    """Hidden states ``[T, hidden]`` after the final norm, logits ``[T, vocab]``, and layer -> the sets of its tokens, masked keys aside."""
    model = peer(family)
    sets: dict[int, list[set[int]]] = {}
    start = 0 if cache is None else cache.get_seq_length()

    def look(layer: int):
        def hook(module, given, out):
            sets[layer] = [{s for s in row.tolist() if s <= start + t} for t, row in enumerate(out[0])]

        return hook

    indexers = {i: layer.self_attn.indexer for i, layer in enumerate(model.model.layers) if layer.self_attn.indexer is not None}
    hooks = [indexer.register_forward_hook(look(i)) for i, indexer in indexers.items()]
    try:
        out = model(ids[None], cache=cache, use_cache=cache is not None, output_hidden_states=True)
    finally:
        for hook in hooks:
            hook.remove()
    return out.hidden_states[-1][0], out.logits[0], sets


class Watched:
    """What the layers of a ``DsaModel`` were given, call after call."""

    def __init__(self) -> None:
        self.hidden: dict[int, list[Tensor]] = {}
        self.attended: dict[int, list[Tensor]] = {}
        self.index: dict[int, list] = {}

    def whole(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """The indexer's q, weights and keys of all calls, one below the other."""
        calls = self.index[layer]
        return tuple(torch.cat([getattr(call, name) for call in calls]) for name in ("q", "weights", "key"))  # type: ignore[return-value]


@contextmanager
def watch(model: DsaModel):
    seen, hooks = Watched(), []
    for number, layer in enumerate(model.layers):

        def keep(into: dict, number: int):
            return lambda module, given, out: into.setdefault(number, []).append(out)

        hooks.append(layer.input_norm.register_forward_hook(keep(seen.hidden, number)))
        hooks.append(layer.attention.o.register_forward_hook(keep(seen.attended, number)))
        if layer.attention.indexer is not None:
            hooks.append(layer.attention.indexer.register_forward_hook(keep(seen.index, number)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def rows(selection) -> list[set[int]]:
    """The sets of a selection."""
    return [set(row[row >= 0].tolist()) for row in selection.indices]
