"""Exact top-k on a GPU, in Triton: no sort, no atomics that order could show in, no word from the host.

``one_program``: a short row stays in one program's registers, where a search over scores finds the threshold, from a guess by their mean
and deviation and with three counts a step. That takes as many ties as there is room for, and the row is written in column order. A longer
row is read once in full:

- A sample of it gives a level that somewhat more than k scores should lie above. A row that the list has room for needs none.
- What lies above the level goes to a short list, which is searched, one count a step, and written in column order.
- Where the list falls short and ties with the level make up for it, a plateau or NaN, the level is the threshold: the list is written
  whole, and with it as many of the first ties as are lacking.
- Where the sample misled, so that neither holds the answer, four more passes over the row find the threshold, and a last one writes.

``one_pass`` does all that in one program a row; it looks for ties from the row's start until it has enough. Few rows would leave most of
the chip idle, so for them ``guess_level`` takes the sample, a program a chunk ``collect``s, and whichever of a row's programs ends last
selects from the list, or writes the ties from marks that all have left, a bit a column.

The guess is only about speed: whatever it is, the set is exact. So are two runs: chunks append to a list in any order, but which entries
it holds, and where each is written, do not depend on that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from thresher.cache.device import on_device, overlapped, unit_rows
from thresher.errors import require
from thresher.ops.select import triton_kernels as kernels
from thresher.ops.select import triton_split as split
from thresher.ops.select.triton_blocks import blocks_kernel
from thresher.types import IndexKeys, IndexQuery, Selection

ONE_PROGRAM = 8192  # columns that one program holds, however few the rows
MANY_IN_ONE = 16384  # columns that one program holds where rows are FEW_ROWS or more; at most 16384
FEW_ROWS = 64  # fewer leave multiprocessors idle that one program each would take: programs share them
MAX_BLOCKS = 16384  # that are chosen from, in one program at 16 warps
MAX_WIDTH = 2**21
MAX_TOPK = 8192
MAX_ROOM = 16384  # entries of a list, where a sample of 32768 allows it: more do not fit in the registers of ``collect``
SMALL = 4096  # entries of a list that a narrower search does for
CHUNK = 8192  # columns a program of ``collect`` reads: 16 a thread at 16 warps
TILE = 256  # columns, or entries of a list, that a warp writes at a time: 8 a thread
HELD = 64  # scores that a thread of ``one_program`` holds: fewer warps do fewer times what each must do
HELD_BESIDE = 32  # with positions, slots or scores beside, which take registers, too; and where two programs a multiprocessor are enough
SHORT_REGISTERS = 128  # a thread of ``one_program``, at most; two programs of up to 16 warps fit on a multiprocessor
MULTIPROCESSORS = 132  # of an H100
MAX_REGISTERS = 64  # a thread of the others: 32 warps fit on a multiprocessor


@dataclass(frozen=True)
class Plan:
    """How a long row is read: a function of shapes alone.

    Attributes:
        sample: scores looked at for the level, a power of two.
        aim: how many of the row's scores should lie above the level.
        room: entries of the list, a power of two.
        small: entries that the narrower of two searches takes.
        chunk: columns read at a time.
        warps: warps of a program.
        split: whether a row is shared by a program for each chunk.
    """

    sample: int
    aim: int
    room: int
    small: int
    chunk: int
    warps: int
    split: bool


def make_plan(num_rows: int, width: int, topk: int) -> Plan | None:
    """The plan of ``num_rows`` rows of ``width`` scores, None where a program holds a row.

    The sample holds ``hits`` of the topk best on average, give or take ``sqrt(hits)``, more where neighbours are alike. The level is set
    for a quarter as many again and five such deviations; the list has room for five deviations of what that brings, and for the sixteenth
    by which a search may end early. The smallest sample is taken that needs a list of no more than four times topk. A row that ends
    before its width has the same aim out of a denser sample.
    """
    if width <= (ONE_PROGRAM if num_rows < FEW_ROWS else MANY_IN_ONE):
        return None
    for sample in (4096, 8192, 16384, 32768):
        hits = topk * sample / width
        want = min(math.ceil(1.25 * hits + 5 * math.sqrt(hits) + 4), sample)
        room = triton.next_power_of_2(math.ceil((want + want // 16 + 5 * math.sqrt(want)) * width / sample))
        if room <= min(max(4 * topk, 4096), MAX_ROOM) or 4 * sample > width:
            break
    split = num_rows < FEW_ROWS
    warps = 16 if split or num_rows <= 264 else 8  # about 32 warps on each of an H100's 132 multiprocessors
    chunk = CHUNK if split else 1024 * warps
    return Plan(sample, want * width // sample, room, min(SMALL, room), chunk, max(warps, room // 1024), split)


def num_warps(block: int, num_rows: int, plain: bool) -> int:
    """Warps for a program that holds ``block`` scores; ``plain`` where nothing but columns is read or written beside scores."""
    held = HELD if plain and num_rows > 2 * MULTIPROCESSORS else HELD_BESIDE
    return min(max(block // (32 * held), 4), 32)


def unsupported(num_rows: int, width: int, topk: int) -> str | None:
    """Why the kernels cannot take scores ``[num_rows, width]``, in one line; None when they can."""
    if width > MAX_WIDTH:
        return f"rows hold at most {MAX_WIDTH} scores, got {width}"
    if width > ONE_PROGRAM and topk > MAX_TOPK:
        return f"topk is at most {MAX_TOPK} for rows longer than {ONE_PROGRAM}, got {topk}"
    if num_rows * triton.cdiv(max(width, 1), CHUNK) >= 2**31:
        return f"at most {2**31 - 1} chunks of {CHUNK} scores, got {num_rows} rows of {width}"
    return None


def unsupported_blocks(width: int) -> str | None:
    """Why ``select_blocks`` cannot take rows of ``width`` scores, in one line; None when it can."""
    return f"rows hold at most {MAX_BLOCKS} blocks, got {width}" if width > MAX_BLOCKS else None


def select_topk(
    scores: Tensor,
    topk: int,
    space: str = "logical",
    positions: Tensor | None = None,
    ends: Tensor | None = None,
    with_scores: bool = True,
) -> Selection:
    """``thresher.ops.select_topk`` for checked arguments; without ``with_scores`` the selection's scores are None."""
    with on_device(scores):
        indices, lengths, beside = _run(scores, topk, positions, ends, None, with_scores)
    return Selection(indices=indices, lengths=lengths, space=space, scores=beside)


