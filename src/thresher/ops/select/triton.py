"""Exact top-k on a GPU, in Triton: no sort, no atomics that order could show in, no word from the host.

A row that fits in the registers of one program is searched there: bisection over the ordered 32-bit keys finds the threshold, which takes
as many ties as there is room for, and the row is written in column order. A longer row is read once in full:

1. ``guess_level``: a sample of the row (4096 to 16384 scores) gives a level that somewhat more than k scores should lie above.
2. ``collect``: the one full pass. What lies above the level goes to a short list; what equals it is counted, per chunk.
3. ``settle``: the short list is searched like a short row. It holds the answer unless the sample misled or the level is a plateau that
   the k-th place falls into. Then the plateau is the threshold, or four more passes over the row find it, and
4. ``rescan`` writes such a row from the scores; for the others it returns at once.

The guess is only about speed: whatever it is, the set is exact. So are two runs: chunks append to a list in any order, but which entries
it holds, and the order in which they are read, do not depend on that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from thresher.cache.device import on_device
from thresher.errors import require
from thresher.ops.select import triton_kernels as kernels
from thresher.types import Selection

ONE_PROGRAM = 16384  # columns that one program searches: 32 keys a thread at 16 warps
MAX_WIDTH = 2**21
MAX_TOPK = 8192
CHUNK = 4096  # columns a program of ``collect`` reads: 32 a thread at 4 warps
TILE = 256  # columns, or entries of a list, that a warp writes at a time: 8 a thread
MAX_REGISTERS = 64  # a thread: two programs of 16 warps fit on a multiprocessor
COLLECT_REGISTERS = 48  # ten programs of 4 warps: 160 KB in flight
RESCAN_PROGRAMS = 512  # about four a multiprocessor


@dataclass(frozen=True)
class Plan:
    """How a long row is cut: a function of shapes alone.

    Attributes:
        sample: scores looked at for the level, a power of two.
        want: which largest of them the level is.
        slack: how many places the level may be lower, to end its search sooner.
        room: entries of the list, a power of two.
        chunk: columns a program collects from.
    """

    sample: int
    want: int
    slack: int
    room: int
    chunk: int


def make_plan(width: int, topk: int) -> Plan | None:
    """The plan of rows of ``width`` scores, None where one program takes a row.

    The sample holds ``hits`` of the topk best on average, give or take ``sqrt(hits)``, more where neighbours are alike. The level is set
    for half as many again and six such deviations; the list has room for six deviations of what that brings.
    """
    if width <= ONE_PROGRAM:
        return None
    sample = min(max(triton.next_power_of_2(width // 32), 4096), 16384)
    hits = topk * sample / width
    want = math.ceil(1.5 * hits + 6 * math.sqrt(hits) + 4)
    slack = want // 16
    room = triton.next_power_of_2(math.ceil((want + slack + 6 * math.sqrt(want)) * width / sample))
    return Plan(sample, want, slack, room, CHUNK)


def num_warps(block: int) -> int:
    """Warps for a program that holds ``block`` keys: 16 to 32 keys a thread."""
    return min(max(block // 512, 4), 16) if block <= 16384 else 32


def unsupported(num_rows: int, width: int, topk: int) -> str | None:
    """Why the kernels cannot take scores ``[num_rows, width]``, in one line; None when they can."""
    if width > MAX_WIDTH:
        return f"rows hold at most {MAX_WIDTH} scores, got {width}"
    if width > ONE_PROGRAM and topk > MAX_TOPK:
        return f"topk is at most {MAX_TOPK} for rows longer than {ONE_PROGRAM}, got {topk}"
    if num_rows * triton.cdiv(max(width, 1), CHUNK) >= 2**31:
        return f"at most {2**31 - 1} chunks of {CHUNK} scores, got {num_rows} rows of {width}"
    return None


def select_topk(scores: Tensor, topk: int, space: str = "logical", positions: Tensor | None = None, with_scores: bool = True) -> Selection:
    """``thresher.ops.select_topk`` for checked arguments; without ``with_scores`` the selection's scores are None."""
    with on_device(scores):
        indices, lengths, beside = _run(scores, topk, positions, None, with_scores)
    return Selection(indices=indices, lengths=lengths, space=space, scores=beside)


