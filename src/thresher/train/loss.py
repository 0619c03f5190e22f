"""The dense warm-up's loss for one layer (DeepSeek-V3.2-Exp, arXiv 2512.02556, section 2.1), and the terms that set heads apart.

Shape letters: C sampled queries, L keys, H indexer heads, G key/value groups, N attention heads of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thresher.models.indexer import Indexer
from thresher.models.llama import LayerInput


@dataclass(frozen=True)
class LayerLoss:
    """One layer's loss over some queries; all fp32 scalars, means over queries.

    Attributes:
        kl: nats, KL(p || softmax(I)) with p the head-summed attention, L1-normalised.
        spread: share of the heads' mass that lies outside a query's ``active_heads`` heaviest, in [0, 1]. Small means that few heads
            decide each query, which is what MISA's router relies on.
        imbalance: H * sum_j usage_j**2 - 1, 0 when all heads are used equally over the queries. Keeps ``spread`` from being lowered by
            the same few heads answering every query.
    """

    kl: Tensor
    spread: Tensor
    imbalance: Tensor


def attention_target(given: LayerInput, queries: Tensor, future: Tensor) -> Tensor:
    """p: attention probabilities of the sampled queries, summed over heads and normalised: fp32 ``[C, L]``.

    Args:
        given: the dense layer's input for a whole sequence.
        queries: int64 ``[C]``, which positions.
        future: bool ``[C, L]``, True where a key lies after the query.
    """
    heads, kv_heads, dim = given.q.shape[1], given.k.shape[1], given.q.shape[2]
    q = given.q[queries].unflatten(1, (kv_heads, heads // kv_heads))
    logits = torch.einsum("cgnd,lgd->gncl", q, given.k).float() * dim**-0.5
    return logits.masked_fill_(future, float("-inf")).softmax(-1).mean((0, 1))


def layer_loss(indexer: Indexer, given: LayerInput, queries: Tensor, active_heads: int) -> LayerLoss:
    """The loss of one layer's indexer over sampled queries. Memory is a few ``[C, H, L]`` in bf16.

    Args:
        indexer: the layer's indexer; gradients flow to it alone, ``given`` is detached.
        given: the frozen model's layer input for a whole sequence of L tokens from position 0.
        queries: int64 ``[C]``, which positions to learn from.
        active_heads: what ``spread`` counts as few.
    """
    hidden = given.hidden.detach()
    future = given.positions > queries.unsqueeze(1)  # [C, L]
    target = attention_target(given, queries, future)
    q, w = indexer.queries(hidden[queries], queries)
    keys = indexer.keys(hidden, given.positions)
    terms = torch.einsum("chd,ld->chl", q.bfloat16(), keys.bfloat16()).relu_()
    scores = torch.einsum("ch,chl->cl", w.bfloat16(), terms).float()
    log_q = scores.masked_fill(future, float("-inf")).log_softmax(-1).masked_fill(future, 0.0)
    kl = (torch.xlogy(target, target) - target * log_q).sum(-1).mean()
    seen = (~future / (queries + 1).unsqueeze(1)).bfloat16()  # weights of a mean over the visible keys
    mass = w.abs() * torch.einsum("chl,cl->ch", terms, seen).float()
    share = mass / mass.sum(-1, keepdim=True).clamp_min(1e-9)
    spread = 1 - share.topk(active_heads, -1).values.sum(-1).mean()
    imbalance = share.shape[1] * share.mean(0).square().sum() - 1
    return LayerLoss(kl, spread, imbalance)
