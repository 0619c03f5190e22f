"""What the planner knows of models and GPUs: sizes, and the bytes of weights and caches that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from thresher.bench.floor import LATENT_BYTES, LATENT_DIM
from thresher.selectors.base import Selector

# Bytes of a GPU's memory, as its maker states them (H100 SXM and H200 datasheets: 80 and 141 GB).
GPU_BYTES = {"h100": 80e9, "h200": 141e9}


@dataclass(frozen=True)
class ModelShape:
    """A model with multi-head latent attention and DSA, in the words of its published configuration.

    Attributes:
        title: its name.
        layers: attention layers; a layer that drafts tokens is not among them.
        index_layers: those that run an indexer and hold index keys; the others take an earlier layer's selection.
        hidden, q_lora, kv_lora, nope, rope, v_dim: dims of the attention.
        heads: of the attention. All read the one latent of a token.
        index_heads, index_dim, topk: of the indexer, and how many tokens it keeps.
        dense_layers, dense_width: layers with a dense MLP, and its width; all others are mixtures.
        experts, shared_experts, expert_width: of a mixture.
        vocab: tokens; input and output embedding are two matrices.
        positions: the longest context that it was made for.
        source: where the numbers are from.
    """

    title: str
    layers: int
    index_layers: int
    hidden: int
    q_lora: int
    kv_lora: int
    nope: int
    rope: int
    v_dim: int
    heads: int
    index_heads: int
    index_dim: int
    topk: int
    dense_layers: int
    dense_width: int
    experts: int
    shared_experts: int
    expert_width: int
    vocab: int
    positions: int
    source: str

    @property
    def parameters(self) -> tuple[int, int]:
        """``(split, whole)``: weights of which a rank holds its share, and those that each rank holds in full.

        In full, as engines have them under tensor parallelism: the indexer, both down-projections of the attention, and the router. Norms
        are left out (under a millionth).
        """
        up = self.heads * (self.q_lora * (self.nope + self.rope) + self.kv_lora * (self.nope + self.v_dim) + self.v_dim * self.hidden)
        down = self.hidden * (self.q_lora + self.kv_lora + self.rope)
        indexer = self.q_lora * self.index_heads * self.index_dim + self.hidden * (self.index_dim + self.index_heads)
        mixtures = self.layers - self.dense_layers
        mlp = 3 * self.hidden * (
            self.dense_layers * self.dense_width + mixtures * (self.experts + self.shared_experts) * self.expert_width
        )  # fmt: skip
        split = self.layers * up + mlp + 2 * self.vocab * self.hidden
        return split, self.layers * down + self.index_layers * indexer + mixtures * self.hidden * self.experts

    def weight_bytes(self, gpus: int) -> float:
        """Bytes of weights on each of ``gpus`` GPUs: one a parameter (FP8), two for the embeddings (bf16)."""
        split, whole = self.parameters
        return (split + 2 * self.vocab * self.hidden) / gpus + whole

    def cache_bytes(self, selector: Selector, tokens: int) -> int:
        """Bytes that a GPU holds, all layers together, for ``tokens`` tokens of one request that lie on it.

        Latents in every layer (656 bytes a token). In layers with an indexer also index keys (head dim + 4 bytes a token), and the
        selector's block means, one more key for each block.
        """
        block = getattr(selector, "block_size", None)
        keys = tokens + (0 if block is None else -(-tokens // block))
        return self.layers * LATENT_BYTES["layer"] * tokens + self.index_layers * (self.index_dim + 4) * keys


# Latents of every model here are what the FP8 cache and the attention kernels hold: 512 + 64.
MODELS = {
    "deepseek-v3.2": ModelShape(
        "DeepSeek-V3.2", layers=61, index_layers=61, hidden=7168, q_lora=1536, kv_lora=512, nope=128, rope=64, v_dim=128, heads=128,
        index_heads=64, index_dim=128, topk=2048, dense_layers=3, dense_width=18432, experts=256, shared_experts=1, expert_width=2048,
        vocab=129280, positions=163840,
        source="arXiv 2512.02556; DeepseekV32Config of transformers 5.24 (deepseek-ai/DeepSeek-V3.2-Exp); 671B parameters published",
    ),
    "glm-5": ModelShape(
        "GLM-5", layers=78, index_layers=78, hidden=6144, q_lora=2048, kv_lora=512, nope=192, rope=64, v_dim=256, heads=64,
        index_heads=32, index_dim=128, topk=2048, dense_layers=3, dense_width=12288, experts=256, shared_experts=1, expert_width=2048,
        vocab=154880, positions=202752,
        source="arXiv 2602.15763; GlmMoeDsaConfig of transformers 5.24 (zai-org/GLM-5); 744B parameters published",
    ),
}  # fmt: skip
# Full indexers in layers 0, 1, 2, 6, 10, ..., 74 (IndexShare, arXiv 2603.12201); all else as GLM-5; 1M positions (recipes.vllm.ai).
MODELS["glm-5.2"] = replace(
    MODELS["glm-5"],
    title="GLM-5.2",
    index_layers=len({0, 1, *range(2, 78, 4)}),
    positions=2**20,
    source="as GLM-5, which has the same sizes; layers with an indexer: indexer_types of GlmMoeDsaConfig; recipes.vllm.ai/zai-org/GLM-5.2",
)
assert all(model.kv_lora + model.rope == LATENT_DIM for model in MODELS.values())
