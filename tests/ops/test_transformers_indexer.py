"""Our scoring and selection beside the indexers of transformers, with random weights.

The two compute in fp32 with different orders of summation, so sets are compared outside ties: a key in one set only must score within
``eps`` of our k-th. ``eps`` bounds both sides' error: a dot of D terms and a sum of H heads are off by at most
``(D + H + 4) * 2**-24 * sum |w| |q| |k|`` each, and an fp32 rotation angle near T by ``T * 2**-22``, on q and on k.
"""

from __future__ import annotations

import pytest
import torch

from thresher.ops import apply_rope, hadamard, index_score, select_topk

transformers = pytest.importorskip("transformers", minversion="5.17")
deepseek = pytest.importorskip("transformers.models.deepseek_v32.modeling_deepseek_v32")
glm = pytest.importorskip("transformers.models.glm_moe_dsa.modeling_glm_moe_dsa")

BATCH, TOKENS, HEADS, DIM, ROTARY, TOPK, HIDDEN, LORA = 2, 96, 16, 32, 16, 24, 64, 48
FAMILIES = {
    "deepseek_v32": ("half", deepseek.DeepseekV32Config, deepseek.DeepseekV32Indexer, deepseek.DeepseekV32RotaryEmbedding),
    "glm_moe_dsa": ("interleaved", glm.GlmMoeDsaConfig, glm.GlmMoeDsaIndexer, glm.GlmMoeDsaRotaryEmbedding),
}


@torch.no_grad()
def peer(family: str):
    torch.manual_seed(7)
    style, make_config, make_indexer, make_rope = FAMILIES[family]
    config = make_config(
        hidden_size=HIDDEN,
        q_lora_rank=LORA,
        index_n_heads=HEADS,
        index_head_dim=DIM,
        qk_rope_head_dim=ROTARY,
        index_topk=TOPK,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    indexer, rope = make_indexer(config, 0), make_rope(config)
    for parameter in indexer.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    hidden, q_lora = torch.randn(BATCH, TOKENS, HIDDEN), torch.randn(BATCH, TOKENS, LORA)
    ids = torch.arange(TOKENS)[None].expand(BATCH, -1)
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(BATCH, -1, -1)
    picked = indexer(hidden, q_lora, rope(hidden, ids), mask, ids)
    return style, indexer, hidden, q_lora, picked, config.rope_parameters["rope_theta"]


@torch.no_grad()
def ours(style: str, indexer, hidden, q_lora, theta: float, rotate: bool):
    """One sequence: the selection, the scores and eps per query."""
    positions = torch.arange(TOKENS)
    q = apply_rope(indexer.wq_b(q_lora).view(TOKENS, HEADS, DIM), positions, theta, ROTARY, style)
    k = apply_rope(indexer.k_norm(indexer.wk(hidden)), positions, theta, ROTARY, style)
    if rotate:
        q, k = hadamard(q), hadamard(k)
    weights = indexer.weights_proj(hidden).float() * HEADS**-0.5 * DIM**-0.5
    scores = index_score(q, weights, k, torch.ones(TOKENS), torch.zeros(TOKENS).long(), positions + 1)
    reach = (weights.abs() * q.norm(dim=-1)).sum(1) * k.norm(dim=-1).max()
    error = 2 * (DIM + HEADS + 4) * 2.0**-24 + 2 * TOKENS * 2.0**-22
    return select_topk(scores, TOPK), scores, reach * error


@pytest.mark.parametrize("rotate", [False, True], ids=["plain", "hadamard"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_sets_outside_ties(family, rotate):
    style, indexer, hidden, q_lora, picked, theta = peer(family)
    equal = 0
    for b in range(BATCH):
        selection, scores, eps = ours(style, indexer, hidden[b], q_lora[b], theta, rotate)
        spread = scores[-1].std()
        assert eps.max() < 0.02 * spread, "the tolerance must be too small to hide a wrong formula"
        for t in range(TOKENS):
            mine = set(selection.indices[t][: selection.lengths[t]].tolist())
            theirs = {s for s in picked[b, t].tolist() if s <= t}
            assert len(mine) == len(theirs) == min(t + 1, TOPK)
            kth = scores[t][list(mine)].min()
            assert all(abs(scores[t, s] - kth) <= eps[t] for s in mine ^ theirs)
            equal += mine == theirs
    assert equal >= 0.95 * BATCH * TOKENS


@pytest.mark.parametrize("family", FAMILIES)
def test_the_other_rope_layout_is_told_apart(family):
    style, indexer, hidden, q_lora, picked, theta = peer(family)
    wrong = "interleaved" if style == "half" else "half"
    selection, _, _ = ours(wrong, indexer, hidden[0], q_lora[0], theta, False)
    assert set(selection.indices[-1].tolist()) != set(picked[0, -1].tolist())
