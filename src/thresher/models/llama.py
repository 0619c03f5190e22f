"""A Llama decoder with its attention left open: the caller decides what each layer attends to.

The layer arithmetic is Llama's (RMSNorm, grouped-query attention, RoPE in the half-split style, SwiGLU); the attention itself is a
callback, so dense prefill, sparse decode and indexer training share one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thresher.ops import apply_rope


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama model; names as in transformers' ``LlamaConfig``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    eos_token_id: int


@dataclass(frozen=True)
class LayerInput:
    """What one layer's attention is given, for T tokens of one request.

    Attributes:
        layer: index of the layer.
        hidden: ``[T, hidden]``, after the input norm (what the indexer reads).
        positions: int64 ``[T]``, logical positions.
        q: ``[T, heads, head_dim]``, RoPE applied.
        k: ``[T, kv_heads, head_dim]``, RoPE applied.
        v: ``[T, kv_heads, head_dim]``.
    """

    layer: int
    hidden: Tensor
    positions: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


Attend = Callable[[LayerInput], Tensor]
"""Takes a layer's input, gives the attention output ``[T, heads, head_dim]``."""


class LlamaLayer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        hidden, dim = config.hidden_size, config.head_dim
        self.input_norm = nn.RMSNorm(hidden, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * dim, hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(hidden, eps=config.rms_norm_eps)
        self.gate_proj = nn.Linear(hidden, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, hidden, bias=False)

    def forward(self, layer: int, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        config = self.config
        hidden = self.input_norm(x)
        q = self.q_proj(hidden).unflatten(-1, (config.num_attention_heads, config.head_dim))
        k = self.k_proj(hidden).unflatten(-1, (config.num_key_value_heads, config.head_dim))
        v = self.v_proj(hidden).unflatten(-1, (config.num_key_value_heads, config.head_dim))
        q = apply_rope(q, positions, config.rope_theta, config.head_dim, "half").to(v.dtype)
        k = apply_rope(k, positions, config.rope_theta, config.head_dim, "half").to(v.dtype)
        out = attend(LayerInput(layer, hidden, positions, q, k, v))
        x = x + self.o_proj(out.to(x.dtype).flatten(-2))
        hidden = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Llama(nn.Module):
    """Embedding, layers, final norm and the tied output projection."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states ``[T, hidden]`` after the final norm, for token ids int64 ``[T]`` at ``positions`` int64 ``[T]`` of one request."""
        x = self.embed(ids)
        for index, layer in enumerate(self.layers):
            x = layer(index, x, positions, attend)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits ``[T, vocab]`` of hidden states ``[T, hidden]``."""
        return F.linear(hidden, self.embed.weight).float()


def causal_attention(given: LayerInput) -> Tensor:
    """Dense causal attention of a prompt over itself (its tokens must start at position 0): ``[T, heads, head_dim]``."""
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (given.q, given.k, given.v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).squeeze(0).transpose(0, 1)
