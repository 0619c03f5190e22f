"""A small random model and its indexers, and fp64 forms of what they compute."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thresher.models.indexer import Indexer, IndexerConfig
from thresher.models.llama import LayerInput, Llama, LlamaConfig, causal_attention

CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    rope_theta=100000.0,
    rms_norm_eps=1e-5,
    eos_token_id=2,
)
INDEXER = IndexerConfig(hidden_size=48, num_heads=16, head_dim=32, q_rank=64, rotary_dim=8)


def tiny_model(config: LlamaConfig = CONFIG, seed: int = 0) -> Llama:
    """Random weights; norms are not all ones, and queries are long enough for attention to be uneven."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Llama(config)
        for name, p in model.named_parameters():
            if "norm" in name:
                nn.init.uniform_(p, 0.5, 1.5)
            elif "q_proj" in name:
                p.data *= 4
    return model.requires_grad_(False).eval()


def tiny_indexers(num_layers: int = CONFIG.num_hidden_layers, config: IndexerConfig = INDEXER, seed: int = 1) -> nn.ModuleList:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = nn.ModuleList(Indexer(config) for _ in range(num_layers))
        for name, p in made.named_parameters():
            if "norm" in name:
                nn.init.uniform_(p, 0.5, 1.5)
    return made.requires_grad_(False)


def tokens(count: int, seed: int = 3, vocab: int = CONFIG.vocab_size) -> Tensor:
    return torch.randint(3, vocab, (count,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def dense_logits(model: Llama, ids: Tensor) -> Tensor:
    return model.logits(model(ids, torch.arange(len(ids)), causal_attention))


@torch.no_grad()
def layer_inputs(model: Llama, ids: Tensor) -> list[LayerInput]:
    """What each layer's attention is given in a dense pass."""
    seen: list[LayerInput] = []

    def attend(given: LayerInput) -> Tensor:
        seen.append(given)
        return causal_attention(given)

    model(ids, torch.arange(len(ids)), attend)
    return seen


def turn(x: Tensor, positions: Tensor, theta: float, rotary: int) -> Tensor:
    """RoPE of ``x [T, ..., D]`` in fp64 as products of complex numbers: dim i is the real part of a pair, i + rotary / 2 the imaginary."""
    half = rotary // 2
    angles = positions.double()[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[..., :half], x[..., half:rotary]) * torch.polar(torch.ones_like(angles), angles).view(
        len(positions), *[1] * (x.dim() - 2), half
    )
    return torch.cat([turned.real, turned.imag, x[..., rotary:]], -1)


def index_parts(indexer: Indexer, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp64 q ``[T, H, D]``, w ``[T, H]`` and k ``[T, D]`` before quantisation, straight from the weights; gradients flow to them."""
    config, h = indexer.config, hidden.double()
    down = h @ indexer.wq_a.weight.double().T
    down = down / (down.square().mean(-1, keepdim=True) + 1e-6).sqrt() * indexer.q_norm.weight.double()
    q = (down @ indexer.wq_b.weight.double().T).view(-1, config.num_heads, config.head_dim)
    k = h @ indexer.wk.weight.double().T
    k = k - k.mean(-1, keepdim=True)
    k = k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt() * indexer.k_norm.weight.double() + indexer.k_norm.bias.double()
    w = h @ indexer.weights_proj.weight.double().T / (config.num_heads * config.head_dim) ** 0.5
    return (turn(q, positions, config.rope_theta, config.rotary_dim), w, turn(k, positions, config.rope_theta, config.rotary_dim))


def index_scores(indexer: Indexer, hidden: Tensor, positions: Tensor) -> Tensor:
    """fp64 ``[T, T]``, every query against every key."""
    q, w, k = index_parts(indexer, hidden, positions)
    return sum(w[:, j, None] * F.relu(q[:, j] @ k.T) for j in range(indexer.config.num_heads))  # type: ignore[return-value]
