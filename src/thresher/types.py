"""The nouns: IndexQuery, IndexKeys, Selection, PartialAttention, AttentionInputs.

Shape letters: Q queries (all requests flattened), H indexer heads, D indexer head dim, B requests, P pages, N attention heads.
All are frozen; tensors in them are never written after construction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from thresher.checks import BYTES, FLOAT, FP32, INT32, INT64, check_tensor
from thresher.errors import require

SPACES = ("logical", "local", "slot")


def check_key_pages(pages: object) -> None:
    """Raise ``ThresherError`` unless ``pages`` has the shape and type of an index-key cache's pages."""
    check_tensor("pages", pages, BYTES, ("pages", "page_size", 1, "head_dim + 4"), "use IndexKeyCache")
    assert isinstance(pages, Tensor)
    size, dim = pages.shape[1], pages.shape[3] - 4
    require(size >= 1, "the page_size of pages must be at least 1", size, "64 is usual")
    require(dim >= 4 and dim % 4 == 0, "the head_dim of pages must be a positive multiple of 4", dim, "use IndexKeyCache")


@dataclass(frozen=True)
class IndexQuery:
    """What the indexer asks: one row per query token.

    Attributes:
        q: ``[Q, H, D]`` float8_e4m3fn (or any float type, unquantised), after RoPE and Hadamard.
        weights: ``[Q, H]`` fp32, everything folded in: ``w * H**-0.5 * q_scale * D**-0.5`` (DeepSeek-V3.2, section 2).
        positions: ``[Q]`` int64. Query i sees the keys at positions ``0..positions[i]`` of its request; -1 sees none.
            Logical, or local on a rank's shard (then: the last local key not after the query).
        requests: ``[Q]`` int64, the row of ``IndexKeys.page_table`` that query i belongs to.
    """

    q: Tensor
    weights: Tensor
    positions: Tensor
    requests: Tensor

    def __post_init__(self) -> None:
        check_tensor("q", self.q, FLOAT, ("num_queries", "heads", "head_dim"), "reshape it")
        num, heads = self.q.shape[:2]
        check_tensor("weights", self.weights, FP32, (num, heads), "pass one weight per head, as .float()")
        check_tensor("positions", self.positions, INT64, (num,), "pass one per query, as .long()")
        check_tensor("requests", self.requests, INT64, (num,), "pass one per query, as .long()")

    @property
    def num_queries(self) -> int:
        return self.q.shape[0]

    @property
    def num_heads(self) -> int:
        return self.q.shape[1]

    def rows(self, keep: Tensor | slice) -> IndexQuery:
        """The queries picked by a bool mask, an index tensor or a slice."""
        # fp8 tensors cannot be indexed by tensors on every device; their bytes can
        q = self.q.view(torch.uint8)[keep].view(self.q.dtype) if self.q.element_size() == 1 else self.q[keep]
        return IndexQuery(q, self.weights[keep], self.positions[keep], self.requests[keep])


@dataclass(frozen=True)
class IndexKeys:
    """A read-only view of a paged index-key cache (or of one rank's shard of it).

    Attributes:
        pages: uint8 ``[P, page_size, 1, D + 4]``, block-planar inside a page: first ``page_size * D`` e4m3 values,
            then ``page_size`` fp32 scales (132 bytes a token at D = 128, as in DeepSeek-V3.2).
        page_table: int32 ``[B, max_pages]``; entry j of row b is the page of request b's positions ``j * page_size ..``, -1 where unused.
        lengths: int64 ``[B]``, tokens held for each request.
    """

    pages: Tensor
    page_table: Tensor
    lengths: Tensor

    def __post_init__(self) -> None:
        check_key_pages(self.pages)
        check_tensor("page_table", self.page_table, INT32, ("requests", "max_pages"), "take PageTable.table")
        check_tensor("lengths", self.lengths, INT64, (self.page_table.shape[0],), "pass one per request, as .long()")

    @property
    def page_size(self) -> int:
        return self.pages.shape[1]

    @property
    def head_dim(self) -> int:
        return self.pages.shape[3] - 4

    @property
    def num_requests(self) -> int:
        return self.page_table.shape[0]

    @property
    def room(self) -> int:
        """Tokens of a request that the page table has room for, known without a look at the device."""
        return self.page_table.shape[1] * self.page_size


@dataclass(frozen=True)
class Selection:
    """The tokens each query attends to.

    Attributes:
        indices: int32 ``[Q, k]``: no duplicates, ascending, -1 padded at the end.
        lengths: int64 ``[Q]``, how many entries of a row are valid.
        space: index space of ``indices``: ``"logical"`` (position in the request), ``"local"`` (position in a rank's shard) or
            ``"slot"`` (``page * page_size + offset``).
        scores: fp32 ``[Q, k]`` beside ``indices`` (-inf where padded), or None when not asked for.
        slots: int32 ``[Q, k]`` beside ``indices`` (-1 where padded): where those lie in a cache that shares the keys' page table, as
            ``page * page_size + offset``. None where what selected does not say; ``ops.to_slots`` finds them then.
    """

    indices: Tensor
    lengths: Tensor
    space: str = "logical"
    scores: Tensor | None = None
    slots: Tensor | None = None

    def __post_init__(self) -> None:
        require(self.space in SPACES, f"space must be one of {', '.join(SPACES)}", repr(self.space), "name the index space")
        check_tensor("indices", self.indices, INT32, ("num_queries", "k"), "convert it")

    @property
    def topk(self) -> int:
        return self.indices.shape[1]


@dataclass(frozen=True)
class PartialAttention:
    """Softmax attention over one set of keys, ready to be merged with disjoint others.

    Attributes:
        out: fp32 ``[Q, N, Dv]``; 0 where the set is empty.
        lse: fp32 ``[Q, N]``, natural log of the sum of exponentials; -inf where the set is empty.
    """

    out: Tensor
    lse: Tensor


@dataclass(frozen=True)
class AttentionInputs:
    """The attention's own inputs, for a selector that looks at true attention mass (oracle).

    Attributes:
        q: ``[Q, N, Dk]`` attention queries, RoPE applied.
        load_keys: ``load_keys(request) -> [length, kv_heads, Dk]`` the keys of one request in position order.
        scale: softmax scale.
    """

    q: Tensor
    load_keys: Callable[[int], Tensor]
    scale: float
