"""Score and select in one launch for a step of decoding, in CUDA C++ (``thresher/cuda/step.cu``): the set of the two steps, bit for bit.

Tiles of all queries are shared out evenly among the multiprocessors, whatever their lengths; scores stay in shared memory. The host reads
no value, so a step can be recorded in a CUDA graph and replayed with other lengths.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from thresher.cache.device import on_hopper, unit_rows
from thresher.cache.scratch import Scratch
from thresher.cuda import launch
from thresher.ops.index_score.triton import padded_heads
from thresher.ops.score_select.triton import TILE, multiprocessors, unfit
from thresher.types import IndexKeys, IndexQuery, Selection

if TYPE_CHECKING:
    from thresher.ops.send import Send

# 16 warps multiply and select; beside them two fetch and one keeps a bound, or four fetch.
THREADS = {"select_tokens": 608, "select_in_blocks": 640}
BINS, MOST, MAX_QUERIES, MASKED, EXTRA = 2048, 2048, 1024, 2**17, 24  # as in step.cu
GROUPS, WARPS = 4, 16  # that multiply
TOLD = BINS + 4  # words of a query that its parts share
TILES = 2**16  # bytes of struct Workspace in step.cu: of its tiles, or of what is there once all are scored
BEFORE_PAIRS = 17776  # beside those, heads and weights
PIECE = 16  # bytes that are sent at a time


class Sending(ctypes.Structure):
    """``struct Sending`` of step.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("pieces", "addresses", "turns")),
        *((name, ctypes.c_ulonglong) for name in ("at", "patience")),
        *((name, ctypes.c_uint) for name in ("num", "row", "ranks", "rank", "first", "blocks")),
    ]

    @classmethod
    def of(cls, send: Send | None) -> Sending:
        """What a launch sends, if ``sends``."""
        if send is None:
            return cls()
        words, each = send.words, send.words.element_size()
        return cls(
            pieces=words.data_ptr(), addresses=send.addresses.data_ptr(), turns=send.turns.data_ptr(), at=send.at, patience=send.patience,
            num=len(words) * each // PIECE, row=send.row * each // PIECE, ranks=len(send.addresses), rank=send.rank, first=send.first,
            blocks=send.programs,
        )  # fmt: skip


class Step(ctypes.Structure):
    """``struct Step`` of step.cu, a multiple of 64 bytes there."""

    _fields_ = [
        ("tiles", ctypes.c_ubyte * 128),
        *((name, ctypes.c_void_p) for name in ("pages", "q", "weights", "owners", "positions", "lengths", "table")),
        *((name, ctypes.c_void_p) for name in ("indices", "slots", "taken", "beside", "told")),
        *((name, ctypes.c_void_p) for name in ("words", "pairs", "spilt", "ranks", "blocks")),
        *((name, ctypes.c_uint) for name in ("num_queries", "num_heads", "table_tiles", "num_requests", "num_pages", "topk")),
        *((name, ctypes.c_uint) for name in ("page_bytes", "q_row", "q_head", "w_row", "table_row", "held", "masked")),
        *((name, ctypes.c_uint) for name in ("parts", "row_tiles", "block_size", "most_blocks")),
        ("sending", Sending),
        ("spare", ctypes.c_void_p * 6),
    ]


def unsupported(query: IndexQuery, keys: IndexKeys, topk: int) -> str | None:
    """Why this kernel cannot run, or None."""
    if not on_hopper(query.q):
        return "needs compute capability 9.0"
    misfit = unfit(query, keys)
    if misfit:
        return misfit
    if query.num_queries > MAX_QUERIES:
        return f"needs at most {MAX_QUERIES} queries, not {query.num_queries}"
    return None if keys.pages.data_ptr() % 16 == 0 else "needs pages at a multiple of 16 bytes"


