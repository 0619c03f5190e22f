# mypy: disable-error-code="no-untyped-def"
"""Exchanges in one kernel each: a rank writes what it has where its peers can read it, meets them, and goes on with what they wrote.

``addresses`` int64 ``[R]`` are those of every rank's symmetric memory: words ``[SLOTS, R]`` that say who has come, then buffers in pairs. A
program of one rank meets those of the same number on the others, so all must be at work at once. Meetings are numbered by turns, which are
counted where the next launch finds them, so that a CUDA graph can be replayed. Turns decide between two buffers: a rank writes to one again
only after its peers have come to the meeting between, and so have read what it held.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from thresher.cache.device import from_bf16, round_to_bf16, wait_for_inputs
from thresher.ops.send import PROGRAMS, await_sent, give_up
from thresher.ops.sparse_attend.triton_kernels import add_shares

MEETING = 8 * 132  # programs that meet, at most
SLOTS = MEETING + PROGRAMS  # and those that send
MEETINGS = tl.constexpr(MEETING)


@triton.jit
def flag_at(addresses, at, slot, who, R: tl.constexpr):
    """Where rank ``at`` reads how far ``who`` has come in this slot."""
    return tl.load(addresses + at).to(tl.pointer_type(tl.int32)) + slot * R + who


@triton.jit
def _turn(turns, begin, room):
    """This meeting's turn, and where its buffer begins."""
    turn = tl.load(turns + tl.program_id(0)) + 1
    return turn, begin + (turn & 1) * room


@triton.jit
def _count_turn(turns, turn):
    """For the next launch. Slots that no program has are counted too: all are at the same turn, however many programs that launch has."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    for start in range(program, MEETINGS, 128 * programs):
        slot = start + tl.arange(0, 128) * programs
        tl.store(turns + slot, turn, mask=slot < MEETINGS)


@triton.jit
def _buffer(addresses, rank, at, like):
    """A rank's buffer, ``at`` bytes behind the beginning of its symmetric memory: a multiple of 16."""
    return tl.multiple_of((tl.load(addresses + rank) + at).to(like.dtype), 16)


@triton.jit
def _arrive(addresses, turns, turn, rank, R: tl.constexpr):
    """Tell all peers that this turn's words of this program are with them."""
    program = tl.program_id(0)
    tl.debug_barrier()  # all threads have written
    for peer in tl.static_range(R):
        if peer != rank:
            tl.atomic_xchg(flag_at(addresses, peer, program, rank, R), turn, sem="release", scope="sys")
    _count_turn(turns, turn)


@triton.jit
def _await_peers(addresses, turn, rank, patience, R: tl.constexpr):
    """Wait for the programs of this number on all ranks; what they wrote before they came can then be read. Who waits longer than
    ``patience`` ns gives up, and with it the process."""
    began = globaltimer()
    for peer in tl.static_range(R):
        if peer != rank:
            word = flag_at(addresses, rank, tl.program_id(0), peer, R)
            while tl.atomic_add(word, 0, sem="acquire", scope="sys") - turn < 0:
                give_up(began, patience)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["patience", "begin", "room", "row", "num", "rank"])
