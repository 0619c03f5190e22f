"""Cases by name: ``prefill-1024x128k-h64``, ``decode-32xmixed-h64``, ``mla-decode-32-h128``, ``layer-8x128k-h64``.

Rows x length, then heads. Rows are queries of one request (prefill) or requests with one query each (decode, layer). 1k = 1024 tokens,
1m = 2**20. ``mixed`` lengths are log-spaced from 1k to 128k, in a seeded order. Where a case is not of a published model's size, what
differs follows: ``-d64`` (index head dim, else 128), ``-k32`` (tokens kept, else 2048), ``-n4k`` (context of mla-decode, else 32k). With
several queries a request, as where tokens are drafted, ``-q4`` says how many: ``decode-8x128k-h64-q4`` has 32 rows. A layer over several
ranks says so last: ``layer-1x1m-h64-r2``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from thresher.errors import ThresherError, require

KINDS = ("prefill", "decode", "layer", "mla-decode")
HEAD_DIM = 128
TOPK = 2048
MLA_LENGTH = 32 * 1024
MIXED = (1024, 128 * 1024)

_NAME = re.compile(
    r"(?:(?P<kind>prefill|decode|layer)-(?P<rows>\d+)x(?P<length>\d+[km]?|mixed)|(?P<mla>mla-decode)-(?P<batch>\d+))"
    r"-h(?P<heads>\d+)(?:-d(?P<dim>\d+))?(?:-k(?P<topk>\d+))?(?:-n(?P<context>\d+[km]?))?"
    r"(?:-q(?P<queries>\d+))?(?:-r(?P<ranks>\d+))?"
)


@dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        kind: "prefill", "decode", "layer" (select, then attend) or "mla-decode" (attend only).
        rows: queries.
        length: tokens of context, None for mixed lengths.
        heads: index heads; attention heads for mla-decode.
        head_dim: of the indexer.
        topk: tokens kept, or attended to.
        queries: of the rows of a decode or layer case, those of each request, at its last tokens.
        ranks: devices that share a layer's work.
    """

    kind: str
    rows: int
    length: int | None
    heads: int
    head_dim: int = HEAD_DIM
    topk: int = TOPK
    queries: int = 1
    ranks: int = 1

    def __post_init__(self) -> None:
        require(self.kind in KINDS, f"kind must be one of {', '.join(KINDS)}", repr(self.kind), "correct it")
        sizes = {name: getattr(self, name) for name in ("rows", "heads", "head_dim", "topk", "queries", "ranks")}
        for name, value in {**sizes, "length": 1 if self.length is None else self.length}.items():
            require(value >= 1, f"{name} must be at least 1", value, "correct the case's name")
        require(self.head_dim % 4 == 0, "head_dim must be a multiple of 4", self.head_dim, "correct the case's name")
        long_enough = self.kind != "prefill" or (self.length is not None and self.rows <= self.length)
        require(long_enough, "a prefill's rows must be the last of its length tokens", f"{self.rows} of {self.length}", "shorten it")
        shared = self.queries == 1 or (self.kind in ("decode", "layer") and self.rows % self.queries == 0)
        require(shared, "several queries a request must be those of a decode or layer case", self.kind, "leave -q away")
        enough = self.queries <= (MIXED[0] if self.length is None else self.length) or self.kind == "prefill"
        require(enough, "a request's queries must be its last tokens", f"{self.queries} of {self.length}", "ask for fewer")
        require(self.ranks == 1 or self.kind == "layer", "only layer cases are timed over ranks", self.kind, "leave -r away")
        least = min(self.attention_heads, MIXED[0] if self.length is None else self.length)
        must = "each rank must have a head, and a token of each request"
        require(self.ranks <= least, must, f"{self.ranks} ranks for {least}", "ask for fewer ranks")

    @property
    def name(self) -> str:
        """The one name of this case."""
        mla = self.kind == "mla-decode"
        size = "mixed" if self.length is None else size_text(self.length)
        parts = [f"{self.kind}-{self.rows}" if mla else f"{self.kind}-{self.rows // self.queries}x{size}", f"h{self.heads}"]
        parts += [f"d{self.head_dim}"] if self.head_dim != HEAD_DIM else []
        parts += [f"k{self.topk}"] if self.topk != TOPK else []
        parts += [f"n{size}"] if mla and self.length != MLA_LENGTH else []
        parts += [f"q{self.queries}"] if self.queries != 1 else []
        parts += [f"r{self.ranks}"] if self.ranks != 1 else []
        return "-".join(parts)

    @property
    def attention_heads(self) -> int:
        """Heads of the attention: those named for mla-decode; twice the index heads for a layer, as in V3.2 and GLM-5."""
        return self.heads if self.kind == "mla-decode" else 2 * self.heads

    @property
    def each(self) -> int:
        """Queries of each request, at its last tokens: all of a prefill's, ``queries`` otherwise."""
        return self.rows if self.kind == "prefill" else self.queries

    def lengths(self, seed: int) -> list[int]:
        """The context of each request."""
        num = self.rows // self.each
        if self.length is not None:
            return [self.length] * num
        low, high = MIXED
        spaced = [round(low * (high / low) ** (i / max(num - 1, 1))) for i in range(num)]
        order = torch.randperm(num, generator=torch.Generator().manual_seed(seed)).tolist()
        return [spaced[i] for i in order]


