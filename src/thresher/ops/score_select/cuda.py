"""Score and select in one launch for a step of decoding, in CUDA C++ (``thresher/cuda/step.cu``): the set of the two steps, bit for bit.

Tiles of all queries are shared out evenly among the multiprocessors, whatever their lengths; scores stay in shared memory. The host reads
no value, so a step can be recorded in a CUDA graph and replayed with other lengths.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from thresher.cache.device import on_hopper, unit_rows
from thresher.cache.scratch import Scratch
from thresher.cuda import launch
from thresher.ops.index_score.triton import padded_heads
from thresher.ops.score_select.triton import TILE, multiprocessors, unfit
from thresher.types import IndexKeys, IndexQuery, Selection

THREADS = 640  # four groups of four warps that multiply and select, and four warps that fetch
BINS, MOST, MAX_QUERIES, MASKED, EXTRA = 2048, 2048, 1024, 2**17, 12  # as in step.cu
TOLD = BINS + 4  # words of a query that its parts share
TILES = 2**16  # bytes of struct Workspace in step.cu: of its tiles, or of what is there once all are scored
BEFORE_ORDERS = 17744  # beside those, heads and weights


class Step(ctypes.Structure):
    """``struct Step`` of step.cu, a multiple of 64 bytes there."""

    _fields_ = [
        ("tiles", ctypes.c_ubyte * 128),
        *((name, ctypes.c_void_p) for name in ("pages", "q", "weights", "owners", "positions", "lengths", "table")),
        *((name, ctypes.c_void_p) for name in ("indices", "taken", "beside", "told", "words", "pairs", "spilt", "blocks", "chosen")),
        *((name, ctypes.c_uint) for name in ("num_queries", "num_heads", "table_tiles", "num_requests", "num_pages", "topk")),
        *((name, ctypes.c_uint) for name in ("page_bytes", "q_row", "q_head", "w_row", "table_row", "held", "masked")),
        *((name, ctypes.c_uint) for name in ("width", "row_tiles", "block_size", "most_blocks")),
        ("spare", ctypes.c_uint * 15),
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


def worthwhile(num_heads: int, num_queries: int, num_requests: int, room_tokens: int) -> bool:
    """Whether this kernel is taken before others: on an H200 it is the faster one from 16k keys on for one query, from 32k on for 128,
    and for drafts of up to four tokens, each of which reads the keys again (docs/lab-log.md). 8k keys, between two that were measured, is
    a guess."""
    return num_queries <= 4 * num_requests and room_tokens >= max(8192, 256 * num_queries)


def shared_memory(heads: int, dim: int, tiles: int) -> tuple[int, int]:
    """``(bytes, held)``: of shared memory for a thread block, to begin at a KB, and how many of the orders of ``tiles`` tiles it has room
    for."""
    fixed = 1024 + TILES + heads * (dim + 4) + BEFORE_ORDERS
    held = min(tiles, (launch.SHARED - fixed) // (4 * TILE)) * TILE
    return fixed + 4 * held, held


def shared_words(num: int, programs: int) -> int:
    """int32 words that thread blocks exchange what they find by: for each query bins and counts, pairs, and a word of each block."""
    return num * (TOLD + 2 * (2 * MOST + programs))


def score_select(query: IndexQuery, keys: IndexKeys, topk: int, with_scores: bool = True, scratch: Scratch | None = None) -> Selection:
    """The public function of this name, for arguments that ``unsupported`` lets pass. No value is read on the host."""
    programs = multiprocessors(query.q.device)
    return select_step(query, keys, topk, with_scores, programs, shared_zeros(query, programs, scratch))


def shared_zeros(query: IndexQuery, programs: int, scratch: Scratch | None) -> Tensor | None:
    """What ``select_step`` and ``run_step`` take as ``shared``."""
    return None if scratch is None else scratch.zeros(shared_words(query.num_queries, programs), query.q.device)


def select_step(
    query: IndexQuery, keys: IndexKeys, topk: int, with_scores: bool, programs: int, shared: Tensor | None = None
) -> Selection:
    """``score_select`` on so many multiprocessors.

    Args:
        programs: thread blocks, of which each multiprocessor must have room for one.
        shared: int32, at least ``shared_words(Q, programs)`` zeros, which are zeros again when the launch ends; None makes some.
    """
    return run_step(Stage(), query, keys, topk, with_scores, programs, shared)


@dataclass(frozen=True)
class Stage:
    """What is selected, as ``enum Stage`` of step.cu: tokens; or, for HISA, blocks by their means; or tokens of the blocks chosen.

    Attributes:
        number: 0, 1 or 2, in that order.
        tokens: 1: the keys of which the scored ones are means.
        block_size: 1, 2: tokens of a block; 2: a multiple of ``TILE``.
        blocks, chosen: 2: what 1 gave, int32 ``[Q, m]`` and int64 ``[Q]``.
    """

    number: int = 0
    tokens: IndexKeys | None = None
    block_size: int = 0
    blocks: Tensor | None = None
    chosen: Tensor | None = None


def run_step(
    stage: Stage, query: IndexQuery, keys: IndexKeys, topk: int, with_scores: bool, programs: int, shared: Tensor | None
) -> Selection:
    """``select_step`` for any ``stage``. Of blocks there are topk and the query's own, in as many columns."""
    num, dim, device = query.num_queries, keys.head_dim, query.q.device
    width = topk + (stage.number == 1)
    indices = torch.empty(num, width, dtype=torch.int32, device=device)
    taken = torch.empty(num, dtype=torch.int64, device=device)
    beside = torch.empty(num, width, device=device) if with_scores else None
    if not num:
        return Selection(indices, taken, scores=beside)
    q, weights, table = unit_rows(query.q), unit_rows(query.weights), unit_rows(keys.page_table)
    if any(x % 16 for x in (q.data_ptr(), q.stride(0), q.stride(1))):
        q = q.clone()
    pages = keys.pages.contiguous()
    seen = stage.tokens or keys
    owners, positions, lengths = query.requests.contiguous(), query.positions.contiguous(), seen.lengths.contiguous()
    heads = max(padded_heads(query.num_heads), 16)
    most_blocks = 0 if stage.blocks is None else stage.blocks.shape[1]
    row_tiles = most_blocks * stage.block_size // TILE or table.shape[1]
    tiles = num * (row_tiles + EXTRA)
    share = -(-tiles // programs)
    size, held = shared_memory(heads, dim, share)
    shared = torch.zeros(shared_words(num, programs), dtype=torch.int32, device=device) if shared is None else shared
    told = shared.data_ptr()
    pairs = told + 4 * num * TOLD
    words = pairs + 8 * num * 2 * MOST
    spills = share * TILE > min(held, MASKED)  # orders, and one bit for each
    spilt = torch.empty(tiles * (TILE + TILE // 32), dtype=torch.int32, device=device) if spills else None
    arguments = Step(
        tiles=launch.tile_map(pages.data_ptr(), len(pages), TILE * (dim + 4), dim), pages=pages.data_ptr(), q=q.data_ptr(),
        weights=weights.data_ptr(), owners=owners.data_ptr(), positions=positions.data_ptr(), lengths=lengths.data_ptr(),
        table=table.data_ptr(), indices=indices.data_ptr(), taken=taken.data_ptr(), beside=_address(beside), told=told,
        words=words, pairs=pairs, spilt=_address(spilt), blocks=_address(stage.blocks), chosen=_address(stage.chosen), num_queries=num,
        num_heads=query.num_heads, table_tiles=seen.page_table.shape[1], num_requests=keys.num_requests, num_pages=len(pages), topk=topk,
        page_bytes=TILE * (dim + 4), q_row=q.stride(0), q_head=q.stride(1), w_row=weights.stride(0), table_row=table.stride(0), held=held,
        masked=MASKED, width=width, row_tiles=row_tiles, block_size=stage.block_size, most_blocks=most_blocks,
    )  # fmt: skip
    defines = (f"STEP_DIM={dim}", f"STEP_HEADS={heads}", f"STEP_STAGE={stage.number}")
    launch.launch("step", "kernel", arguments, programs, THREADS, size, device, together=True, defines=defines)
    return Selection(indices, taken, scores=beside)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
