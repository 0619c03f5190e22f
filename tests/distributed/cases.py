"""Random layers, and plain forms of what several ranks must agree with."""

import torch

from thresher.cache import pack_keys
from thresher.cache.fp8 import quantize_fp8
from thresher.cache.index_keys import load_keys
from thresher.distributed import Shard, own_heads, share_heads, split_keys
from thresher.ops.sparse_attend import sparse_attend
from thresher.types import AttentionInputs, IndexKeys, IndexQuery, PartialAttention, Selection

HEADS, DIM, ATTN_HEADS, KV_HEADS, ATTN_DIM = 4, 16, 4, 2, 8


class Layer:
    """Queries at random places of requests of the given lengths, index keys, and attention inputs."""

    def __init__(self, lengths: list[int], queries: int = 9, seed: int = 0, coarse: bool = False) -> None:
        made = torch.Generator().manual_seed(seed)
        requests = torch.randint(0, len(lengths), (queries,), generator=made)
        positions = (torch.rand(queries, generator=made) * torch.tensor(lengths)[requests]).long()
        for request, length in enumerate(lengths):
            # Every request has a query that sees all of it.
            if length and request < queries:
                requests[request], positions[request] = request, length - 1
        positions = positions.masked_fill(torch.tensor(lengths)[requests] == 0, -1)
        q, q_scales = quantize_fp8(self.draw((queries, HEADS, DIM), made, coarse))
        weights = self.draw((queries, HEADS), made, coarse) * q_scales
        self.query = IndexQuery(q, weights, positions, requests)
        self.keys = pack_keys([quantize_fp8(self.draw((n, DIM), made, coarse)) for n in lengths], page_size=4)
        self.q = torch.randn(queries, ATTN_HEADS, ATTN_DIM, generator=made)
        self.k = [torch.randn(n, KV_HEADS, ATTN_DIM, generator=made) for n in lengths]
        self.v = [torch.randn(n, KV_HEADS, ATTN_DIM, generator=made) for n in lengths]
        self.attention = AttentionInputs(self.q, lambda request: self.k[request], ATTN_DIM**-0.5)

    @staticmethod
    def draw(shape: tuple[int, ...], made: torch.Generator, coarse: bool) -> torch.Tensor:
        """Coarse values are whole numbers of few sizes, so many scores are equal."""
        return torch.randint(-1, 2, shape, generator=made).float() if coarse else torch.randn(shape, generator=made)

    def attend_over(self, k: list[torch.Tensor], v: list[torch.Tensor], heads: slice = slice(None)):
        """``attend(selection)`` over keys and values laid out request after request, for some of the heads that they have."""
        starts = torch.tensor([0, *[x.shape[0] for x in k]]).cumsum(0)[self.query.requests]
        flat_k, flat_v, alike = torch.cat(k)[:, heads], torch.cat(v)[:, heads], ATTN_HEADS // KV_HEADS
        q = self.q.unflatten(1, (KV_HEADS, alike))[:, heads].flatten(1, 2)

        def attend(selection: Selection) -> PartialAttention:
            slots = torch.where(selection.indices >= 0, selection.indices + starts[:, None], -1).int()
            if not q.shape[1]:
                return PartialAttention(q, q[..., 0])
            return sparse_attend(q, flat_k, flat_v, slots, self.attention.scale)

        return attend

    def shards(self, placement) -> list[Shard]:
        made = []
        for rank, keys in enumerate(split_keys(self.keys, placement)):
            mine = [[p for p in range(len(k)) if (p // placement.granularity) % placement.ranks == rank] for k in self.k]
            heads = slice(None)
            if placement.kind == "replicated":
                mine = [list(range(len(k))) for k in self.k]
                heads = own_heads(share_heads(KV_HEADS, placement.ranks), rank)
            attend = self.attend_over(
                [k[m] for k, m in zip(self.k, mine, strict=True)], [v[m] for v, m in zip(self.v, mine, strict=True)], heads
            )
            made.append(Shard(keys, None, attend))
        return made


def attention_over(layer: Layer, sets: list[set[int]]) -> torch.Tensor:
    """fp64 softmax attention of each query over a set of positions of its request; 0 where the set is empty."""
    out = torch.zeros(len(sets), ATTN_HEADS, ATTN_DIM, dtype=torch.float64)
    for row, chosen in enumerate(sets):
        request, rows = int(layer.query.requests[row]), sorted(chosen)
        for head in range(ATTN_HEADS):
            group = head // (ATTN_HEADS // KV_HEADS)
            if rows:
                logits = layer.k[request][rows, group].double() @ layer.q[row, head].double() * layer.attention.scale
                out[row, head] = logits.softmax(0) @ layer.v[request][rows, group].double()
    return out


def sets_of(selection: Selection) -> list[set[int]]:
    rows = [[i for i in row if i >= 0] for row in selection.indices.tolist()]
    assert all(row == sorted(set(row)) for row in rows)
    assert [len(row) for row in rows] == selection.lengths.tolist()
    return [set(row) for row in rows]


def plain_scores(layer: Layer, row: int, keys: IndexKeys | None = None) -> list[float]:
    """fp64 index scores of one query over the keys it sees."""
    query = layer.query
    values, scales = load_keys(keys or layer.keys, int(query.requests[row]), 0, int(query.positions[row]) + 1)
    dots = (values.double() @ query.q[row].double().T).relu()
    return ((dots * query.weights[row].double()).sum(1) * scales.double()).tolist()
