"""A DSA model with its attention left open: DeepSeek-V3.2's layers and GLM-5's, MLA with absorbed projections.

Keys and values of MLA are linear in a token's latent c (512 numbers): head n has ``k = K_n c`` and ``v = V_n c``, the two parts of the
published ``kv_b_proj``. So ``q . k = (K_n' q) . c``, and ``sum_s p_s v_s = V_n sum_s p_s c_s``: the query goes into the space of latents,
every head attends to the latents themselves, and the output comes back through V_n. What attends is a callback, as in ``models.llama``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thresher.models.dsa_config import DsaConfig
from thresher.models.dsa_moe import MLP, MoE
from thresher.models.dsa_rope import Rotation, rotate, rotation

NORM_EPS = 1e-6
"""Of the norms inside the attention, whatever the config's ``rms_norm_eps``."""


@dataclass(frozen=True)
class IndexInput:
    """The indexer's part of a layer's input, unquantised, RoPE applied.

    Attributes:
        q: fp32 ``[T, index_heads, index_dim]``.
        weights: fp32 ``[T, index_heads]``, before any factor.
        key: fp32 ``[T, index_dim]``.
    """

    q: Tensor
    weights: Tensor
    key: Tensor


@dataclass(frozen=True)
class DsaInput:
    """What one layer's attention is given, for T tokens of any requests.

    Attributes:
        layer: index of the layer.
        q: ``[T, heads, 576]``, absorbed: 512 dims of the latent, then 64 with RoPE.
        latent: ``[T, 512]``.
        rope: ``[T, 64]``, RoPE applied.
        index: None where the layer shares another one's selection.
    """

    layer: int
    q: Tensor
    latent: Tensor
    rope: Tensor
    index: IndexInput | None


Attend = Callable[[DsaInput], Tensor]
"""Takes a layer's input, gives the attention over latents, ``[T, heads, 512]``."""


class DsaIndexer(nn.Module):
    """The lightning indexer: queries from the attention's own low-rank query, one key a token."""

    def __init__(self, config: DsaConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        heads, dim = config.index_n_heads, config.index_head_dim
        self.wq_b = nn.Linear(config.q_lora_rank, heads * dim, bias=False, dtype=dtype)
        self.wk = nn.Linear(config.hidden_size, dim, bias=False, dtype=dtype)
        self.k_norm = nn.LayerNorm(dim, eps=NORM_EPS, dtype=torch.float32)
        self.weights_proj = nn.Linear(config.hidden_size, heads, bias=False, dtype=torch.float32)

    def forward(self, hidden: Tensor, q_low: Tensor, turn: Rotation) -> IndexInput:
        style = self.config.index_rope
        q = self.wq_b(q_low).unflatten(-1, (self.config.index_n_heads, self.config.index_head_dim))
        key = self.k_norm(self.wk(hidden).float())
        return IndexInput(rotate(q, turn, style), self.weights_proj(hidden.float()), rotate(key, turn, style))


class DsaAttention(nn.Module):
    """MLA: queries through a low rank, keys and values through latents."""

    def __init__(self, config: DsaConfig, has_indexer: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        hidden, heads, nope, rope = config.hidden_size, config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
        self.q_a = nn.Linear(hidden, config.q_lora_rank, bias=False, dtype=dtype)
        self.q_norm = nn.RMSNorm(config.q_lora_rank, eps=NORM_EPS, dtype=dtype)
        self.q_b = nn.Linear(config.q_lora_rank, heads * (nope + rope), bias=False, dtype=dtype)
        self.kv_a = nn.Linear(hidden, config.kv_lora_rank + rope, bias=False, dtype=dtype)
        self.kv_norm = nn.RMSNorm(config.kv_lora_rank, eps=NORM_EPS, dtype=dtype)
        self.kv_b = nn.Parameter(torch.empty(heads, nope + config.v_head_dim, config.kv_lora_rank, dtype=dtype))
        self.o = nn.Linear(heads * config.v_head_dim, hidden, bias=False, dtype=dtype)
        self.indexer = DsaIndexer(config, dtype) if has_indexer else None

    def forward(self, layer: int, hidden: Tensor, turn: Rotation, attend: Attend) -> Tensor:
        config = self.config
        to_key, to_value = self.kv_b.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        q_low = self.q_norm(self.q_a(hidden))
        q = self.q_b(q_low).unflatten(-1, (config.num_attention_heads, -1))
        q_plain, q_rope = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        latent, rope = self.kv_a(hidden).split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        absorbed = torch.einsum("thn,hnc->thc", q_plain, to_key)
        given = DsaInput(
            layer,
            torch.cat((absorbed, rotate(q_rope, turn, "interleaved").to(q.dtype)), dim=-1),
            self.kv_norm(latent),
            rotate(rope, turn, "interleaved").to(q.dtype),
            None if self.indexer is None else self.indexer(hidden, q_low, turn),
        )
        out = torch.einsum("thc,hvc->thv", attend(given).to(q.dtype), to_value)
        return self.o(out.flatten(-2))


class DsaLayer(nn.Module):
    def __init__(self, config: DsaConfig, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.input_norm = nn.RMSNorm(hidden, eps=config.rms_norm_eps, dtype=dtype)
        self.attention = DsaAttention(config, config.index_layers[layer] == layer, dtype)
        self.mlp_norm = nn.RMSNorm(hidden, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = MoE(config, dtype) if config.sparse_mlp[layer] else MLP(hidden, config.intermediate_size, dtype)

    def forward(self, layer: int, x: Tensor, turn: Rotation, attend: Attend) -> Tensor:
        x = x + self.attention(layer, self.input_norm(x), turn, attend)
        return x + self.mlp(self.mlp_norm(x))


class DsaModel(nn.Module):
    """Embedding, layers, final norm and the output projection, which may be the embedding."""

    def __init__(self, config: DsaConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(DsaLayer(config, layer, dtype) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        tied = config.tie_word_embeddings
        self.head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states ``[T, hidden]`` after the final norm, for token ids int64 ``[T]`` at ``positions`` int64 ``[T]``."""
        x = self.embed(ids)
        turn = rotation(self.config.rope, self.config.qk_rope_head_dim, positions)
        for index, layer in enumerate(self.layers):
            x = layer(index, x, turn, attend)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits ``[T, vocab]`` of hidden states ``[T, hidden]``."""
        return F.linear(hidden, self.embed.weight if self.head is None else self.head.weight).float()