def select_topk_slots(
    scores: Tensor,
    topk: int,
    page_table: Tensor,
    requests: Tensor,
    page_size: int,
    positions: Tensor | None = None,
    ends: Tensor | None = None,
    with_scores: bool = False,
) -> Selection:
    """Top-k as slots: each selected position goes through its request's page table as it is written.

    Args:
        scores, topk, positions, ends: as for ``select_topk``; a column (or its entry of ``positions``) is a position of the row's request.
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
        indices, lengths, beside = _run(scores, topk, positions, ends, paged, with_scores)
    return Selection(indices=indices, lengths=lengths, space="slot", scores=beside)


def select_topk_in_blocks(
    scores: Tensor, topk: int, blocks: Tensor, block_size: int, space: str = "logical", with_scores: bool = True
) -> Selection:
    """``thresher.ops.select_topk_in_blocks`` for checked arguments; without ``with_scores`` the selection's scores are None."""
    with on_device(scores):
        indices, lengths, beside = _run(scores, topk, blocks, None, None, with_scores, block_size)
    return Selection(indices=indices, lengths=lengths, space=space, scores=beside)


def select_blocks(scores: Tensor, num_blocks: int, query: IndexQuery, keys: IndexKeys, block_size: int) -> Tensor:
    """``thresher.ops.select_blocks`` for checked arguments, at most ``MAX_BLOCKS`` scores a row. No value is read on the host."""
    scores = unit_rows(scores)
    num, width = scores.shape
    kept = min(num_blocks, width + 1)
    blocks = torch.empty(num, kept, dtype=torch.int32, device=scores.device)
    if num == 0 or keys.num_requests == 0:
        return blocks.fill_(-1)
    block = max(triton.next_power_of_2(width), 128)
    with on_device(scores):
        blocks_kernel[(num,)](
            scores, query.positions.contiguous(), query.requests.contiguous(), keys.lengths.contiguous(), blocks,
            width, kept, max(kept - 2, 0), scores.stride(0), keys.num_requests, keys.room,
            BLOCK_SIZE=block_size, BLOCK=block, num_warps=min(max(block // 512, 4), 16),
        )  # fmt: skip
    return blocks


def _run(
    scores: Tensor,
    topk: int,
    positions: Tensor | None,
    ends: Tensor | None,
    paged: tuple[Tensor, Tensor, int] | None,
    with_scores: bool,
    span: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``span``: columns that an entry of ``positions`` stands for."""
    scores = unit_rows(scores)
    positions = None if positions is None else unit_rows(positions)
    num, width = scores.shape
    device = scores.device
    indices = torch.empty(num, topk, dtype=torch.int32, device=device)
    lengths = torch.empty(num, dtype=torch.int64, device=device)
    beside = torch.empty(num, topk, dtype=torch.float32, device=device) if with_scores else None
    if num == 0:
        return indices, lengths, beside

    page_table, requests, page_size = paged or (indices, lengths, 1)
    given = {"SPAN": 0 if positions is None else span, "HAS_ENDS": ends is not None}
    flags = given | {"SLOTS": paged is not None, "WITH_SCORES": with_scores}
    source = (scores, scores if positions is None else positions, lengths if ends is None else ends.contiguous())
    out = (page_table, requests, indices, lengths, beside if beside is not None else scores)
    strides = (scores.stride(0), 0 if positions is None else positions.stride(0))
    table = (page_table.shape[0], page_table.shape[1], page_size)

    plan = make_plan(num, width, topk)
    if plan is None:
        block = max(triton.next_power_of_2(width), 512)
        warps = num_warps(block, num, positions is None and paged is None and not with_scores)
        kernels.one_program[(num,)](
            *source, *out, width, topk, *strides, *table,
            BLOCK=block, WARPS=warps, **flags, num_warps=warps, maxnreg=min(SHORT_REGISTERS, max(1024 // warps, MAX_REGISTERS)),
        )  # fmt: skip
        return indices, lengths, beside

    found = torch.empty(num, 2, plan.room, dtype=torch.int32, device=device)
    sizes = {"CHUNK": plan.chunk, "ROOM": plan.room, "SMALL": plan.small, "TILE": min(TILE * plan.warps, plan.room)}
    if not plan.split:
        if positions is not None:  # they take registers, too
            sizes["CHUNK"] //= 2
        kernels.one_pass[(num,)](
            *source, *out, found, width, topk, plan.aim, *strides, *table,
            SAMPLE=plan.sample, **sizes, **flags, num_warps=plan.warps, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
        return indices, lengths, beside

    chunks = triton.cdiv(width, plan.chunk)
    levels = torch.empty(num, dtype=torch.float32, device=device)
    # Each begins at a multiple of 16 bytes, whatever the rows: Triton compiles a kernel anew for every other alignment.
    counters = torch.empty(2, triton.cdiv(num, 4) * 4, dtype=torch.int32, device=device)
    tables = torch.empty(3, triton.cdiv(num * chunks, 4) * 4, dtype=torch.int32, device=device)
    marks = torch.empty(2, num, chunks * plan.chunk // 32, dtype=torch.int32, device=device)
    overlap = overlapped(scores)  # ``collect`` starts while ``guess_level`` runs
    split.guess_level[(num,)](
        *source, levels, *counters, width, plan.aim, *strides,
        SAMPLE=plan.sample, ROOM=plan.room, **given, OVERLAP=overlap["OVERLAP"], num_warps=min(plan.sample // 256, 32),
    )  # fmt: skip
    split.collect[(num * chunks,)](
        *source, *out, levels, *counters, *tables, found, *marks, width, topk, chunks, *strides, *table,
        CHUNKS=max(triton.next_power_of_2(chunks), 32), **sizes, **flags, **overlap,
        num_warps=plan.warps, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return indices, lengths, beside
