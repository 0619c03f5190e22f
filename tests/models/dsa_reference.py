"""A published DSA checkpoint computed straight from its tensors and ``config.json``: fp64, dense masks, nothing of the package's models.

With ``fp8`` it rounds where serving rounds: index queries and keys after Hadamard, latents, RoPE parts and absorbed queries.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F


def published_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor by its published name in fp32, FP8 weights multiplied by their block scales."""
    held: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            held.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    made = {}
    for name, tensor in held.items():
        scale = held.get(name + "_scale_inv")
        if scale is not None:
            rows, columns = (torch.arange(size) // 128 for size in tensor.shape)
            made[name] = tensor.float() * scale[rows][:, columns]
        elif not name.endswith("_scale_inv"):
            made[name] = tensor.float()
    return made


def round_fp8(x: Tensor, group: int) -> Tensor:
    """e4m3 under a power-of-two scale for every ``group`` numbers of the last dim, back in fp64."""
    parts = x.float().unflatten(-1, (-1, group))
    scale = torch.exp2(torch.ceil(torch.log2(parts.abs().amax(-1, keepdim=True).clamp(min=1e-4).double() / 448)))
    return ((parts / scale).float().to(torch.float8_e4m3fn).double() * scale).flatten(-2)


def hadamard_matrix(dim: int) -> Tensor:
    made = torch.ones(1, 1, dtype=torch.float64)
    while len(made) < dim:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made * dim**-0.5


@dataclass
class Seen:
    """What one pass gave: hidden states ``[T, hidden]``, and for each layer the sets of its tokens."""

    hidden: Tensor
    sets: list[list[set[int]]] = field(default_factory=list)


class Reference:
    def __init__(self, folder: Path, fp8: bool = False) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.weights = {name: tensor.double() for name, tensor in published_tensors(folder).items()}
        self.fp8 = fp8
        self.half_index = self.config["model_type"] == "deepseek_v32"

    @torch.no_grad()
    def run(self, ids: Tensor) -> Seen:
        """A text from its first token on."""
        c = self.config
        x = self.weights["model.embed_tokens.weight"][ids]
        seen = Seen(x)
        for layer in range(c["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            h = self._norm(x, at + "input_layernorm", c["rms_norm_eps"])
            seen.sets.append(self.select(layer, h) if self.has_indexer(layer) else seen.sets[-1])
            x = x + self.attend(layer, h, seen.sets[-1])
            h = self._norm(x, at + "post_attention_layernorm", c["rms_norm_eps"])
            x = x + (self._swiglu(at + "mlp.", h) if layer < c["first_k_dense_replace"] else self._experts(at + "mlp.", h))
        seen.hidden = self._norm(x, "model.norm", c["rms_norm_eps"])
        return seen

    def has_indexer(self, layer: int) -> bool:
        return f"model.layers.{layer}.self_attn.indexer.wk.weight" in self.weights

    def scores(self, layer: int, h: Tensor) -> Tensor:
        """Index scores ``[T, T]`` of what the layer's attention reads."""
        c, at = self.config, f"model.layers.{layer}.self_attn.indexer."
        heads, dim = c["index_n_heads"], c["index_head_dim"]
        q = self._turn(self._linear(self._low(layer, h), at + "wq_b").unflatten(-1, (heads, dim)), self.half_index)
        k = F.layer_norm(self._linear(h, at + "wk"), [dim], self.weights[at + "k_norm.weight"], self.weights[at + "k_norm.bias"], 1e-6)
        k = self._turn(k, self.half_index)
        if self.fp8:
            q, k = (round_fp8(x @ hadamard_matrix(dim), dim) for x in (q, k))
        w = self._linear(h, at + "weights_proj") * heads**-0.5 * dim**-0.5
        return torch.einsum("th,ths->ts", w, torch.einsum("thd,sd->ths", q, k).relu())

    def select(self, layer: int, h: Tensor) -> list[set[int]]:
        """For each token the best of those up to it; ties to the smaller position."""
        scores = self.scores(layer, h).tolist()
        return [set(sorted(range(t + 1), key=lambda s: (-row[s], s))[: self.config["index_topk"]]) for t, row in enumerate(scores)]

    def attend(self, layer: int, h: Tensor, sets: list[set[int]]) -> Tensor:
        """The attention's output ``[T, hidden]``, each token over its set."""
        c, at = self.config, f"model.layers.{layer}.self_attn."
        heads, nope, value = c["num_attention_heads"], c["qk_nope_head_dim"], c["v_head_dim"]
        q = self._linear(self._low(layer, h), at + "q_b_proj").unflatten(-1, (heads, -1))
        down = self._linear(h, at + "kv_a_proj_with_mqa")
        latent, rope = self._norm(down[:, :512], at + "kv_a_layernorm"), self._turn(down[:, 512:], False)
        to_key, to_value = self.weights[at + "kv_b_proj.weight"].unflatten(0, (heads, nope + value)).split([nope, value], 1)
        q = torch.cat([torch.einsum("thn,hnc->thc", q[..., :nope], to_key), self._turn(q[..., nope:], False)], -1)
        if self.fp8:
            q, latent, rope = q.bfloat16().double(), round_fp8(latent, 128), rope.bfloat16().double()
        scale = (nope + 64) ** -0.5
        if c.get("rope_scaling"):
            scale *= (0.1 * c["rope_scaling"]["mscale_all_dim"] * math.log(c["rope_scaling"]["factor"]) + 1) ** 2
        logits = torch.einsum("thc,sc->ths", q, torch.cat([latent, rope], -1)) * scale
        mask = torch.zeros(len(h), len(h), dtype=torch.bool)
        for t, kept in enumerate(sets):
            mask[t, sorted(kept)] = True
        out = torch.einsum("ths,sc->thc", logits.masked_fill(~mask[:, None], -math.inf).softmax(-1), latent)
        return self._linear(torch.einsum("thc,hvc->thv", out, to_value).flatten(-2), at + "o_proj")

    def _low(self, layer: int, h: Tensor) -> Tensor:
        at = f"model.layers.{layer}.self_attn."
        return self._norm(self._linear(h, at + "q_a_proj"), at + "q_a_layernorm")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[name + ".weight"].T

    def _norm(self, x: Tensor, name: str, eps: float = 1e-6) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * self.weights[name + ".weight"]

    def _swiglu(self, at: str, h: Tensor) -> Tensor:
        gate = self._linear(h, at + "gate_proj")
        return self._linear(gate * gate.sigmoid() * self._linear(h, at + "up_proj"), at + "down_proj")

    def _experts(self, at: str, h: Tensor) -> Tensor:
        c = self.config
        scores = self._linear(h, at + "gate").sigmoid()
        size = c["n_routed_experts"] // c["n_group"]
        out = self._swiglu(at + "shared_experts.", h)
        for t in range(len(h)):
            choice = (scores[t] + self.weights[at + "gate.e_score_correction_bias"]).tolist()
            worth = {g: sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(c["n_group"])}
            groups = sorted(worth, key=lambda g: -worth[g])[: c["topk_group"]]
            experts = sorted((e for e in range(len(choice)) if e // size in groups), key=lambda e: -choice[e])[: c["num_experts_per_tok"]]
            total = sum(scores[t, e] for e in experts)
            for e in experts:
                out[t] += self._swiglu(f"{at}experts.{e}.", h[t]) * scores[t, e] / total * c["routed_scaling_factor"]
        return out

    def _turn(self, x: Tensor, half: bool) -> Tensor:
        """RoPE on the first 64 dims, as products of complex numbers."""
        c, dim = self.config, 64
        scaling = c.get("rope_scaling")
        theta = (c.get("rope_parameters") or c)["rope_theta"]
        turns = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        if scaling:
            seen = scaling["original_max_position_embeddings"]
            edges = [dim * math.log(seen / (n * 2 * math.pi)) / (2 * math.log(theta)) for n in (scaling["beta_fast"], scaling["beta_slow"])]
            low, high = max(math.floor(edges[0]), 0), min(math.ceil(edges[1]), dim - 1)
            slowed = ((torch.arange(dim // 2) - low) / (high - low)).clamp(0, 1)
            turns = turns * (1 - slowed) + turns / scaling["factor"] * slowed
        angles = torch.arange(len(x), dtype=torch.float64)[:, None] * turns
        spin = torch.polar(torch.ones_like(angles), angles).view(len(x), *[1] * (x.dim() - 2), dim // 2)
        a, b = (x[..., :32], x[..., 32:dim]) if half else (x[..., :dim:2], x[..., 1:dim:2])
        turned = torch.complex(a, b) * spin
        parts = (turned.real, turned.imag)
        return torch.cat([torch.cat(parts, -1) if half else torch.stack(parts, -1).flatten(-2), x[..., dim:]], -1)
