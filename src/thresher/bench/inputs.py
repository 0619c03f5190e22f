"""The inputs of a case, by name, from a seed; queries and keys quantised as the indexer quantises them.

``normal``: normal queries, keys and weights. ``cruel-plateaus``: all keys are copies of a few, so that most scores are ties.
``cruel-ascending`` and ``cruel-descending``: scores that never fall, or never rise, along the context. ``recorded``: a model's own, from
a safetensors file with ``q`` fp ``[requests, Q, H, D]``, ``k`` ``[requests, N, D]`` and ``weights`` ``[requests, Q, H]`` (before any factor
is folded in), where the queries are those of the last Q tokens; a case takes the last of them that it needs. Requests may hold different
numbers of queries: then ``rows`` int64 ``[requests]`` says how many, and q ``[sum(rows), H, D]`` and weights hold them one after the other.
``thresher record`` writes such a file (``bench/recording.py``).

The same seed gives the same inputs on the same kind of device.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from thresher.bench.cases import Case
from thresher.cache import IndexKeyCache, LatentCache, PageTable, pack_keys
from thresher.errors import ThresherError, require
from thresher.ops.quantize import quantize_fp8
from thresher.ops.to_slots import to_slots
from thresher.types import IndexKeys, IndexQuery

CRUEL = ("cruel-plateaus", "cruel-ascending", "cruel-descending")
INPUTS = ("normal", *CRUEL, "recorded")
LATENT_DIM, VALUE_DIM = 576, 512
# Softmax scale of V3.2's attention: 128 + 64 dims a head before absorption.
SCALE = 192**-0.5
PLATEAUS = 7


@dataclass(frozen=True)
class Inputs:
    """Index inputs of a case: one query for each row."""

    query: IndexQuery
    keys: IndexKeys


@dataclass(frozen=True)
class AttendInputs:
    """``q`` bf16 ``[Q, N, 576]``; ``latents`` bf16 ``[S, 576]``, or the FP8 cache, uint8 ``[S / 64, 64, 1, 656]``; ``slots`` int32
    ``[Q, k]`` (None where they are selected first)."""

    q: Tensor
    latents: Tensor
    slots: Tensor | None


@dataclass(frozen=True)
class NewTokens:
    """What a layer's projections give for the token of each row, before RoPE, and where it is stored: ``q`` ``[Q, H, D]``, ``weights``
    ``[Q, H]``, ``key`` ``[Q, D]``, ``latent`` ``[Q, 512]`` and ``rope`` ``[Q, 64]``, all bf16; ``slots`` int64 ``[Q]``."""

    q: Tensor
    weights: Tensor
    key: Tensor
    latent: Tensor
    rope: Tensor
    slots: Tensor


def make_inputs(case: Case, name: str, seed: int, device: torch.device, recorded: Path | None = None, copy: int = 0) -> Inputs:
    """Index query and paged keys of a case.

    Args:
        case: not an mla-decode.
        name: one of ``INPUTS``.
        seed: of everything drawn, mixed lengths included.
        device: where to make them.
        recorded: the file of ``recorded`` inputs.
        copy: 0, 1, ...: the same lengths, other numbers (but for ``recorded``).

    Raises:
        ThresherError: an unknown name, or a file that is missing or too small for the case.
    """
    require(name in INPUTS, f"inputs must be one of {', '.join(INPUTS)}, or cruel for all three", repr(name), "check the spelling")
    lengths = case.lengths(seed)
    source = _Recorded(recorded, case, lengths) if name == "recorded" else _Drawn(case, name, _draw(seed, copy, device))
    table = PageTable(len(lengths), sum(-(-length // 64) for length in lengths), device=device)
    cache = IndexKeyCache(table.num_pages, case.head_dim, device=device)
    for request, length in enumerate(lengths):
        cache.store(table.append(request, length), *quantize_fp8(source.keys(request, length).to(device)))
    q_QHD, weights_QH = (x.to(device) for x in source.queries())
    positions = (torch.tensor(lengths, device=device)[:, None] + torch.arange(-case.each, 0, device=device)).flatten()
    requests = torch.arange(len(lengths), device=device).repeat_interleave(case.each)
    return Inputs(_folded(q_QHD, weights_QH, positions, requests), cache.view(table.table, table.lengths))


def make_attend_inputs(case: Case, seed: int, device: torch.device, copy: int = 0, fp8: bool = False) -> AttendInputs:
    """Normal attention queries and latents, in bf16 or as the FP8 cache stores them; for mla-decode also ``topk`` distinct ascending slots
    a row, within the row's own request."""
    generator = _draw(seed, copy, device)
    lengths = case.lengths(seed)
    held = [-(-length // 64) * 64 for length in lengths]
    if fp8:
        latents = _fp8_latents(held, generator, device)
    else:
        latents = torch.randn(sum(held), LATENT_DIM, generator=generator, device=device, dtype=torch.bfloat16)
    q = torch.randn(case.rows, case.attention_heads, LATENT_DIM, generator=generator, device=device, dtype=torch.bfloat16)
    if case.kind != "mla-decode":
        return AttendInputs(q, latents, None)
    slots = torch.full((case.rows, case.topk), -1, dtype=torch.int32, device=device)
    start = 0
    for row, length in enumerate(lengths):
        picked = torch.randperm(length, generator=generator, device=device)[: case.topk].sort().values
        slots[row, : len(picked)] = (start + picked).int()
        start += held[row]
    return AttendInputs(q, latents, slots)


def make_new_tokens(case: Case, index: Inputs, seed: int, copy: int = 0, pages_back: int = 0) -> NewTokens:
    """Normal ones, in the slots of the tokens that the queries are of, or of those so many pages before (from a request's end on again)."""
    query, keys = index.query, index.keys
    generator = _draw(seed + 1, copy, query.q.device)
    shapes = ((case.rows, case.heads, case.head_dim), (case.rows, case.heads), (case.rows, case.head_dim), (case.rows, VALUE_DIM))
    q, weights, key, latent, rope = (
        torch.randn(*shape, generator=generator, device=query.q.device).bfloat16() for shape in (*shapes, (case.rows, 64))
    )
    at = (query.positions - pages_back * keys.page_size) % keys.lengths[query.requests]
    slots = to_slots(at[:, None].int(), keys.page_table, query.requests, keys.page_size)
    return NewTokens(q, weights, key, latent, rope, slots[:, 0].long())


def _fp8_latents(held: list[int], generator: torch.Generator, device: torch.device) -> Tensor:
    """One request at a time, so that the unquantised latents of all never stand in memory together."""
    cache = LatentCache(sum(held) // 64, device=device)
    start = 0
    for tokens in held:
        latents = torch.randn(tokens, LATENT_DIM, generator=generator, device=device, dtype=torch.bfloat16)
        cache.store(torch.arange(start, start + tokens, device=device), latents[:, :VALUE_DIM], latents[:, VALUE_DIM:])
        start += tokens
    return cache.data


def _draw(seed: int, copy: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed + 1_000_003 * copy)


class _Drawn:
    def __init__(self, case: Case, name: str, generator: torch.Generator) -> None:
        self.case, self.name, self.generator, self.device = case, name, generator, generator.device

    def keys(self, request: int, length: int) -> Tensor:
        """fp32 ``[length, D]``."""
        dim = self.case.head_dim
        if self.name == "normal":
            return self.randn(length, dim)
        if self.name == "cruel-plateaus":
            return self.randn(PLATEAUS, dim)[torch.arange(length, device=self.device) // 3 % PLATEAUS]
        # Every dim of a growing multiple of one positive vector rounds to FP8 without ever falling, and so does the score.
        ramp = torch.exp2(torch.linspace(-8, 8, length, device=self.device))
        ramp = ramp.flip(0) if self.name == "cruel-descending" else ramp
        return ramp[:, None] * (0.5 + torch.rand(dim, generator=self.generator, device=self.device))

    def queries(self) -> tuple[Tensor, Tensor]:
        """fp32 ``[Q, H, D]`` and ``[Q, H]``; positive where scores must be monotonic."""
        q, weights = self.randn(self.case.rows, self.case.heads, self.case.head_dim), self.randn(self.case.rows, self.case.heads)
        return (q, weights) if self.name in ("normal", "cruel-plateaus") else (q.abs(), weights.abs())

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)


def recorded_inputs(path: Path, device: torch.device) -> list[Inputs]:
    """Each request of a file of recorded inputs by itself, with all its queries; requests without queries are left out.

    Args:
        path: the file.
        device: where to make them.

    Raises:
        ThresherError: what ``read_recorded`` refuses, or tensors whose shapes do not fit one another.
    """
    held, counts = read_recorded(path)
    q, k, weights = (held[name].float().to(device) for name in ("q", "k", "weights"))
    ok = q.dim() == 3 and k.dim() == 3 and weights.shape == q.shape[:2] and len(counts) == len(k) and q.shape[2] == k.shape[2]
    ok = ok and sum(counts) == len(q) > 0 and min(counts) >= 0 and max(counts) <= k.shape[1]
    must = "recorded inputs must be q [sum(rows), H, D], weights [sum(rows), H], k [requests, N, D] and rows up to N"
    require(ok, must, recorded_shapes(held, counts), "record them again")
    made = []
    for request, (q_QHD, weights_QH) in enumerate(zip(q.split(counts), weights.split(counts), strict=True)):
        rows, length = len(q_QHD), k.shape[1]
        if rows:
            positions = torch.arange(length - rows, length, device=device)
            query = _folded(q_QHD, weights_QH, positions, torch.zeros_like(positions))
            made.append(Inputs(query, pack_keys([quantize_fp8(k[request])])))
    return made


def _folded(q_QHD: Tensor, weights_QH: Tensor, positions: Tensor, requests: Tensor) -> IndexQuery:
    """Queries quantised, and every factor folded into their weights."""
    q, scales = quantize_fp8(q_QHD)
    return IndexQuery(q, weights_QH.float() * scales * (q.shape[1] * q.shape[2]) ** -0.5, positions, requests)


def read_recorded(path: Path | None) -> tuple[dict[str, Tensor], list[int]]:
    """A file of recorded inputs as it stands.

    Returns:
        its tensors, with ``q`` ``[sum(counts), H, D]`` and ``weights`` ``[sum(counts), H]`` where they are of a known form, and the counts:
        queries of each request, none where the form is not known.

    Raises:
        ThresherError: no file, one that cannot be read, or one without q, k or weights.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path is None:
        raise ThresherError("recorded inputs must come from a file; got none; pass --recorded FILE")
    try:
        held = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ThresherError(f"recorded inputs must be a safetensors file; got {path} ({error}); record them first") from None
    missing = {"q", "k", "weights"} - set(held)
    require(not missing, "recorded inputs must hold q, k and weights", f"{path} without {', '.join(sorted(missing))}", "record them")
    q, weights = held["q"], held["weights"]
    if "rows" in held:
        return held, held["rows"].flatten().tolist()
    if q.dim() == 4 and weights.shape == q.shape[:3]:
        return {**held, "q": q.flatten(0, 1), "weights": weights.flatten(0, 1)}, [q.shape[1]] * len(q)
    return held, []


def recorded_shapes(held: dict[str, Tensor], counts: list[int]) -> str:
    """What ``read_recorded`` gave, for a message."""
    got = ", ".join(f"{name} {tuple(held[name].shape)}" for name in ("q", "k", "weights"))
    return f"{got}, rows {counts}" if counts else got


class _Recorded:
    def __init__(self, path: Path | None, case: Case, lengths: list[int]) -> None:
        held, counts = read_recorded(path)
        q, self.k, weights = held["q"], held["k"], held["weights"]
        requests, rows = len(lengths), case.each
        need = f"q [{requests}+, {rows}+, {case.heads}, {case.head_dim}], k [{requests}+, {max(lengths)}+, {case.head_dim}]"
        ok = q.dim() == 3 and self.k.dim() == 3 and weights.shape == q.shape[:2] and len(counts) == len(self.k)
        ok = ok and sum(counts) == len(q) and min(counts, default=-1) >= 0 and len(counts) >= requests and min(counts[:requests]) >= rows
        ok = ok and q.shape[1:] == (case.heads, case.head_dim)
        ok = ok and self.k.shape[1] >= max(lengths) and self.k.shape[2] == case.head_dim
        got = recorded_shapes(held, counts)
        require(ok, f"{case.name} needs {need}, and weights like q", got, "choose a smaller case")
        self.q, self.weights = (torch.cat([part[-rows:] for part in x.split(counts)[:requests]]).float() for x in (q, weights))

    def keys(self, request: int, length: int) -> Tensor:
        return self.k[request, -length:].float()

    def queries(self) -> tuple[Tensor, Tensor]:
        return self.q, self.weights
