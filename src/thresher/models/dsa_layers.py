"""A DSA model with its attention left open: DeepSeek-V3.2's layers and GLM-5's, MLA with absorbed projections.

Keys and values of MLA are linear in a token's latent c (512 numbers): head n has ``k = K_n c`` and ``v = V_n c``, the two parts of the
published ``kv_b_proj``. So ``q . k = (K_n' q) . c``, and ``sum_s p_s v_s = V_n sum_s p_s c_s``: the query goes into the space of latents,
every head attends to the latents themselves, and the output comes back through V_n. What attends is a callback, as in ``models.llama``.

Over ranks the weights are shared out as tensor parallelism does: heads of the attention, inner dims of the MLPs and experts, and tokens of
the vocabulary. Each rank holds in full what the planner says it does: the indexer, both down-projections of the attention, the router.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thresher.distributed.collectives import Alone, Collectives, add_up, own_heads, own_share, share_heads
from thresher.errors import require
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
class Projected:
    """What the projections of a layer make of T tokens of any requests.

    Attributes:
        q: ``[T, own heads, 576]``, absorbed: 512 dims of the latent, then 64 with RoPE. The heads are the rank's own.
        latent: ``[T, 512]``.
        rope: ``[T, 64]``, RoPE applied.
        index: None where the layer shares another one's selection.
    """

    q: Tensor
    latent: Tensor
    rope: Tensor
    index: IndexInput | None


@dataclass(frozen=True)
class DsaInput(Projected):
    """The same with ``layer``, the index of the layer: what its attention is given."""

    layer: int


Attend = Callable[[DsaInput], Tensor]
"""Takes a layer's input, gives the attention over latents, ``[T, own heads, 512]``."""


class DsaIndexer(nn.Module):
    """The lightning indexer: queries from the attention's own low-rank query, one key a token, made with it."""

    def __init__(self, config: DsaConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        heads, dim = config.index_n_heads, config.index_head_dim
        self.wq_b = nn.Linear(config.q_lora_rank, heads * dim, bias=False, dtype=dtype)
        self.k_norm = nn.LayerNorm(dim, eps=NORM_EPS, dtype=torch.float32)
        self.weights_proj = nn.Linear(config.hidden_size, heads, bias=False, dtype=torch.float32)

    def forward(self, hidden: Tensor, q_low: Tensor, key: Tensor, turn: Rotation) -> IndexInput:
        style = self.config.index_rope
        q = self.wq_b(q_low).unflatten(-1, (self.config.index_n_heads, self.config.index_head_dim))
        return IndexInput(rotate(q, turn, style), self.weights_proj(hidden.float()), rotate(self.k_norm(key.float()), turn, style))


class DsaAttention(nn.Module):
    """MLA: queries through a low rank, keys and values through latents. A rank has some of the heads, and makes a part of a sum.

    What reads the hidden state stands in one matrix, ``low``: the rows of the low-rank query, of latent and RoPE part, and with an indexer
    of the index key.
    """

    def __init__(self, config: DsaConfig, has_indexer: bool, dtype: torch.dtype, ranks: Collectives) -> None:
        super().__init__()
        self.config = config
        hidden, nope, rope = config.hidden_size, config.qk_nope_head_dim, config.qk_rope_head_dim
        heads = own_share(config.num_attention_heads, ranks)
        self.rows = [config.q_lora_rank, config.kv_lora_rank, rope, config.index_head_dim if has_indexer else 0]
        self.low = nn.Parameter(torch.empty(sum(self.rows), hidden, dtype=dtype))
        self.q_norm = nn.RMSNorm(config.q_lora_rank, eps=NORM_EPS, dtype=dtype)
        self.q_b = nn.Linear(config.q_lora_rank, heads * (nope + rope), bias=False, dtype=dtype)
        self.kv_norm = nn.RMSNorm(config.kv_lora_rank, eps=NORM_EPS, dtype=dtype)
        self.kv_b = nn.Parameter(torch.empty(heads, nope + config.v_head_dim, config.kv_lora_rank, dtype=dtype))
        self.o = nn.Linear(heads * config.v_head_dim, hidden, bias=False, dtype=dtype)
        self.indexer = DsaIndexer(config, dtype) if has_indexer else None

    def project(self, hidden: Tensor, turn: Rotation) -> Projected:
        """What the attention is given."""
        config = self.config
        to_key = self.kv_b[:, : config.qk_nope_head_dim]
        rows = [*self.rows[:3], 0 if self.indexer is None else self.rows[3]]
        q_low, latent, rope, key = F.linear(hidden, self.low[: sum(rows)]).split(rows, dim=-1)
        q_low = self.q_norm(q_low)
        q = self.q_b(q_low).unflatten(-1, (len(self.kv_b), -1))
        q_plain, q_rope = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        absorbed = torch.einsum("thn,hnc->thc", q_plain, to_key)
        return Projected(
            torch.cat((absorbed, rotate(q_rope, turn, "interleaved").to(q.dtype)), dim=-1),
            self.kv_norm(latent),
            rotate(rope, turn, "interleaved").to(q.dtype),
            None if self.indexer is None else self.indexer(hidden, q_low, key, turn),
        )

    def output(self, attended: Tensor) -> Tensor:
        """``[T, hidden]`` of the attention over latents, ``[T, own heads, 512]``."""
        to_value = self.kv_b[:, self.config.qk_nope_head_dim :]
        out = torch.einsum("thc,hvc->thv", attended.to(to_value.dtype), to_value)
        return self.o(out.flatten(-2))  # type: ignore[no-any-return]


class DsaLayer(nn.Module):
    """Two blocks, each added to what goes in; all ranks have what comes out."""

    def __init__(self, config: DsaConfig, layer: int, dtype: torch.dtype, ranks: Collectives) -> None:
        super().__init__()
        self.ranks = ranks
        hidden = config.hidden_size
        self.input_norm = nn.RMSNorm(hidden, eps=config.rms_norm_eps, dtype=dtype)
        self.attention = DsaAttention(config, config.index_layers[layer] == layer, dtype, ranks)
        self.mlp_norm = nn.RMSNorm(hidden, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = MoE(config, dtype, ranks) if config.sparse_mlp[layer] else MLP(hidden, config.intermediate_size, dtype, ranks)

    def forward(self, layer: int, x: Tensor, turn: Rotation, attend: Attend) -> Tensor:
        x = x + self.attended(layer, x, turn, attend)
        return x + self.fed_forward(x)

    def attended(self, layer: int, x: Tensor, turn: Rotation, attend: Attend) -> Tensor:
        """What the attention block adds to ``x [T, hidden]``."""
        return add_up(self.after(attend(self.given(layer, x, turn))), self.ranks)

    def fed_forward(self, x: Tensor) -> Tensor:
        """What the MLP or the experts add to ``x [T, hidden]``."""
        return add_up(self.feed(x), self.ranks)

    def given(self, layer: int, x: Tensor, turn: Rotation) -> DsaInput:
        """What the attention of ``x [T, hidden]`` is given."""
        made = self.before(x, turn)
        return DsaInput(made.q, made.latent, made.rope, made.index, layer)

    def before(self, x: Tensor, turn: Rotation) -> Projected:
        """Norm and projections."""
        return self.attention.project(self.input_norm(x), turn)

    def after(self, attended: Tensor) -> Tensor:
        """The output projection: on a rank a part of a sum."""
        return self.attention.output(attended)

    def feed(self, x: Tensor) -> Tensor:
        """Norm and MLP: on a rank a part of a sum."""
        return self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]

    def compile(self, **options: Any) -> None:
        """What lies before, between and behind the attention and the exchanges by ``torch.compile``, which fuses norms, RoPE and casts."""
        for name in ("before", "after", "feed"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=False, fullgraph=True, **options))


