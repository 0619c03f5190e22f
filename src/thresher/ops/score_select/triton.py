"""Score and select on Hopper without a matrix of scores.

1. ``prepare_kernel``, ``paged_index_score`` over one of every S keys, which are copied together, and ``level_kernel``: a level for each row
   that somewhat more than topk of its keys should lie above. Pairs (score, key) are compared, so a plateau does not pass whole.
2. ``collect_kernel`` scores every key and keeps what lies above the level.
3. ``settle``, in CUDA C++, selects from that. Where it does not hold the answer (the sample misled, or a row has NaN) it marks the row.
4. ``score_marked_kernel`` scores the first of the marked rows, all programs together, and ``redo_kernel`` selects from them, a program a
   row, and scores the others too.

The level is only about speed: the set is that of the two steps, bit for bit. The host reads no value, so all of it can be recorded in a
CUDA graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from thresher.cache.device import GLUON, INTERPRET, on_device, runs_gluon, unit_rows
from thresher.ops.dispatch import installed
from thresher.ops.index_score.triton import KEYS, MIN_COLUMNS, OPTIONS, QUADS, layout, padded_heads, paged_arguments, paged_index_score
from thresher.ops.score_select.marks import keep
from thresher.ops.score_select.settle import settle
from thresher.ops.score_select.triton_kernels import level_kernel, prepare_kernel
from thresher.ops.score_select.triton_redo import redo_kernel, score_marked_kernel
from thresher.types import IndexKeys, IndexQuery, Selection

FP8 = torch.float8_e4m3fn
TILE = 64  # keys; a page holds one
SAMPLE, FEW_HEADS = 4096, 16  # keys looked at for the level, at least; half as many where more heads make scores dearer
MAX_SAMPLE = 32768  # at most: what a program of ``level_kernel`` holds, 32 a thread
SAMPLES_BYTES = 64 * 2**20  # of the sample's keys of all the table's requests, at most
MIN_HITS = 32  # of the topk best, on average in the sample
MAX_TOPK = 8192
ROWS = 1024  # at a time, at most: enough for all multiprocessors
LISTS_BYTES = 224 * 2**20  # of the rows at a time: 1024 of 1M keys take up to 93 MB at topk 2048, and 160 at 4096
STAGES = 8  # tiles under way
MAX_LISTS = 512  # of a row
PAST = 128  # entries behind a row, for its last list to run on into before that is noticed
MIN_ROOM = 8192  # entries of all of a row's lists
SCRATCH = 96 * 2**20  # bytes of scores, at most, that rows done again are given, unless one row needs more
SHARED_ROWS = 16  # rows done again whose scores all programs share
REDO_TILE = 2048  # scores that a program of ``redo_kernel`` selects from at a time: 16 a thread
PREPARED = 32  # rows, or keys of the sample, that a program of ``prepare_kernel`` looks at
SAMPLED, SAMPLE_REGISTERS = 1024, 128  # scores that a warp of ``level_kernel`` searches, 32 a thread, and registers for them


@dataclass(frozen=True)
class Plan:
    """How rows are cut: a function of shapes alone.

    Attributes:
        stride: one of every stride keys is in the sample; 0 where rows are short enough to be collected whole.
        want: which largest of the sample the level is.
        slack: how many places the level may be lower, to end its search sooner.
        runs: runs that a row's turns are dealt into.
        lists: lists of a row, the same number for each run.
        room: entries of each list, a multiple of the most that a turn brings.
        row: entries that a row's lists take.
    """

    stride: int
    want: int
    slack: int
    runs: int
    lists: int
    room: int
    row: int


def sampled_columns(room_tokens: int, stride: int) -> int:
    """Columns of the sample of one request: whole pages."""
    return triton.cdiv(triton.cdiv(room_tokens, stride), TILE) * TILE


def rows_together(num_heads: int) -> int:
    """Queries that a program collects for at a time."""
    return 8 if num_heads > QUADS else layout(num_heads)["BLOCK"]


def share_out(blocks: int, most: int, programs: int) -> int:
    """Runs that blocks of queries are cut into, so that units are nearly a multiple of the multiprocessors, or at least one for each.

    All units take about as long. The fewest runs within 5 % of the best: each has lists of its own, which need their slack.
    """
    busy = [blocks * runs / (triton.cdiv(blocks * runs, programs) * programs) for runs in range(1, most + 1)]
    return next(runs for runs, share in enumerate(busy, 1) if share >= 0.95 * max(busy))


def make_plan(num_queries: int, heads: int, room_tokens: int, topk: int, programs: int) -> Plan:
    """The plan for rows of up to ``room_tokens`` keys on ``programs`` multiprocessors.

    The sample, one of every stride keys, holds ``topk / stride`` of the topk best on average. It deviates from that by the root of it at
    most, and by less where these stand together. The level is set for 5.3 such deviations more, and four places: of hits that fall like
    rain one row in ten million has so many. A list has room for what that brings it and six deviations more, its own and the level's, or
    for a heavier tail.
    """
    places = 64 if heads > QUADS else 32  # lists of a run
    runs = share_out(triton.cdiv(num_queries, rows_together(heads)), MAX_LISTS // places, programs)
    lists = places * runs
    stride = sample_stride(room_tokens, topk, heads)
    hits = topk / stride
    want = math.ceil(hits + 5.3 * math.sqrt(hits) + 4)
    slack = want // 32
    expected = (want + slack) * stride / lists
    most = expected + 6 * math.sqrt(expected + expected**2 / want)
    # The level's tail is the heavier the smaller ``want``: 4.5 of its deviations, and of a list that has that many 3.5 of its own.
    likely = expected * (1 + 4.5 / math.sqrt(want))
    most = max(most, likely + 3.5 * math.sqrt(likely))
    room = max(triton.cdiv(math.ceil(most), 8), triton.cdiv(MIN_ROOM, 8 * lists)) * 8
    row = lists * room + PAST
    if room_tokens <= lists * room:
        return Plan(0, 0, 0, runs, lists, room, row)
    return Plan(stride, want, slack, runs, lists, room, row)


def sample_stride(room_tokens: int, topk: int, heads: int) -> int:
    """Every how many keys one is in the sample: a power of two."""
    sample = SAMPLE if heads <= FEW_HEADS else SAMPLE // 2
    return 2 ** (max(1, min(room_tokens // sample, topk // MIN_HITS)).bit_length() - 1)


def rows_at_once(heads: int, room_tokens: int, topk: int, programs: int) -> int:
    """The most rows, a power of two, whose lists keep to ``LISTS_BYTES``."""
    rows = ROWS
    while rows > 64 and rows * make_plan(rows, heads, room_tokens, topk, programs).row * 8 > LISTS_BYTES:
        rows //= 2
    return rows


def unfit(query: IndexQuery, keys: IndexKeys) -> str | None:
    """What no kernel here for Hopper takes, or None."""
    if not installed("cuda.bindings"):
        return "the package cuda-bindings is not installed, which comes with PyTorch's CUDA builds"
    if query.q.dtype != FP8 or query.q.shape[2] not in (64, 128) or not 1 <= query.num_heads <= 64:
        return f"needs 1 to 64 float8_e4m3fn heads of 64 or 128, not {query.num_heads} of {query.q.shape[2]}, {query.q.dtype}"
    if keys.page_size != TILE:
        return f"needs pages of {TILE} keys, not {keys.page_size}"
    return None if len(keys.pages) and keys.num_requests else "needs a page and a request"


def unsupported(query: IndexQuery, keys: IndexKeys, topk: int) -> str | None:
    """Why these kernels cannot run, or None."""
    if INTERPRET:
        return "cannot be interpreted"
    if not runs_gluon(query.q):
        return f"needs compute capability 9.0, and Triton {GLUON}x"
    misfit = unfit(query, keys)
    if misfit:
        return misfit
    if topk > MAX_TOPK:
        return f"topk is at most {MAX_TOPK}, not {topk}"
    room_tokens = keys.room
    if room_tokens <= MIN_ROOM:  # collected whole
        return None
    columns = sampled_columns(room_tokens, sample_stride(room_tokens, topk, query.num_heads))
    if columns > MAX_SAMPLE:
        return f"needs a larger topk than {topk} for a page table with room for {room_tokens} keys"
    if columns * keys.num_requests * (keys.head_dim + 4) > SAMPLES_BYTES:
        return f"needs fewer requests than {keys.num_requests} for a page table with room for {room_tokens} keys"
    return None


def worthwhile(num_heads: int, num_queries: int, num_requests: int, room_tokens: int, scored: bool) -> bool:
    """Whether these kernels are taken before the two steps (docs/lab-log.md). When last compared, some of their parts a tenth slower than
    now, 1024 queries over 128k keys took 1.03 of the two steps' time at 64 heads, 0.99 at 32, half at 16 and at 8, and a fifth of the
    memory; over 32k keys they took longer at 64. Where that begins is a guess."""
    return scored and num_heads <= 64 and num_queries >= 64 and room_tokens > (16384 if num_heads <= 16 else 65536)


def score_select(query: IndexQuery, keys: IndexKeys, topk: int, with_scores: bool = True, scratch: object = None) -> Selection:
    """The public function of this name, for arguments that ``unsupported`` lets pass. No value is read on the host, no scratch needed."""
    parts = []
    step = rows_at_once(query.num_heads, keys.room, topk, multiprocessors(query.q.device))
    for start in range(0, max(query.num_queries, 1), step):
        rows = query.rows(slice(start, start + step))
        selection, redo = first_try(rows, keys, topk, with_scores)
        do_again(rows, keys, redo, selection)
        keep(redo)
        parts.append(selection)
    if len(parts) == 1:
        return parts[0]
    beside = [part.scores for part in parts if part.scores is not None]
    indices, lengths = torch.cat([part.indices for part in parts]), torch.cat([part.lengths for part in parts])
    return Selection(indices, lengths, scores=torch.cat(beside) if beside else None)


def do_again(query: IndexQuery, keys: IndexKeys, redo: Tensor, selection: Selection) -> None:
    """Score and select the rows that ``redo`` (int32 ``[Q]``) marks, into the selection. Keys may have pages of any size."""
    num, topk = selection.indices.shape
    if not num:
        return
    room_tokens = keys.room
    programs = scratch_rows(multiprocessors(query.q.device), room_tokens)
    scratch = torch.empty(programs, room_tokens, device=query.q.device)
    tensors, sizes, strides = paged_arguments(query, keys)
    beside, slots = selection.scores, min(SHARED_ROWS, programs)
    heads = padded_heads(query.num_heads)
    constants = {
        "PAGE": keys.page_size, "HEADS": heads, "D": keys.head_dim, "BN": KEYS, "BQ": max(1, MIN_COLUMNS // heads),
        "INTERPRET": INTERPRET, **OPTIONS,
    }  # fmt: skip
    with on_device(query.q):
        score_marked_kernel[(multiprocessors(query.q.device),)](
            *tensors, redo, scratch, num, *sizes, room_tokens, slots, *strides, **constants
        )
        redo_kernel[(programs,)](
            *tensors, redo, scratch, selection.indices, selection.lengths, scratch if beside is None else beside,
            num, *sizes, room_tokens, topk, slots, *strides, TILE=REDO_TILE, WITH_SCORES=beside is not None, **constants,
        )  # fmt: skip


def scratch_rows(programs: int, room_tokens: int) -> int:
    """Rows of scores that ``redo_kernel`` holds at once, a program each."""
    return max(1, min(programs, SCRATCH // (4 * max(room_tokens, 1))))


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; an H100's or H200's for tensors that are on none, in tests."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def first_try(query: IndexQuery, keys: IndexKeys, topk: int, with_scores: bool = True) -> tuple[Selection, Tensor]:
    """The selection, and int32 ``[Q]``: 1 for the rows that must be done again, whose selection is empty."""
    num, device = query.num_queries, query.q.device
    room_tokens = keys.room
    programs = multiprocessors(device)
    plan = make_plan(max(num, 1), query.num_heads, room_tokens, topk, programs)
    ends = torch.empty(num, dtype=torch.int64, device=device)
    levels = torch.empty(num, device=device)
    level_keys = torch.empty(num, dtype=torch.int32, device=device)
    found = torch.empty(num, plan.row, dtype=torch.int64, device=device)
    counts = torch.empty(num, plan.lists, dtype=torch.int32, device=device)
    if num:
        find_levels(query, keys, plan, ends, levels, level_keys)
        with on_device(query.q):
            collect(query, keys, levels, level_keys, found, counts, plan, programs)
    return settle(found, counts, ends, plan, topk, room_tokens, with_scores)


def find_levels(query: IndexQuery, keys: IndexKeys, plan: Plan, ends: Tensor, levels: Tensor, level_keys: Tensor) -> None:
    """Write each row's end and level, which takes the scores of the sample unless rows are short."""
    num, requests, stride, dim = query.num_queries, query.requests.contiguous(), plan.stride, keys.head_dim
    columns = sampled_columns(keys.room, stride) if stride else 0
    pages = torch.empty(keys.num_requests * columns // TILE, TILE, 1, dim + 4, dtype=torch.uint8, device=query.q.device)
    table = torch.empty(keys.num_requests, columns // TILE, dtype=torch.int32, device=query.q.device)
    last_seen = torch.empty(num, dtype=torch.int64, device=query.q.device) if stride else ends
    words = [held.contiguous().view(-1).view(kind) for held in (keys.pages, pages) for kind in (torch.int32, torch.float32)]
    with on_device(query.q):
        prepare_kernel[(triton.cdiv(max(num, keys.num_requests * columns), PREPARED),)](
            query.positions.contiguous(), requests, keys.lengths.contiguous(), *words[:2], keys.page_table, ends, levels, level_keys,
            last_seen, *words[2:], table, num, keys.num_requests, keys.room, len(keys.pages), stride, columns, TILE * (dim + 4) // 4,
            *keys.page_table.stride(), PAGE=TILE, WORDS=dim // 4, BLOCK=PREPARED, SAMPLED=stride > 0,
        )  # fmt: skip
    if not stride:
        return
    sample = paged_index_score(IndexQuery(query.q, query.weights, last_seen, requests), IndexKeys(pages, table, keys.lengths), columns)
    block = triton.next_power_of_2(columns)
    warps = min(max(block // SAMPLED, 4), 32)
    with on_device(query.q):
        level_kernel[(num,)](
            sample, ends, levels, level_keys, columns, stride, plan.want, plan.slack, plan.lists * plan.room, sample.stride(0),
            BLOCK=block, WARPS=warps, num_warps=warps, maxnreg=min(SAMPLE_REGISTERS, 2048 // warps),
        )  # fmt: skip


def collect(
    query: IndexQuery, keys: IndexKeys, levels: Tensor, level_keys: Tensor, found: Tensor, counts: Tensor, plan: Plan, programs: int
) -> None:
    """Launch the kernel that collects so many heads."""
    from thresher.ops.index_score.gluon import QUAD_STAGES, paged_keys, scale_tiles
    from thresher.ops.score_select.gluon_kernels import collect_kernel
    from thresher.ops.score_select.gluon_quads import collect_quads_kernel

    desc, scales, table, record = paged_keys(keys)
    q, weights = unit_rows(query.q), unit_rows(query.weights)
    rows = (query.requests.contiguous(), query.positions.contiguous(), keys.lengths.contiguous(), table, levels, level_keys, found, counts)
    sizes = (query.num_queries, query.num_heads, table.shape[1] * keys.page_size, keys.num_requests, keys.pages.shape[0])
    strides = (q.stride(0), q.stride(1), weights.stride(0))
    tiles = scale_tiles(scales, len(keys.pages), record // 4)
    if query.num_heads > QUADS:
        collect_quads_kernel[(programs,)](
            desc, tiles, q, weights, *rows, *sizes, plan.runs, found.stride(0), *strides, table.stride(0),
            STAGES=QUAD_STAGES, D=keys.head_dim, PAGE=keys.page_size, ROOM=plan.room, **OPTIONS,
        )  # fmt: skip
        return
    constants = layout(query.num_heads)
    collect_kernel[(programs,)](
        desc, tiles, q, weights, *rows, *sizes, plan.runs, found.stride(0), *strides, table.stride(0),
        STAGES=STAGES // constants["TILES"], D=keys.head_dim, PAGE=keys.page_size, ROOM=plan.room, **constants, **OPTIONS,
    )  # fmt: skip
