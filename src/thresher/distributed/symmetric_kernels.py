# mypy: disable-error-code="no-untyped-def"
"""Exchanges in one kernel each: a rank writes what it has where its peers can read it, meets them, and reads theirs.

``addresses`` int64 ``[R]`` are those of every rank's symmetric memory: FLAGS * R words that say who has come, then buffers. A program of
one rank meets those of the same number on the others, which wrote what it reads; so all must be at work at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

FLAGS = 264  # programs at most: two on each multiprocessor


@triton.jit
def _flag(addresses, at, slot, who, R: tl.constexpr):
    return tl.load(addresses + at).to(tl.pointer_type(tl.int32)) + slot * R + who


@triton.jit
def _meet(addresses, turns, turn, rank, slot, patience, R: tl.constexpr):
    """Wait for the programs of this number on all ranks; what they wrote before they came can then be read.

    Each tells its peers which turn this is, the ``turn``-th of its number, and waits until they have come as far; none can be further than
    one. Turns are counted where the program finds them in the next launch, so a CUDA graph can be replayed. Who waits longer than
    ``patience`` ns gives up, and with it the process.
    """
    tl.debug_barrier()  # all threads have written
    began = globaltimer()
    for peer in tl.static_range(R):
        if peer != rank:
            tl.atomic_xchg(_flag(addresses, peer, slot, rank, R), turn, sem="release", scope="sys")
    for peer in tl.static_range(R):
        if peer != rank:
            word = _flag(addresses, rank, slot, peer, R)
            while tl.atomic_add(word, 0, sem="acquire", scope="sys") - turn < 0:
                if globaltimer() - began > patience:
                    tl.inline_asm_elementwise("trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(turns + slot, turn)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["patience", "at", "row", "num", "rank"])
def gather_kernel(x, out, addresses, turns, patience, at, row, num, rank, R: tl.constexpr, BLOCK: tl.constexpr):
    """Every rank's ``x [num / row, row]`` as ``out [num / row, R, row]``, through the buffer ``at`` bytes behind the beginning of symmetric
    memory."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    turn = tl.load(turns + program) + 1
    own = (tl.load(addresses + rank) + at).to(x.dtype)
    for start in range(program * BLOCK, num, programs * BLOCK):
        n = start + tl.arange(0, BLOCK)
        value = tl.load(x + n, mask=n < num)
        tl.store(own + n, value, mask=n < num)
        tl.store(out + (n // row * R + rank).to(tl.int64) * row + n % row, value, mask=n < num)
    _meet(addresses, turns, turn, rank, program, patience, R)
    for start in range(program * BLOCK, num, programs * BLOCK):
        n = start + tl.arange(0, BLOCK)
        for peer in tl.static_range(R):
            if peer != rank:
                theirs = (tl.load(addresses + peer) + at).to(x.dtype)
                tl.store(out + (n // row * R + peer).to(tl.int64) * row + n % row, tl.load(theirs + n, mask=n < num), mask=n < num)


@triton.jit
def _from(out, lse, addresses, at, rows, peer, rank, DIM: tl.constexpr):
    """Where a rank's part lies: its outputs, and its lse. The rank's own is not read from its buffer."""
    there = tl.load(addresses + peer) + at
    outs = tl.where(peer == rank, out.to(tl.int64), there).to(out.dtype)
    return outs, tl.where(peer == rank, lse.to(tl.int64), there + rows * (DIM * 4)).to(lse.dtype)


@triton.jit(do_not_specialize=["patience", "at", "num_queries", "heads", "chunks", "rank"])
def merge_kernel(
    out, lse, result, lse_result, addresses, turns, patience, at, num_queries, heads, chunks, rank,
    DIM: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Every rank's part, ``out [Q, heads, DIM]`` and ``lse [Q, heads]``, merged as ``ops.merge`` does it: all heads, or if SPLIT those of
    the rank alone, as ``collectives.share_heads`` shares them out. HEADS of a query at a time, ``chunks`` times."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    turn = tl.load(turns + program) + 1
    rows = num_queries.to(tl.int64) * heads
    own = (tl.load(addresses + rank) + at).to(out.dtype)
    d, h = tl.arange(0, DIM), tl.arange(0, HEADS)
    for task in range(program, num_queries * chunks, programs):
        for peer in tl.static_range(R if SPLIT else 1):
            if not SPLIT or peer != rank:
                head = task % chunks * HEADS + h + (peer * heads // R if SPLIT else 0)
                here = head < ((peer + 1) * heads // R if SPLIT else heads)
                row = task // chunks * heads.to(tl.int64) + head
                tl.store(own + rows * DIM + row, tl.load(lse + row, mask=here), mask=here)
                where = row[:, None] * DIM + d[None, :]
                tl.store(own + where, tl.load(out + where, mask=here[:, None]), mask=here[:, None])
    _meet(addresses, turns, turn, rank, program, patience, R)
    for task in range(program, num_queries * chunks, programs):
        first = rank * heads // R if SPLIT else 0
        some = ((rank + 1) * heads // R if SPLIT else heads) - first
        place = task % chunks * HEADS + h
        inside = place < some
        row = task // chunks * heads.to(tl.int64) + first + place
        peak = tl.full([HEADS], float("-inf"), tl.float32)
        for peer in tl.static_range(R):
            _outs, lses = _from(out, lse, addresses, at, rows, peer, rank, DIM)
            peak = tl.maximum(peak, tl.load(lses + row, mask=inside, other=float("-inf")))
        empty = peak == float("-inf")
        peak = tl.where(empty, 0.0, peak)
        total = tl.zeros([HEADS], tl.float32)
        for peer in tl.static_range(R):
            _outs, lses = _from(out, lse, addresses, at, rows, peer, rank, DIM)
            total += tl.exp(tl.load(lses + row, mask=inside, other=float("-inf")) - peak)
        total = tl.where(empty, 1.0, total)
        acc = tl.zeros([HEADS, DIM], tl.float32)
        for peer in tl.static_range(R):
            outs, lses = _from(out, lse, addresses, at, rows, peer, rank, DIM)
            part = tl.load(lses + row, mask=inside, other=float("-inf"))
            read = inside & (part != float("-inf"))  # what an empty part holds is not: it may be NaN
            values = tl.load(outs + row[:, None] * DIM + d[None, :], mask=read[:, None], other=0.0)
            acc += (tl.exp(part - peak) / total)[:, None] * values
        at_result = task // chunks * some.to(tl.int64) + place
        tl.store(result + at_result[:, None] * DIM + d[None, :], acc, mask=inside[:, None])
        tl.store(lse_result + at_result, tl.where(empty, float("-inf"), peak + tl.log(total)), mask=inside)
