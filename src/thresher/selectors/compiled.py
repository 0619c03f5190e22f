"""Selection as an operator of PyTorch, for models under ``torch.compile(fullgraph=True)``.

```python
layer = InGraph(DSA(topk=2048), LayerState(0))

@torch.compile(fullgraph=True)
def step(q, weights, positions, requests, pages, page_table, lengths):
    return layer(q, weights, positions, requests, pages, page_table, lengths)
```

The compiler sees one operator with tensors in and out, ``torch.ops.thresher.select``, and knows its shapes; what happens inside is what
happens without it: the same implementations, checks and CUDA graphs. ``ops.sparse_attend.compiled`` has the attention that follows.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from thresher.checks import check_kind
from thresher.errors import require
from thresher.selectors.base import Selector
from thresher.types import IndexKeys, IndexQuery

if TYPE_CHECKING:
    from thresher.cache.state import LayerState

# An InGraph's number and topk, and the fields of IndexQuery and of IndexKeys.
SCHEMA = (
    "(int number, int topk, Tensor q, Tensor weights, Tensor positions, Tensor requests, Tensor pages, Tensor page_table, Tensor lengths)"
    " -> (Tensor, Tensor)"
)
_numbers = count()
_held: WeakValueDictionary[int, InGraph] = WeakValueDictionary()


class InGraph:
    """A layer's selector and state, to be called inside a compiled function; it must live as long as what was compiled with it.

    Args:
        selector: with a number of kept tokens, ``topk``, of its own; it is handed no attention inputs.
        state: what the layer keeps between steps, or None.

    Raises:
        ThresherError: a selector that is none, or has no ``topk``.
    """

    def __init__(self, selector: Selector, state: LayerState | None = None) -> None:
        check_kind("selector", selector, Selector, "pass DSA(), say")
        topk = selector.topk
        require(topk is not None, "selector must have a topk", selector, "one without it has no width that a compiler could know")
        assert topk is not None
        self.selector, self.state, self.topk, self.number = selector, state, topk, next(_numbers)
        _held[self.number] = self

    def __call__(
        self, q: Tensor, weights: Tensor, positions: Tensor, requests: Tensor, pages: Tensor, page_table: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``selector.select_indices`` of ``IndexQuery(q, weights, positions, requests)`` and ``IndexKeys(pages, page_table, lengths)``.

        Returns:
            Logical indices, int32 ``[Q, topk]``, ascending and -1 padded; and how many of them, int64 ``[Q]``.

        Raises:
            ThresherError: what the selector raises.
        """
        indices, kept = _select(self.number, self.topk, q, weights, positions, requests, pages, page_table, lengths)
        return indices, kept


@torch.library.custom_op("thresher::select", mutates_args=(), schema=SCHEMA)
def _select(number: int, topk: int, *given: Tensor) -> tuple[Tensor, Tensor]:
    layer = _held.get(number)
    require(layer is not None, "the InGraph of a compiled function must live as long as that", "one that is gone", "keep it with the model")
    assert layer is not None
    picked = layer.selector.select_indices(IndexQuery(*given[:4]), IndexKeys(*given[4:]), layer.state)
    # A compiler may write to what an operator returned, and a state may hold it.
    held = layer.state is not None and any(picked is kept for kept in layer.state.selections.values())
    return (picked.indices.clone(), picked.lengths.clone()) if held else (picked.indices, picked.lengths)


@_select.register_fake
def _(number: int, topk: int, q: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty((q.shape[0], topk), dtype=torch.int32), q.new_empty(q.shape[0], dtype=torch.int64)
