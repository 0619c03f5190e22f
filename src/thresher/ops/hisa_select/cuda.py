"""HISA's selection in one launch of ``thresher/cuda/step.cu``, for a step of decoding: the set of the four operations, bit for bit.

Means are brought up to date, the blocks with the best are chosen, and the tokens in those selected from. The host reads no value, so a step
can be recorded in a CUDA graph and replayed with other lengths.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thresher.cache.block_means import Growing, held_means
from thresher.cache.scratch import Scratch
from thresher.ops.score_select import cuda as step
from thresher.ops.score_select.triton import TILE, multiprocessors, unfit
from thresher.types import IndexKeys, IndexQuery, Selection

if TYPE_CHECKING:
    from thresher.ops.send import Send

BEFORE_PAIRS = step.BEFORE_PAIRS + 13312  # as struct Workspace of step.cu has it for HISA
MAPPED = 1024  # as in step.cu
MEETING = 4  # words of all thread blocks; two are used


class Hisa(ctypes.Structure):
    """``struct Hisa`` of step_hisa.cuh, a multiple of 64 bytes there."""

    _fields_ = [
        ("of_blocks", step.Step),
        ("in_blocks", step.Step),
        *((name, ctypes.c_void_p) for name in ("pooled", "counts", "meeting")),
        ("spare", ctypes.c_void_p * 5),
    ]


def unsupported(query: IndexQuery, keys: IndexKeys, means: IndexKeys, num_blocks: int, block_size: int, topk: int) -> str | None:
    """Why this kernel cannot run, or None."""
    why = step.unsupported(query, keys, topk) or unfit(query, means)
    if why is not None:
        return why
    if block_size % TILE:
        return f"needs blocks of a multiple of {TILE} tokens, not {block_size}"
    if means.room < keys.room // block_size:
        return f"needs room for the means of {keys.room // block_size} blocks, not {means.room}"
    tiles = step.share(query.num_queries, num_blocks * block_size // TILE, multiprocessors(query.q.device))
    if tiles > MAPPED:
        return f"needs at most {MAPPED} tiles of {TILE} keys a multiprocessor, not {tiles}"
    return None if means.pages.data_ptr() % 16 == 0 else "needs pages of means at a multiple of 16 bytes"


def worthwhile(num_queries: int, num_requests: int) -> bool:
    """Whether this kernel is taken before the four operations: on an H200 it takes 0.92 of their time for one query over 128k keys, 0.7 for
    128 over 64k, 0.92 for 256 over 32k, and took 1.8 for 512 over 4k (docs/lab-log.md)."""
    return num_queries <= min(256, 4 * num_requests)


def shared_words(num: int, num_blocks: int, programs: int) -> int:
    """int32 words that thread blocks exchange what they find by, of both selections, and the blocks that the first chose."""
    return 2 * step.shared_words(num, programs) + MEETING + num * (num_blocks - 1)


def hisa_select(
    query: IndexQuery,
    keys: IndexKeys,
    means: IndexKeys | Growing,
    num_blocks: int,
    block_size: int,
    topk: int,
    with_scores: bool = True,
    scratch: Scratch | None = None,
) -> Selection:
    """The public function of this name, for arguments that ``unsupported`` lets pass. No value is read on the host."""
    programs = multiprocessors(query.q.device)
    shared = None if scratch is None else scratch.zeros(shared_words(query.num_queries, num_blocks, programs), query.q.device)
    send = None if scratch is None else scratch.take_errand()
    return select_step(query, keys, means, num_blocks, block_size, topk, with_scores, programs, shared, send)


def select_step(
    query: IndexQuery,
    keys: IndexKeys,
    means: IndexKeys | Growing,
    num_blocks: int,
    block_size: int,
    topk: int,
    with_scores: bool,
    programs: int,
    shared: Tensor | None = None,
    send: Send | None = None,
) -> Selection:
    """``hisa_select`` on so many multiprocessors; ``programs``, ``shared`` and ``send`` as for ``score_select.cuda.select_step``,
    with ``shared_words`` of this module."""
    num, device = query.num_queries, query.q.device
    picked = step.room(num, topk, with_scores, device)
    if not num:
        return picked
    shared = torch.zeros(shared_words(num, num_blocks, programs), dtype=torch.int32, device=device) if shared is None else shared
    growing = means if isinstance(means, Growing) else None
    pages = held_means(means)
    mean_tiles, tiles = pages.page_table.shape[1], num_blocks * block_size // TILE
    most = step.share(num, max(mean_tiles, tiles), programs)
    within = step.shared_memory(step.rows_of_heads(query), keys.head_dim, num, most, BEFORE_PAIRS)
    read = step.readable(query)
    meeting = shared.data_ptr()
    told = meeting + 4 * MEETING
    then_told = told + 4 * step.shared_words(num, programs)
    blocks = then_told + 4 * step.shared_words(num, programs)
    both = {"block_size": block_size, "most_blocks": num_blocks, "blocks": blocks}
    sending = step.Sending.of(send)
    unscored = Selection(picked.indices, picked.lengths)  # what blocks are chosen by is nobody's to see
    of_blocks, _kept = step.step_of(read, pages, keys, num_blocks - 1, unscored, mean_tiles, within, told, programs, **both)
    in_blocks, _kept_too = step.step_of(read, keys, keys, topk, picked, tiles, within, then_told, programs, sending=sending, **both)
    grown = (None, None) if growing is None else (growing.pooled.data_ptr(), pages.lengths.data_ptr())
    arguments = Hisa(of_blocks=of_blocks, in_blocks=in_blocks, pooled=grown[0], counts=grown[1], meeting=meeting)
    step.launch_step("select_in_blocks", arguments, read, programs, within.size)
    return picked
