"""The tokens attention itself weighs most: the ceiling a method is held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thresher.cache.index_keys import visible_counts
from thresher.errors import require
from thresher.ops.select import select_topk
from thresher.selectors.base import Selector, require_int
from thresher.selectors.rows import concat, in_chunks
from thresher.types import AttentionInputs, IndexKeys, IndexQuery, Selection

if TYPE_CHECKING:
    from thresher.cache.state import LayerState


@dataclass(frozen=True)
class Oracle(Selector):
    """The ``topk`` keys of largest attention probability, softmax per head over the visible keys, summed over heads.

    The target DSA's indexer is trained on (arXiv 2512.02556, dense warm-up). It reads the attention's own queries and keys, so it saves
    nothing: it measures. Its indexer cost counts as 0.
    """

    topk: int

    def __post_init__(self) -> None:
        require_int("topk", self.topk, 1)

    def select(
        self, query: IndexQuery, keys: IndexKeys, state: LayerState | None = None, attention: AttentionInputs | None = None
    ) -> Selection:
        """See ``Selector.select``. Raises ``ThresherError`` without ``attention``, or when its shapes do not fit the query."""
        require(attention is not None, "Oracle needs the attention inputs", None, "pass attention=AttentionInputs(q, load_keys, scale)")
        assert attention is not None
        num, heads = attention.q.shape[0], attention.q.shape[1]
        must = f"attention.q must have {query.num_queries} rows, one per query"
        require(num == query.num_queries, must, num, "pass the queries of the same tokens")
        visible = visible_counts(query, keys)
        order, parts = [], []
        for request in query.requests.unique().tolist():
            rows = (query.requests == request).nonzero()[:, 0]
            length = int(visible[rows].max())
            loaded = attention.load_keys(request)
            held, groups = loaded.shape[:2]
            require(held >= length, f"load_keys({request}) must give at least {length} keys", held, "append them first")
            require(heads % groups == 0, f"attention heads must be a multiple of the {groups} key heads", heads, "check the model")
            k_LGD = loaded[:length].double()

            def select_rows(_: IndexQuery, part: slice, rows: Tensor = rows, k_LGD: Tensor = k_LGD) -> Selection:
                mass = attention_mass(attention.q[rows[part]].double(), k_LGD, attention.scale, visible[rows[part]])
                return select_topk(mass, self.topk)

            order.append(rows)
            parts.append(in_chunks(query.rows(rows), 4 * max(length, 1) * heads // groups, select_rows))
        if not parts:
            return select_topk(torch.empty(0, 0, device=query.positions.device), self.topk)
        back = torch.cat(order).argsort()
        whole = concat(parts)
        return Selection(whole.indices[back], whole.lengths[back], whole.space, None if whole.scores is None else whole.scores[back])


def attention_mass(q_QND: Tensor, k_LGD: Tensor, scale: float, visible: Tensor) -> Tensor:
    """fp32 ``[Q, L]``: attention probability of each key summed over heads, -inf where not visible.

    In fp64 and rounded once, so that the matmul's own order, which varies with the batch, does not reach the result.
    """
    num, heads, dim = q_QND.shape
    groups = k_LGD.shape[1]
    hidden = torch.arange(k_LGD.shape[0], device=visible.device) >= visible[:, None]
    mass = q_QND.new_zeros(num, k_LGD.shape[0])
    for group, q_QnD in enumerate(q_QND.unflatten(1, (groups, heads // groups)).unbind(1)):
        logits = (q_QnD.reshape(-1, dim) @ k_LGD[:, group].T * scale).unflatten(0, (num, heads // groups))
        mass += logits.masked_fill_(hidden[:, None], float("-inf")).softmax(dim=-1).sum(dim=1)
    return mass.float().masked_fill(hidden, float("-inf"))
