"""Exact top-k on a GPU, in Triton: no sort, no atomics that order could show in, no word from the host.

``one_program``: a short row stays in one program's registers, where a search over scores finds the threshold. That takes as many ties as
there is room for, and the row is written in column order. A longer row is read once in full:

- A sample of it gives a level that somewhat more than k scores should lie above.
- What lies above the level goes to a short list, which is searched and written like a short row.
- The list does not hold the answer where the sample misled, or where the level is a plateau that the k-th place falls into. Then
  four more passes over the row find the threshold, and a last one writes.

``one_pass`` does all that in one program a row. Few rows of great width would leave most of the chip idle, so for them ``guess_level``
takes the sample, a program a chunk ``collect``s, and whichever of a row's programs ends last selects from the list.

The guess is only about speed: whatever it is, the set is exact. So are two runs: chunks append to a list in any order, but which entries
it holds, and where each is written, do not depend on that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from thresher.cache.device import INTERPRET, on_device
from thresher.errors import require
from thresher.ops.select import triton_kernels as kernels
from thresher.ops.select import triton_split as split
from thresher.types import Selection

ONE_PROGRAM = 8192  # columns that one program holds: 16 a thread at 16 warps
ONE_PASS = 2**17  # columns that one program reads in a pass, however few the rows
MANY_ROWS = 64  # rows that fill the chip with one program each, however long
MAX_WIDTH = 2**21
MAX_TOPK = 8192
MAX_ROOM = 16384  # entries of a list, where a sample of 32768 allows it: more do not fit in the registers of ``collect``
CHUNK = 8192  # columns a program of ``collect`` reads: 16 a thread at 16 warps
TILE = 256  # columns, or entries of a list, that a warp writes at a time: 8 a thread
SMALL = 4096  # entries of a list that a narrower search does for
ONE_TILE = 8192  # columns of a short row that are written at a time
AHEAD = True  # ``one_pass`` reads its next chunk while it appends from the last
OVERLAP = True  # ``collect`` starts while ``guess_level`` runs (programmatic dependent launch)
MAX_REGISTERS = 64  # a thread: 32 warps fit on a multiprocessor


@dataclass(frozen=True)
class Plan:
    """How a long row is read: a function of shapes alone.

    Attributes:
        sample: scores looked at for the level, a power of two.
        want: which largest of them the level is.
        slack: how many places the level may be lower, to end its search sooner.
        room: entries of the list, a power of two.
        chunk: columns read at a time.
        warps: warps of a program.
        split: whether a row is shared by a program for each chunk.
    """

    sample: int
    want: int
    slack: int
    room: int
    chunk: int
    warps: int
    split: bool


def make_plan(num_rows: int, width: int, topk: int) -> Plan | None:
    """The plan of ``num_rows`` rows of ``width`` scores, None where a program holds a row.

    The sample holds ``hits`` of the topk best on average, give or take ``sqrt(hits)``, more where neighbours are alike. The level is set
    for a quarter as many again and five such deviations; the list has room for five deviations of what that brings. The smallest sample
    is taken that needs a list of no more than four times topk.
    """
    if width <= ONE_PROGRAM:
        return None
    for sample in (4096, 8192, 16384, 32768):
        hits = topk * sample / width
        want = min(math.ceil(1.25 * hits + 5 * math.sqrt(hits) + 4), sample)
        slack = want // 16
        room = triton.next_power_of_2(math.ceil((want + slack + 5 * math.sqrt(want)) * width / sample))
        if room <= min(max(4 * topk, 4096), MAX_ROOM) or 4 * sample > width:
            break
    shared = width > ONE_PASS and num_rows < MANY_ROWS
    warps = 16 if shared else pass_warps(num_rows)
    return Plan(sample, want, slack, room, CHUNK if shared else 1024 * warps, max(warps, room // 1024), shared)


def pass_warps(num_rows: int) -> int:
    """Warps of a program of ``one_pass``: as many as leave each multiprocessor about 32 of them."""
    return 32 if num_rows <= 132 else 16 if num_rows <= 264 else 8


def num_warps(block: int) -> int:
    """Warps for a program that holds ``block`` keys: 16 keys a thread."""
    return min(max(block // 512, 4), 16)


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

    plan = make_plan(num, width, topk)
    if plan is None:
        block = max(triton.next_power_of_2(width), 128)
        warps = num_warps(block)
        kernels.one_program[(num,)](
            *source, *pages, *out, width, topk, *strides, *table,
            BLOCK=block, TILE=min(block, ONE_TILE), **flags, num_warps=warps, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
        return indices, lengths, beside

    found = torch.empty(num, 2, plan.room, dtype=torch.int32, device=device)
    guess = (width // (plan.sample // 4), plan.want, plan.slack)
    sizes = {"CHUNK": plan.chunk, "ROOM": plan.room, "SMALL": min(SMALL, plan.room), "TILE": min(TILE * plan.warps, plan.room)}
    if not plan.split:
        if given:  # positions take registers, too
            sizes["CHUNK"] //= 2
        kernels.one_pass[(num,)](
            *source, *pages, *out, found, width, topk, *guess, *strides, *table,
            SAMPLE=plan.sample, AHEAD=AHEAD and not given, **sizes, **flags, num_warps=plan.warps, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
        return indices, lengths, beside

    chunks = triton.cdiv(width, plan.chunk)
    levels = torch.empty(num, dtype=torch.float32, device=device)
    counters = torch.empty(2, num, dtype=torch.int32, device=device)
    tables = torch.empty(2, num, chunks, dtype=torch.int32, device=device)
    overlap = {"OVERLAP": OVERLAP and not INTERPRET}
    split.guess_level[(num,)](
        *source, levels, *counters, *guess, *strides,
        SAMPLE=plan.sample, HAS_POSITIONS=given, **overlap, num_warps=min(plan.sample // 256, 32),
    )  # fmt: skip
    split.collect[(num * chunks,)](
        *source, *pages, *out, levels, *counters, *tables, found, width, topk, chunks, *strides, *table,
        CHUNKS=max(triton.next_power_of_2(chunks), 32), **sizes, **flags, **overlap,
        num_warps=plan.warps, maxnreg=MAX_REGISTERS, launch_pdl=overlap["OVERLAP"],
    )  # fmt: skip
    return indices, lengths, beside