class DsaModel(nn.Module):
    """Embedding, layers, final norm and the output projection, which may be the embedding.

    Args:
        config: the sizes, of all ranks together.
        dtype: of the weights that need not be fp32.
        ranks: the ranks, of which this process is one and holds one's weights.

    Raises:
        ThresherError: more ranks than attention heads.
    """

    def __init__(self, config: DsaConfig, dtype: torch.dtype, ranks: Collectives | None = None) -> None:
        super().__init__()
        self.config, self.ranks = config, ranks or Alone()
        heads, count = config.num_attention_heads, self.ranks.ranks
        require(count <= heads, f"ranks must be at most the model's {heads} attention heads", count, "start fewer processes")
        self.shares = share_heads(config.vocab_size, count)
        vocab = self.shares[self.ranks.rank]
        self.embed = nn.Embedding(vocab, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(DsaLayer(config, layer, dtype, self.ranks) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, vocab, bias=False, dtype=dtype)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states ``[T, hidden]`` after the final norm, for token ids int64 ``[T]`` at ``positions`` int64 ``[T]``."""
        x = self.embedded(ids)
        turn = rotation(self.config.rope, self.config.qk_rope_head_dim, positions)
        for index, layer in enumerate(self.layers):
            x = layer(index, x, turn, attend)
        return self.norm(x)

    def embedded(self, ids: Tensor) -> Tensor:
        """``[T, hidden]`` of token ids int64 ``[T]``: a rank has the rows of some tokens, and zeros for the rest."""
        if self.ranks.ranks == 1:
            whole: Tensor = self.embed(ids)
            return whole
        own = own_heads(self.shares, self.ranks.rank)
        here = (ids >= own.start) & (ids < own.stop)
        rows = self.embed((ids - own.start).clamp(0, own.stop - own.start - 1))
        return add_up(rows.masked_fill(~here[:, None], 0), self.ranks)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits ``[T, vocab]`` of hidden states ``[T, hidden]``."""
        own = F.linear(hidden, self.embed.weight if self.head is None else self.head.weight).float()
        return self.ranks.gather_heads(own, self.shares)
