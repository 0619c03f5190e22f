"""The lightning indexer that is added to each layer of a dense model (DeepSeek-V3.2-Exp, arXiv 2512.02556, section 2.1).

    I[t,s] = sum_j w[t,j] * relu(q[t,j] . k[s])

Queries go through a low-rank bottleneck, as V3.2's do through its q_lora; the key is one LayerNorm-ed vector a token, shared by all
heads; RoPE turns the first ``rotary_dim`` dims (half-split style). For serving, queries and keys get a Hadamard rotation and FP8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thresher.errors import require
from thresher.ops import apply_rope, hadamard, quantize_fp8
from thresher.types import IndexQuery


@dataclass(frozen=True)
class IndexerConfig:
    """Sizes of one layer's indexer: ``num_heads`` heads of ``head_dim``, queries of rank ``q_rank``."""

    hidden_size: int
    num_heads: int = 32
    head_dim: int = 64
    q_rank: int = 128
    rotary_dim: int = 32
    rope_theta: float = 100000.0


class Indexer(nn.Module):
    """One layer's lightning indexer."""

    def __init__(self, config: IndexerConfig) -> None:
        super().__init__()
        self.config = config
        self.wq_a = nn.Linear(config.hidden_size, config.q_rank, bias=False)
        self.q_norm = nn.RMSNorm(config.q_rank, eps=1e-6)
        self.wq_b = nn.Linear(config.q_rank, config.num_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, config.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(config.head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, config.num_heads, bias=False)

    def queries(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Unquantised queries and weights of T tokens.

        Args:
            hidden: ``[T, hidden]``, what the layer's attention reads.
            positions: int64 ``[T]``, logical.

        Returns:
            q ``[T, H, D]`` fp32 with RoPE, and w ``[T, H]`` fp32 scaled by ``H**-0.5 * D**-0.5``.
        """
        config = self.config
        hidden = hidden.to(self.wk.weight.dtype)
        q = self.wq_b(self.q_norm(self.wq_a(hidden))).unflatten(-1, (config.num_heads, config.head_dim))
        q = apply_rope(q, positions, config.rope_theta, config.rotary_dim, "half")
        return q, self.head_weights(hidden) * (config.num_heads * config.head_dim) ** -0.5

    def head_weights(self, hidden: Tensor) -> Tensor:
        """The weights of ``hidden [T, hidden]`` before any factor: fp32 ``[T, H]``."""
        return self.weights_proj(hidden.to(self.wk.weight.dtype)).float()

    def keys(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Unquantised keys ``[T, D]`` fp32 with RoPE, of ``hidden [T, hidden]`` at ``positions [T]``."""
        k = self.k_norm(self.wk(hidden.to(self.wk.weight.dtype)))
        return apply_rope(k, positions, self.config.rope_theta, self.config.rotary_dim, "half")

    @torch.no_grad()
    def index_query(self, hidden: Tensor, positions: Tensor, requests: Tensor | None = None) -> IndexQuery:
        """What the selectors score with: Hadamard, FP8, the query scale folded into the weights.

        Args:
            hidden: ``[T, hidden]``.
            positions: int64 ``[T]``, logical.
            requests: int64 ``[T]``; all of request 0 if None.
        """
        q, w = self.queries(hidden, positions)
        values, scales = quantize_fp8(hadamard(q))
        if requests is None:
            requests = torch.zeros_like(positions)
        return IndexQuery(values, w * scales, positions, requests)

    @torch.no_grad()
    def index_keys(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys as the cache stores them: e4m3 ``[T, D]`` and fp32 scales ``[T]``, of ``hidden [T, hidden]``."""
        keys = self.keys(hidden, positions)
        require(
            bool(torch.isfinite(keys).all()),
            "index keys must be finite",
            "NaN or inf in them",
            "check the model's weights and the prompt's hidden states",
        )
        return quantize_fp8(hadamard(keys))


def indexer_at(indexers: nn.ModuleList, layer: int) -> Indexer:
    """The indexer of one layer, typed."""
    indexer = indexers[layer]
    assert isinstance(indexer, Indexer)
    return indexer