def gather_kernel(
    x, out, addresses, turns, patience, begin, room, row, num, rank, R: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """Every rank's ``x [num / row, row]`` as ``out [num / row, R, row]``."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    wait_for_inputs(OVERLAP)
    turn, at = _turn(turns, begin, room)
    own = _buffer(addresses, rank, at, x)
    for start in range(program * BLOCK, num, programs * BLOCK):
        n = start + tl.arange(0, BLOCK)
        value = tl.load(x + n, mask=n < num)
        tl.store(own + n, value, mask=n < num)
        tl.store(out + (n // row * R + rank).to(tl.int64) * row + n % row, value, mask=n < num)
    _arrive(addresses, turns, turn, rank, R)
    _await_peers(addresses, turn, rank, patience, R)
    for start in range(program * BLOCK, num, programs * BLOCK):
        n = start + tl.arange(0, BLOCK)
        for peer in tl.static_range(R):
            if peer != rank:
                theirs = _buffer(addresses, peer, at, x)
                tl.store(out + (n // row * R + peer).to(tl.int64) * row + n % row, tl.load(theirs + n, mask=n < num), mask=n < num)


@triton.jit(do_not_specialize=["programs", "patience", "rank"])
def receive_kernel(
    addresses, turns, programs, patience, rank, R: tl.constexpr, FIRST: tl.constexpr, FLAGS: tl.constexpr, OVERLAP: tl.constexpr
):
    """Wait until what all ranks sent is there; see ``Sent``."""
    wait_for_inputs(OVERLAP)
    await_sent(addresses, turns, programs, patience, rank, R, FIRST, FLAGS)


@triton.jit
def of_head(parts, peaks, totals, query, head, heads, shares, DIM: tl.constexpr, SHARES: tl.constexpr, STEP: tl.constexpr):
    """A rank's output and lse of one query and head."""
    if SHARES == 1:
        row = query * heads + head
        return tl.load(parts + row * DIM + tl.arange(0, DIM)), tl.load(peaks + row)
    else:
        return add_shares(parts, peaks, totals, query, head, heads, shares, DIM, DIM, SHARES, STEP)


@triton.jit
def _pack(values, DIM: tl.constexpr, SPLIT: tl.constexpr, INTERPRET: tl.constexpr):
    """Words of 32 bits: fp32 values, or if SPLIT two in each, rounded to bf16 (``collectives.rounded``), the first below."""
    if SPLIT:
        low, high = tl.split(tl.reshape(round_to_bf16(values, INTERPRET), (DIM // 2, 2)))
        words = (high.to(tl.int32) << 16) | (low.to(tl.int32) & 0xFFFF)
    else:
        words = values.to(tl.int32, bitcast=True)
    return words


@triton.jit
def _unpack(words, DIM: tl.constexpr, SPLIT: tl.constexpr):
    """The fp32 values of what ``_pack`` makes, from words that are typed fp32."""
    if SPLIT:
        bits = words.to(tl.int32, bitcast=True)
        low, high = (bits << 16).to(tl.float32, bitcast=True), (bits & -65536).to(tl.float32, bitcast=True)
        values = tl.reshape(tl.join(low, high), (DIM,))
    else:
        values = words
    return values


@triton.jit
def _with_turn(words, tag):
    return (words.to(tl.int64) & 0xFFFFFFFF) | tag


@triton.jit
def put_values(there, at, values, SPLIT: tl.constexpr, INTERPRET: tl.constexpr):
    """Into a buffer: if SPLIT as bf16, 16 bits each."""
    if SPLIT:
        tl.store(there.to(tl.pointer_type(tl.int16)) + at, round_to_bf16(values, INTERPRET))
    else:
        tl.store(there + at, values)


@triton.jit
def get_values(here, at, SPLIT: tl.constexpr):
    """What ``put_values`` put there, as fp32."""
    return from_bf16(tl.load(here.to(tl.pointer_type(tl.int16)) + at)) if SPLIT else tl.load(here + at)


@triton.jit
def store_merged(result, lse_result, row, values, lses, DIM: tl.constexpr, R: tl.constexpr):
    """All ranks' outputs and lse of one query and head, merged as ``ops.merge`` does it: in rank order."""
    peak = float("-inf")
    for peer in tl.static_range(R):
        peak = tl.maximum(peak, lses[peer])
    empty = peak == float("-inf")
    peak = tl.where(empty, 0.0, peak)
    total = 0.0
    for peer in tl.static_range(R):
        total += tl.exp(lses[peer] - peak)
    total = tl.where(empty, 1.0, total)
    acc = tl.zeros([DIM], tl.float32)
    for peer in tl.static_range(R):
        # What an empty part holds may be NaN.
        acc += (tl.exp(lses[peer] - peak) / total) * tl.where(lses[peer] == float("-inf"), 0.0, values[peer])
    tl.store(result + row * DIM + tl.arange(0, DIM), acc)
    tl.store(lse_result + row, tl.where(empty, float("-inf"), peak + tl.log(total)))


@triton.jit(do_not_specialize=["patience", "begin", "room", "num_queries", "heads", "shares", "rank"])
def merge_kernel(
    parts, peaks, totals, result, lse_result, addresses, turns, patience, begin, room, num_queries, heads, shares, rank,
    DIM: tl.constexpr, R: tl.constexpr, SPLIT: tl.constexpr, SHARES: tl.constexpr, STEP: tl.constexpr, INTERPRET: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Every rank's attention, its ``shares`` added up (``sparse_attend.triton.Shares``) and merged as ``ops.merge`` does it: of all heads,
    or if SPLIT of those of the rank alone, as ``collectives.share_heads`` shares them out, from outputs in bf16.

    A query and head at a time. What is a peer's goes straight to its buffer; what is the rank's own, into its own, while that is under way.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    wait_for_inputs(OVERLAP)
    turn, at = _turn(turns, begin, room)
    most = (heads + R - 1) // R if SPLIT else heads
    tasks = num_queries * most
    lses_at = tasks.to(tl.int64) * (R * DIM)  # in words of 4 bytes
    if SPLIT:
        lses_at = (lses_at + 1) // 2
    d = tl.arange(0, DIM)
    for step in tl.static_range(1, R + 1):
        to = (rank + step) % R
        there = _buffer(addresses, to, at, result)
        lse_there = there + lses_at
        for task in range(program, tasks, programs):
            head = task % most + (to * heads // R if SPLIT else 0)
            if head < ((to + 1) * heads // R if SPLIT else heads):
                values, lse = of_head(parts, peaks, totals, (task // most).to(tl.int64), head, heads, shares, DIM, SHARES, STEP)
                row = rank.to(tl.int64) * tasks + task
                put_values(there, row * DIM + d, values, SPLIT, INTERPRET)
                tl.store(lse_there + row, lse)
    _arrive(addresses, turns, turn, rank, R)
    _await_peers(addresses, turn, rank, patience, R)
    here = _buffer(addresses, rank, at, result)
    some = ((rank + 1) * heads // R if SPLIT else heads) - (rank * heads // R if SPLIT else 0)
    for task in range(program, tasks, programs):
        if task % most < some:
            # All loads before the first use: they wait together.
            values, lses = tl.tuple([]), tl.tuple([])
            for peer in tl.static_range(R):
                row = peer * tasks.to(tl.int64) + task
                values = values + (get_values(here, row * DIM + d, SPLIT),)  # noqa: RUF005 (Triton knows no star in a tuple)
                lses = lses + (tl.load(here + lses_at + row),)  # noqa: RUF005
            store_merged(result, lse_result, (task // most).to(tl.int64) * some + task % most, values, lses, DIM, R)


@triton.jit
def _await_word(words, turn, began, patience):
    """Numbers that come with the turn they were sent in, as soon as all have."""
    word = tl.load(words, volatile=True)
    while tl.max(((word >> 32).to(tl.int32) != turn).to(tl.int32), 0) != 0:
        word = tl.load(words, volatile=True)
        give_up(began, patience)
    return word.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["patience", "begin", "room", "num_queries", "heads", "shares", "rank"])
def merge_few_kernel(
    parts, peaks, totals, result, lse_result, addresses, turns, patience, begin, room, num_queries, heads, shares, rank,
    DIM: tl.constexpr, R: tl.constexpr, SPLIT: tl.constexpr, SHARES: tl.constexpr, STEP: tl.constexpr, INTERPRET: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """``merge_kernel``, a program for each query and head. Every 32 bits go out with the turn beside them, in one word: twice the bytes,
    but nobody waits for what is written to have come before saying so."""
    WORDS: tl.constexpr = DIM // 2 if SPLIT else DIM
    program, programs = tl.program_id(0), tl.num_programs(0)
    wait_for_inputs(OVERLAP)
    began = globaltimer()
    turn, at = _turn(turns, begin, room)
    first = rank * heads // R if SPLIT else 0
    some = ((rank + 1) * heads // R if SPLIT else heads) - first
    query, place = (program // (programs // num_queries)).to(tl.int64), program % (programs // num_queries)
    w = tl.arange(0, WORDS)
    tag = turn.to(tl.int64) << 32
    for step in tl.static_range(1, R):
        to = (rank + step) % R
        head = place + (to * heads // R if SPLIT else 0)
        if head < ((to + 1) * heads // R if SPLIT else heads):
            values, lse = of_head(parts, peaks, totals, query, head, heads, shares, DIM, SHARES, STEP)
            there = _buffer(addresses, to, at, turns).to(tl.pointer_type(tl.int64)) + (rank * programs + program).to(tl.int64) * (WORDS + 2)
            tl.store(there + w, _with_turn(_pack(values, DIM, SPLIT, INTERPRET), tag))
            tl.store(there + WORDS, _with_turn(lse.to(tl.int32, bitcast=True), tag))
    _count_turn(turns, turn)
    if place < some:
        own_values, own_lse = of_head(parts, peaks, totals, query, first + place, heads, shares, DIM, SHARES, STEP)
        if SPLIT:
            own_values = from_bf16(round_to_bf16(own_values, INTERPRET))
        here = _buffer(addresses, rank, at, turns).to(tl.pointer_type(tl.int64))
        values, lses = tl.tuple([]), tl.tuple([])
        for peer in tl.static_range(R):
            value, lse = own_values, own_lse
            if peer != rank:
                word = here + (peer * programs + program).to(tl.int64) * (WORDS + 2)
                value = _unpack(_await_word(word + w, turn, began, patience), DIM, SPLIT)
                lse = tl.max(_await_word(word + WORDS + tl.arange(0, 1), turn, began, patience), 0)
            values = values + (value,)  # noqa: RUF005 (Triton knows no star in a tuple)
            lses = lses + (lse,)  # noqa: RUF005
        store_merged(result, lse_result, query * some + place, values, lses, DIM, R)
