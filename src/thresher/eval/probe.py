"""Compare every way of choosing tokens on the same queries and keys: one dense pass of the model, all selectors looking on.

Because nothing a selector picks is attended to here, each sees the very inputs that DSA sees, and recall speaks of the choice alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thresher.cache.state import LayerState
from thresher.eval.recall import recall_rows
from thresher.types import AttentionInputs, IndexKeys, IndexQuery, Selection


@dataclass
class Probe:
    """Collects, per selector and layer, recall against the first selector named and the attention mass kept.

    Attributes:
        methods: name -> one selector (or placement) per layer; the first is what the others are compared with (DSA).
        recall: name -> per layer, the list of per-query recalls (fractions), queries whose context exceeds k only.
        mass: name -> per layer, the list of per-query shares of attention mass that the selection covers, averaged over heads.
        tokens: name -> number of tokens selected, per query.
    """

    methods: Mapping[str, list]  # type: ignore[type-arg]
    recall: dict[str, dict[int, list[Tensor]]] = field(default_factory=dict)
    mass: dict[str, dict[int, list[Tensor]]] = field(default_factory=dict)
    tokens: dict[str, list[Tensor]] = field(default_factory=dict)

    def look(self, layer: int, query: IndexQuery, keys: IndexKeys, attention: AttentionInputs, state: LayerState | None = None) -> None:
        """Let every selector pick for this layer's queries (one request) and note the figures."""
        probabilities = attention_probabilities(query, attention)
        reference: Selection | None = None
        for name, methods in self.methods.items():
            picked = methods[layer].select(query, keys, state, attention)
            reference = reference or picked
            full = reference.lengths == reference.topk
            self.recall.setdefault(name, {}).setdefault(layer, []).append(recall_rows(picked, reference)[full].cpu())
            self.mass.setdefault(name, {}).setdefault(layer, []).append(kept_mass(probabilities, picked).cpu())
            self.tokens.setdefault(name, []).append(picked.lengths.cpu())

    def recall_by_layer(self, name: str) -> list[float]:
        """Mean recall of each layer, a fraction."""
        return [float(torch.cat(rows).double().mean()) for _, rows in sorted(self.recall[name].items())]

    def mass_by_layer(self, name: str) -> list[float]:
        """Mean attention mass kept in each layer, a fraction."""
        return [float(torch.cat(rows).double().mean()) for _, rows in sorted(self.mass[name].items())]

    def tokens_read(self, name: str) -> float:
        """Mean number of tokens a query attends to."""
        return float(torch.cat(self.tokens[name]).double().mean())


def attention_probabilities(query: IndexQuery, attention: AttentionInputs) -> Tensor:
    """Softmax attention of the queries of one request, averaged over heads: fp32 ``[Q, length]``."""
    request = int(query.requests[0])
    k = attention.load_keys(request)
    group = attention.q.shape[1] // k.shape[1]
    q = attention.q.float().unflatten(1, (k.shape[1], group))
    logits = torch.einsum("qgnd,lgd->gnql", q, k.float()) * attention.scale
    future = torch.arange(k.shape[0], device=k.device) > query.positions.unsqueeze(1)
    return logits.masked_fill_(future, float("-inf")).softmax(-1).mean((0, 1))


def kept_mass(probabilities: Tensor, picked: Selection) -> Tensor:
    """Share of ``probabilities [Q, length]`` on the picked logical positions: fp32 ``[Q]``."""
    valid = picked.indices >= 0
    return (probabilities.gather(1, picked.indices.clamp_min(0).long()) * valid).sum(-1)