def worthwhile(num_heads: int, num_queries: int, num_requests: int, room_tokens: int, scored: bool) -> bool:
    """Whether this kernel is taken before others: where nothing is to be scored; else on an H200 it is the faster one from 8k keys on for
    one query, from 4k on for four, and as fast for drafts of four tokens, each of which reads the keys again (benchmarks/results/auto,
    docs/lab-log.md)."""
    return not scored or (num_queries <= 4 * num_requests and room_tokens >= (8192 if num_queries < 4 else 4096))


def sends(send: Send, programs: int) -> bool:
    """Whether a launch of so many thread blocks can send these words."""
    each = send.words.element_size()
    return send.row * each % PIECE == 0 and send.words.data_ptr() % PIECE == 0 and send.programs <= programs


class Room(NamedTuple):
    """Shared memory of a thread block, to begin at a KB: bytes, of how many pairs of a warp, and of how many parts of queries."""

    size: int
    held: int
    parts: int


def shared_memory(heads: int, dim: int, num: int, tiles: int, before_pairs: int = BEFORE_PAIRS) -> Room:
    """What a thread block takes for ``tiles`` tiles of ``num`` queries."""
    parts = min(num, tiles // (EXTRA + 1) + 2)
    fixed = 1024 + TILES + heads * (dim + 4) + before_pairs + 4 * WARPS * (parts + 1)
    held = min(of_warp(tiles), (launch.SHARED - fixed) // (8 * WARPS))
    return Room(fixed + 8 * WARPS * held, held, parts)


def of_warp(tiles: int) -> int:
    """Keys of so many tiles that one warp scores, at most."""
    return -(-tiles // GROUPS) * TILE * GROUPS // WARPS


def shared_words(num: int, programs: int) -> int:
    """int32 words that thread blocks exchange what they find by: for each query bins and counts, pairs, and a word of each block."""
    return -(-num * (TOLD + 2 * (2 * MOST + programs)) // 4) * 4


def score_select(query: IndexQuery, keys: IndexKeys, topk: int, with_scores: bool = True, scratch: Scratch | None = None) -> Selection:
    """The public function of this name, for arguments that ``unsupported`` lets pass. No value is read on the host."""
    programs = multiprocessors(query.q.device)
    shared = None if scratch is None else scratch.zeros(shared_words(query.num_queries, programs), query.q.device)
    return select_step(query, keys, topk, with_scores, programs, shared, None if scratch is None else scratch.take_errand())


def select_step(
    query: IndexQuery, keys: IndexKeys, topk: int, with_scores: bool, programs: int, shared: Tensor | None = None, send: Send | None = None
) -> Selection:
    """``score_select`` on so many multiprocessors.

    Args:
        programs: thread blocks, of which each multiprocessor must have room for one.
        shared: int32, at least ``shared_words(Q, programs)`` zeros, which are zeros again when the launch ends; None makes some.
        send: what the launch sends beside, if ``sends``; it ends when what the other ranks sent is here.
    """
    num, device = query.num_queries, query.q.device
    picked = room(num, topk, with_scores, device)
    if not num:
        return picked
    shared = torch.zeros(shared_words(num, programs), dtype=torch.int32, device=device) if shared is None else shared
    tiles = keys.page_table.shape[1]
    within = shared_memory(rows_of_heads(query), keys.head_dim, num, share(num, tiles, programs))
    read = readable(query)
    arguments, _kept = step_of(read, keys, keys, topk, picked, tiles, within, shared.data_ptr(), programs, sending=Sending.of(send))
    launch_step("select_tokens", arguments, read, programs, within.size)
    return picked


def room(num: int, topk: int, with_scores: bool, device: torch.device) -> Selection:
    """A selection to be written."""
    indices, slots = torch.empty(2, num, topk, dtype=torch.int32, device=device)
    taken = torch.empty(num, dtype=torch.int64, device=device)
    return Selection(indices, taken, scores=torch.empty(num, topk, device=device) if with_scores else None, slots=slots)


def rows_of_heads(query: IndexQuery) -> int:
    """Heads of a kernel that takes so many."""
    return max(padded_heads(query.num_heads), 16)


def share(num: int, row_tiles: int, programs: int) -> int:
    """Tiles that a thread block has at most, of ``num`` queries with up to ``row_tiles``."""
    return -(-num * (row_tiles + EXTRA) // programs)


def readable(query: IndexQuery) -> IndexQuery:
    """The query as kernels read it."""
    q = unit_rows(query.q)
    if any(x % 16 for x in (q.data_ptr(), q.stride(0), q.stride(1))):
        q = q.clone()
    return IndexQuery(q, unit_rows(query.weights), query.positions.contiguous(), query.requests.contiguous())


def step_of(
    query: IndexQuery, keys: IndexKeys, seen: IndexKeys, topk: int, picked: Selection, row_tiles: int, within: Room, told: int,
    programs: int, **more: int | Sending,
) -> tuple[Step, tuple[Tensor | None, ...]]:  # fmt: skip
    """A kernel's arguments, and tensors that must be kept until it is launched.

    Args:
        query: a ``readable`` one.
        keys: that are scored.
        seen: whose positions queries have: the same, or those of which ``keys`` are means.
        picked: where to; without ``scores`` these are not written. Blocks have no slots.
        row_tiles: of a query at most.
        within: what shared memory has room for.
        told: address of ``shared_words`` zeros.
        more: other fields.
    """
    num, dim, device = query.num_queries, keys.head_dim, query.q.device
    pages, table, lengths = keys.pages.contiguous(), unit_rows(keys.page_table), seen.lengths.contiguous()
    pairs = told + 4 * num * TOLD
    most, num_keys = share(num, row_tiles, programs), (num * (row_tiles + EXTRA) + (GROUPS - 1) * programs) * TILE
    spills = of_warp(most) > within.held or most * TILE > MASKED  # a pair and a bit for each key
    spilt = torch.empty(num_keys * 2 + num_keys // 32, dtype=torch.int32, device=device) if spills else None
    ranks = torch.empty(num_keys, dtype=torch.int32, device=device) if picked.scores is not None else None
    q, weights = query.q, query.weights
    arguments = Step(
        tiles=launch.tile_map(pages.data_ptr(), len(pages), TILE * (dim + 4), dim), pages=pages.data_ptr(), q=q.data_ptr(),
        weights=weights.data_ptr(), owners=query.requests.data_ptr(), positions=query.positions.data_ptr(), lengths=lengths.data_ptr(),
        table=table.data_ptr(), indices=picked.indices.data_ptr(), slots=_address(picked.slots), taken=picked.lengths.data_ptr(),
        beside=_address(picked.scores), told=told, words=pairs + 8 * num * 2 * MOST, pairs=pairs, spilt=_address(spilt),
        ranks=_address(ranks), num_queries=num, num_heads=query.num_heads, table_tiles=seen.page_table.shape[1],
        num_requests=keys.num_requests, num_pages=len(pages), topk=topk, page_bytes=TILE * (dim + 4), q_row=q.stride(0),
        q_head=q.stride(1), w_row=weights.stride(0), table_row=table.stride(0), held=within.held, masked=MASKED, parts=within.parts,
        row_tiles=row_tiles, **more,
    )  # fmt: skip
    return arguments, (pages, table, lengths, spilt, ranks)


def launch_step(name: str, arguments: ctypes.Structure, query: IndexQuery, programs: int, size: int) -> None:
    """Launch a kernel of step.cu, with so many bytes of shared memory."""
    teams = 1 if query.num_queries == 1 else 2
    values = {"DIM": query.q.shape[2], "HEADS": rows_of_heads(query), "TEAMS": teams, "HISA": int(name == "select_in_blocks")}
    defines = tuple(f"STEP_{key}={value}" for key, value in values.items())
    launch.launch("step", name, arguments, programs, THREADS[name], size, query.q.device, together=True, defines=defines)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
