"""HISA's selection in two launches of ``thresher/cuda/step.cu``, for a step of decoding: the set of the four operations, bit for bit.

The first scores the means of blocks and chooses the best, the second scores the tokens of those and selects. The host reads no value, so
both can be recorded in a CUDA graph and replayed with other lengths.
"""

from __future__ import annotations

from torch import Tensor

from thresher.cache.scratch import Scratch
from thresher.ops.score_select import cuda as step
from thresher.ops.score_select.triton import TILE, multiprocessors, unfit
from thresher.types import IndexKeys, IndexQuery, Selection


def unsupported(query: IndexQuery, keys: IndexKeys, means: IndexKeys, block_size: int, topk: int) -> str | None:
    """Why these kernels cannot run, or None."""
    why = step.unsupported(query, keys, topk) or unfit(query, means)
    if why is not None:
        return why
    if block_size % TILE:
        return f"needs blocks of a multiple of {TILE} tokens, not {block_size}"
    return None if means.pages.data_ptr() % 16 == 0 else "needs pages of means at a multiple of 16 bytes"


def worthwhile(num_queries: int, num_requests: int) -> bool:
    """Whether these kernels are taken before the four operations: for a step of decoding, drafts of up to four tokens included."""
    return num_queries <= 4 * num_requests


def hisa_select(
    query: IndexQuery,
    keys: IndexKeys,
    means: IndexKeys,
    num_blocks: int,
    block_size: int,
    topk: int,
    with_scores: bool = True,
    scratch: Scratch | None = None,
) -> Selection:
    """The public function of this name, for arguments that ``unsupported`` lets pass. No value is read on the host."""
    programs = multiprocessors(query.q.device)
    shared = step.shared_zeros(query, programs, scratch)
    return select_step(query, keys, means, num_blocks, block_size, topk, with_scores, programs, shared)


def select_step(
    query: IndexQuery,
    keys: IndexKeys,
    means: IndexKeys,
    num_blocks: int,
    block_size: int,
    topk: int,
    with_scores: bool,
    programs: int,
    shared: Tensor | None = None,
) -> Selection:
    """``hisa_select`` on so many multiprocessors; ``programs`` and ``shared`` as for ``score_select.cuda.select_step``."""
    by_means = step.Stage(1, tokens=keys, block_size=block_size)
    blocks = step.run_step(by_means, query, means, num_blocks - 1, False, programs, shared)
    in_blocks = step.Stage(2, block_size=block_size, blocks=blocks.indices, chosen=blocks.lengths)
    return step.run_step(in_blocks, query, keys, topk, with_scores, programs, shared)
