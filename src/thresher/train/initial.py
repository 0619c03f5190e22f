"""Where training starts: at random, or with the slow part of the attention that the indexer is to imitate.

Started at random, an indexer learns recency and topic within a few hundred steps, but hardly learns to find an exact earlier passage:
the match needs its query, its key and its bottleneck to agree on token identity all at once (docs/lab-log.md has the figures). A dense
model's retrieval heads already hold that match, in the RoPE pairs that turn so slowly that distance hardly matters to them. So those
rows of the attention's own projections are copied into the dims of the indexer that RoPE leaves alone.
"""

from __future__ import annotations

import torch
from torch import nn

from thresher.errors import require
from thresher.models.indexer import Indexer, IndexerConfig
from thresher.models.llama import Llama, LlamaLayer


def new_indexers(config: IndexerConfig, model: Llama, seed: int, start: str) -> nn.ModuleList:
    """One indexer for each layer of ``model``, fp32 on its device; the same for the same seed everywhere.

    Args:
        config: sizes.
        model: the dense model.
        seed: of the random part.
        start: "random", or "attention" to copy the slow RoPE pairs in.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        indexers = nn.ModuleList(Indexer(config) for _ in model.layers)
    indexers.to(model.device)
    for indexer, layer in zip(indexers, model.layers, strict=True) if start == "attention" else ():
        assert isinstance(indexer, Indexer)
        assert isinstance(layer, LlamaLayer)
        copy_slow_pairs(indexer, layer)
    return indexers


def slow_pairs(config: IndexerConfig, heads: int, kv_heads: int, head_dim: int) -> int:
    """How many RoPE pairs of an attention head fit: every group into the indexer's unrotated dims, every head into its bottleneck."""
    return min((config.head_dim - config.rotary_dim) // (2 * kv_heads), config.q_rank // (2 * heads), head_dim // 2)


@torch.no_grad()
def copy_slow_pairs(indexer: Indexer, layer: LlamaLayer) -> None:
    """Copy the slowest RoPE pairs of ``layer``'s query and key projections into ``indexer``, in place.

    Index head j starts as attention head ``j % heads``, at full strength for the first ``heads`` index heads and at half for later rounds
    (which differ from one another by their random part); a last, incomplete round stays random.
    """
    config, sizes = indexer.config, layer.config
    heads, kv_heads, dim = sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim
    require(config.num_heads >= heads, f"the indexer must have at least {heads} heads", config.num_heads, "raise num_heads")
    pairs = slow_pairs(config, heads, kv_heads, dim)
    first = dim // 2 - pairs
    slow = [*range(first, dim // 2), *range(first + dim // 2, dim)]  # half-split: pair i is dims i and i + dim / 2
    n = len(slow)
    keys = layer.k_proj.weight.float().unflatten(0, (kv_heads, dim))[:, slow]
    queries = layer.q_proj.weight.float().unflatten(0, (heads, dim))[:, slow]
    indexer.wk.weight[config.rotary_dim : config.rotary_dim + kv_heads * n] = keys.flatten(0, 1)
    indexer.wq_a.weight[: heads * n] = queries.flatten(0, 1)
    unfold = indexer.wq_b.weight.unflatten(0, (config.num_heads, config.head_dim))
    unfold *= 0.5
    identity = torch.eye(n, device=unfold.device)
    for j in range(config.num_heads // heads * heads):
        head = j % heads
        row, column = config.rotary_dim + head // (heads // kv_heads) * n, head * n
        unfold[j, row : row + n, column : column + n] += identity * (1.0 if j < heads else 0.5)
