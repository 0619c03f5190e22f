"""Small made-up requests: index keys in scattered, poisoned pages, and the queries that look at them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from thresher.cache import IndexKeyCache, PageTable
from thresher.ops.quantize import dequantize_fp8, quantize_fp8
from thresher.selectors import DSA, HISA, MISA, Dense, MISARandom, MISARerank, MISAStatic, Oracle, Random, Selector, Window
from thresher.types import AttentionInputs, IndexKeys, IndexQuery, Selection

HEADS, DIM, ATTENTION_HEADS, KEY_HEADS, ATTENTION_DIM = 4, 32, 4, 2, 8
PAGE_SIZE = 8

# Every selector that needs nothing but its own layer, at sizes where choices matter in a context of a few dozen tokens.
SMALL: dict[str, Selector] = {
    "dense": Dense(),
    "dsa": DSA(topk=7),
    "misa": MISA(active_heads=2, block_size=8, topk=7),
    "misa_rerank": MISARerank(active_heads=1, block_size=5, candidates=15, topk=7),
    "hisa": HISA(block_size=4, num_blocks=4, topk=7),
    "window": Window(topk=7, sinks=2),
    "random": Random(topk=7, seed=3),
    "oracle": Oracle(topk=7),
    "misa_static": MISAStatic(heads=(3, 1), topk=7),
    "misa_random": MISARandom(active_heads=2, seed=5, topk=7),
}

Pairs = list[tuple[int, int]]


@dataclass(frozen=True)
class World:
    """Per request: keys (e4m3 [n, D], fp32 [n]) and, at every position, an index query and attention inputs."""

    keys: list[tuple[Tensor, Tensor]]
    q: list[Tensor]
    weights: list[Tensor]
    attention_q: list[Tensor]
    attention_k: list[Tensor]

    def _repr_pretty_(self, printer, cycle: bool) -> None:
        """What hypothesis shows of a failing case."""
        printer.text(f"World(lengths={self.lengths})")

    @property
    def lengths(self) -> list[int]:
        return [values.shape[0] for values, _ in self.keys]

    def every_pair(self, requests: list[int] | None = None) -> Pairs:
        """(request, position) of every token."""
        return [(r, p) for r in (range(len(self.keys)) if requests is None else requests) for p in range(self.lengths[r])]

    def view(self, lengths: list[int] | None = None) -> IndexKeys:
        """The first ``lengths`` keys of each request: pages handed out in turns, every unwritten byte a NaN."""
        lengths = self.lengths if lengths is None else lengths
        num_pages = sum(-(-n // PAGE_SIZE) for n in lengths) + 1
        table, cache = PageTable(len(lengths), num_pages, PAGE_SIZE), IndexKeyCache(num_pages, DIM, PAGE_SIZE)
        cache.pages.fill_(0x7F)
        for start in range(0, max(lengths, default=0), 5):
            for request, (values, scales) in enumerate(self.keys):
                part = slice(start, min(start + 5, lengths[request]))
                if part.start < part.stop:
                    cache.store(table.append(request, part.stop - part.start), values[part], scales[part])
        return cache.view(table.table, table.lengths)

    def query(self, pairs: Pairs, requests: list[int] | None = None) -> IndexQuery:
        """The queries at ``pairs``; ``requests`` renames their rows of the page table."""
        q = torch.stack([self.q[r][p].view(torch.uint8) for r, p in pairs]).view(torch.float8_e4m3fn)
        weights = torch.stack([self.weights[r][p] for r, p in pairs])
        rows = [r for r, _ in pairs] if requests is None else requests
        return IndexQuery(q, weights, torch.tensor([p for _, p in pairs]), torch.tensor(rows))

    def attention(self, pairs: Pairs, keys_of: dict[int, int] | None = None) -> AttentionInputs:
        """Attention inputs of the same queries; ``keys_of`` maps renamed rows back to requests."""
        q = torch.stack([self.attention_q[r][p] for r, p in pairs])
        return AttentionInputs(q, lambda row: self.attention_k[keys_of[row] if keys_of else row], ATTENTION_DIM**-0.5)

    def select(self, selector: Selector, pairs: Pairs, lengths: list[int] | None = None, state=None) -> list[list[int]]:
        """The chosen positions of each pair, checked for form."""
        query, keys = self.query(pairs), self.view(lengths)
        return rows_of(selector.select(query, keys, state, self.attention(pairs)), query, keys)

    def only(self, request: int) -> World:
        """A world of one request."""
        return World(*([field[request]] for field in (self.keys, self.q, self.weights, self.attention_q, self.attention_k)))

    def key_values(self, request: int) -> Tensor:
        """fp64 ``[n, D]``, what the stored keys of a request stand for."""
        return dequantize_fp8(*self.keys[request]).double()


def rows_of(selection: Selection, query: IndexQuery, keys: IndexKeys) -> list[list[int]]:
    """Rows as lists, after checking the form every selection must have."""
    assert selection.indices.dtype == torch.int32
    assert selection.space == "logical"
    visible = torch.minimum(query.positions + 1, keys.lengths[query.requests]).tolist()
    rows = []
    for row, count, seen in zip(selection.indices.tolist(), selection.lengths.tolist(), visible, strict=True):
        assert row[count:] == [-1] * (len(row) - count), "-1 only after the valid entries"
        assert row[:count] == sorted(set(row[:count])), "ascending without duplicates"
        assert all(0 <= p < seen for p in row[:count]), "causal"
        rows.append(row[:count])
    return rows


def make_world(lengths: list[int], seed: int = 0, kind: str = "normal") -> World:
    """Requests of ``lengths`` tokens.

    Kinds: ``normal``; ``plateau`` (three distinct keys, so scores tie everywhere); ``zeros`` (every score 0); ``sparse`` (one head speaks,
    the others have weight 0, so most scores are 0); ``wild`` (key norms over six orders of magnitude).
    """
    g = torch.Generator().manual_seed(seed)
    fields: list[list] = [[], [], [], [], []]
    for n in lengths:
        keys = torch.randn(n, DIM, generator=g)
        weights = torch.randn(n, HEADS, generator=g)
        if kind == "plateau":
            keys = torch.randn(3, DIM, generator=g)[torch.randint(3, (n,), generator=g)]
        elif kind == "zeros":
            keys = torch.zeros(n, DIM)
        elif kind == "sparse":
            weights[:, 1:] = 0
        elif kind == "wild":
            keys = keys * 10 ** torch.empty(n, 1).uniform_(-3, 3, generator=g)
        q, q_scales = quantize_fp8(torch.randn(n, HEADS, DIM, generator=g))
        fields[0].append(quantize_fp8(keys))
        fields[1].append(q)
        fields[2].append(weights * q_scales * (HEADS * DIM) ** -0.5)
        fields[3].append(torch.randn(n, ATTENTION_HEADS, ATTENTION_DIM, generator=g))
        fields[4].append(torch.randn(n, KEY_HEADS, ATTENTION_DIM, generator=g))
    return World(*fields)


def splice(before: World, after: World, kept: int) -> World:
    """The first ``kept`` tokens of ``before``'s request 0, then ``after``'s, as when drafts are rejected; the others stay."""
    fields = {f.name: (getattr(before, f.name), getattr(after, f.name)) for f in dataclasses.fields(World)}
    return World(**{name: [_join(old[0], new[0], kept), *old[1:]] for name, (old, new) in fields.items()})


def _join(old, new, kept):
    if isinstance(old, tuple):
        return tuple(_join(a, b, kept) for a, b in zip(old, new, strict=True))
    if old.element_size() == 1:
        return torch.cat((old[:kept].view(torch.uint8), new[kept:].view(torch.uint8))).view(old.dtype)
    return torch.cat((old[:kept], new[kept:]))


KINDS = ("normal", "plateau", "zeros", "sparse", "wild")


@st.composite
def worlds(draw: st.DrawFn, max_requests: int = 3, max_length: int = 40) -> World:
    lengths = draw(st.lists(st.integers(1, max_length), min_size=1, max_size=max_requests))
    return make_world(lengths, draw(st.integers(0, 2**16)), draw(st.sampled_from(KINDS)))