def select_topk_slots(
    scores: Tensor,
    topk: int,
    page_table: Tensor,
    requests: Tensor,
    page_size: int,
    positions: Tensor | None = None,
    with_scores: bool = False,
) -> Selection:
    """Top-k as slots: each selected position goes through its request's page table as it is written.

    Args:
        scores, topk, positions: as for ``select_topk``; a column (or its entry of ``positions``) is a position of the row's request.
        page_table: int32 ``[B, max_pages]``, -1 where unused.
        requests: int64 ``[Q]``, each row's request.
        page_size: tokens in a page.
        with_scores: whether to return the scores beside.

    Returns:
        Selection in the space "slot": int32 ``[Q, topk]`` in the order of the positions, which slots need not ascend in; -1 padded, and -1
        in place where the request or the page is not in the table.

    Raises:
        ThresherError: a shape or dtype that does not fit.
    """
    ok = page_table.dim() == 2 and page_table.dtype == torch.int32
    require(ok, "page_table must be int32 [requests, max_pages]", f"{page_table.dtype} {tuple(page_table.shape)}", "convert it")
    ok = requests.shape == scores.shape[:1] and requests.dtype == torch.int64
    require(ok, f"requests must be int64 [{scores.shape[0]}]", f"{requests.dtype} {tuple(requests.shape)}", "convert it")
    require(page_size >= 1, "page_size must be at least 1", page_size, "64 is usual")
    paged = (page_table.contiguous(), requests.contiguous(), page_size)
    with on_device(scores):
        indices, lengths, beside = _run(scores, topk, positions, paged, with_scores)
    return Selection(indices=indices, lengths=lengths, space="slot", scores=beside)


def _run(
    scores: Tensor, topk: int, positions: Tensor | None, paged: tuple[Tensor, Tensor, int] | None, with_scores: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    positions = positions if positions is None or positions.stride(1) == 1 else positions.contiguous()
    num, width = scores.shape
    device = scores.device
    indices = torch.empty(num, topk, dtype=torch.int32, device=device)
    lengths = torch.empty(num, dtype=torch.int64, device=device)
    beside = torch.empty(num, topk, dtype=torch.float32, device=device) if with_scores else None
    if num == 0:
        return indices, lengths, beside

    page_table, requests, page_size = paged or (indices, lengths, 1)
    given = positions is not None
    flags = {"HAS_POSITIONS": given, "SLOTS": paged is not None, "WITH_SCORES": with_scores}
    source = (scores, positions if positions is not None else scores)
    pages = (page_table, requests)
    out = (indices, lengths, beside if beside is not None else scores)
    strides = (scores.stride(0), positions.stride(0) if positions is not None else 0)
    table = (page_table.shape[0], page_table.shape[1], page_size)

    plan = make_plan(width, topk)
    if plan is None:
        block = max(triton.next_power_of_2(width), 128)
        kernels.one_program[(num,)](
            *source, *pages, *out, width, topk, *strides, *table,
            BLOCK=block, TILE=min(block, TILE * num_warps(block)), **flags, num_warps=num_warps(block), maxnreg=MAX_REGISTERS,
        )  # fmt: skip
        return indices, lengths, beside

    chunks = triton.cdiv(width, plan.chunk)
    log_chunks = max((chunks - 1).bit_length(), 5)
    row_state = torch.empty(5, num, dtype=torch.int32, device=device)
    levels, counters, rescans = row_state[0], row_state[1], row_state[2:]
    tables = torch.empty(3, num, chunks, dtype=torch.int32, device=device)
    found = torch.empty(num, plan.room, dtype=torch.int64, device=device)
    kernels.guess_level[(num,)](
        *source, levels, counters, width // (plan.sample // 8), plan.want, plan.slack, *strides,
        SAMPLE=plan.sample, HAS_POSITIONS=given, num_warps=num_warps(plan.sample),
    )  # fmt: skip
    kernels.collect[(num * chunks,)](
        *source, levels, counters, *tables, found, width, chunks, *strides,
        CHUNK=plan.chunk, ROOM=plan.room, HAS_POSITIONS=given, num_warps=4, maxnreg=COLLECT_REGISTERS,
    )  # fmt: skip
    warps = num_warps(plan.room)
    kernels.settle[(num,)](
        *source, *pages, *out, levels, counters, *tables, found, rescans, width, topk, chunks, *strides, *table,
        CHUNK=plan.chunk, ROOM=plan.room, TILE=TILE * warps, LOG_CHUNKS=log_chunks, **flags, num_warps=warps, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    splits = min(chunks, triton.cdiv(RESCAN_PROGRAMS, num))
    kernels.rescan[(num * splits,)](
        *source, *pages, out[0], out[2], tables[0], tables[1], rescans, width, topk, chunks, splits, *strides, *table,
        CHUNK=plan.chunk, TILE=min(TILE * 8, plan.chunk), LOG_CHUNKS=log_chunks, **flags, num_warps=8, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return indices, lengths, beside