def parse_case(name: str) -> Case:
    """The case of a name, listed or not.

    Raises:
        ThresherError: a name that follows no form, or is not the case's own spelling (``1k``, not ``1024``).
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise ThresherError(f"a case must be named like {', '.join(EXAMPLES)}; got {name!r}; see --list")
    part = found.groupdict()
    dim, topk, ranks = (int(part[at] or usual) for at, usual in (("dim", HEAD_DIM), ("topk", TOPK), ("ranks", 1)))
    if part["mla"]:
        require(part["queries"] is None, "only decode and layer cases take -q", repr(name), "leave it away")
        context = MLA_LENGTH if part["context"] is None else parse_size(part["context"])
        case = Case("mla-decode", int(part["batch"]), context, int(part["heads"]), dim, topk, ranks=ranks)
    else:
        require(part["context"] is None, "only mla-decode cases take -n", repr(name), "write the length after the x")
        length = None if part["length"] == "mixed" else parse_size(part["length"])
        queries = int(part["queries"] or 1)
        case = Case(part["kind"], int(part["rows"]) * queries, length, int(part["heads"]), dim, topk, queries, ranks)
    require(case.name == name, f"this case must be written {case.name}", repr(name), "one case has one name")
    return case


def parse_size(text: str) -> int:
    """Tokens: ``"128k"`` is 131072, ``"1m"`` 1048576, ``"96"`` 96."""
    unit = {"k": 1024, "m": 2**20}.get(text[-1], 1)
    return int(text.rstrip("km")) * unit


def size_text(tokens: int) -> str:
    """The shortest exact text of a number of tokens."""
    for unit, letter in ((2**20, "m"), (1024, "k")):
        if tokens % unit == 0:
            return f"{tokens // unit}{letter}"
    return str(tokens)


EXAMPLES = (
    "prefill-1024x128k-h64", "decode-1x1m-h64", "decode-32xmixed-h64", "mla-decode-32-h128", "layer-8x128k-h64", "layer-1x1m-h64-r2",
)  # fmt: skip

# 64 index heads: DeepSeek-V3.2; 32: GLM-5.
CASES = (
    *(f"prefill-1024x{n}-h{h}" for h in (64, 32) for n in ("32k", "128k", "256k")),
    *(f"decode-{b}x{n}-h{h}" for h in (64, 32) for b in (1, 8, 32, 128) for n in ("32k", "64k", "128k", "256k", "512k", "1m")),
    *(f"decode-32xmixed-h{h}" for h in (64, 32)),
    *(f"mla-decode-{b}-h{h}" for h in (16, 64, 128) for b in (1, 8, 32, 128)),
    *(f"layer-{size}-h{h}" for h in (64, 32) for size in ("1x128k", "1x512k", "1x1m", "8x128k", "8x256k", "32x128k")),
    *(f"layer-{b}x{n}-h64-r2" for b in (1, 8, 32) for n in ("32k", "64k", "128k", "256k", "512k", "1m")),
    *(f"layer-{size}-h64-r{r}" for r in (4, 8) for size in ("1x1m", "8x256k", "32x128k")),
)
