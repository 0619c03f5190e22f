# mypy: disable-error-code="no-untyped-def"
"""Words that a launch sends to every rank, by itself or beside its other work; who needs them waits in a later kernel.

Ranks' symmetric memory begins with flags, int32 ``[., R]``: word r of a flag is the turn in which rank r came there last. A program writes
its words where its peers read them, then the turn into its flag at each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

from thresher.cache.device import overlapped, wait_for_inputs

PROGRAMS = 132  # that send, at most: one for each multiprocessor of an H200
FEW, MANY = 256, 1024  # words that a program sends at a time: few while there are programs for all


@dataclass(frozen=True)
class Send:
    """What to send, and where it goes: ``[tokens, R, row]`` in the memory of every rank, its own too.

    Attributes:
        words: int64, or another integer type, ``[tokens * row]``, contiguous: this rank's.
        row: words of one token.
        addresses: int64 ``[R]``, R at least 2: where the symmetric memory of every rank begins.
        at: bytes from there to the buffer that is written.
        turns: int32, of every flag the turn it was at last; counted on.
        first: the first of the ``programs`` flags that are used.
        rank: this one.
        patience: nanoseconds, after which a kernel that waits for what others send gives up.
    """

    words: Tensor
    row: int
    addresses: Tensor
    at: int
    turns: Tensor
    first: int
    rank: int
    patience: int

    @property
    def block(self) -> int:
        """Words that a program sends at a time."""
        return FEW if len(self.words) <= FEW * PROGRAMS else MANY

    @property
    def programs(self) -> int:
        """How many send, each with a flag."""
        return min(triton.cdiv(len(self.words), self.block), PROGRAMS)

    @property
    def sent(self) -> Sent:
        """What all ranks send in the same turn."""
        return Sent(self.addresses, self.turns, self.first, self.rank, self.programs, self.patience)

    def launch(self) -> None:
        """Send them, by a launch of its own."""
        send_kernel[(self.programs,)](
            self.words, self.addresses, self.turns, self.at, self.row, len(self.words), self.rank,
            R=len(self.addresses), FIRST=self.first, BLOCK=self.block, num_warps=4, **overlapped(self.words),
        )  # fmt: skip


@dataclass(frozen=True)
class Sent:
    """What all ranks have sent, for a kernel that waits for it.

    Attributes:
        addresses, turns, first, rank, patience: as in ``Send``.
        programs: of every rank's ``Send``.
    """

    addresses: Tensor
    turns: Tensor
    first: int
    rank: int
    programs: int
    patience: int

    @property
    def constants(self) -> dict[str, int]:
        """Of a kernel that calls ``await_sent``."""
        ranks = len(self.addresses)
        return {"R": ranks, "FIRST": self.first, "FLAGS": triton.next_power_of_2(self.programs * ranks)}


@triton.jit(do_not_specialize=["at", "row", "num_words", "rank"], do_not_specialize_on_alignment=["words_ptr"])
def send_kernel(
    words_ptr, addresses, turns, at, row, num_words, rank, R: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """See ``Send``."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    wait_for_inputs(OVERLAP)
    turn = tl.load(turns + FIRST + program) + 1
    # From the next rank on, so that not all write to one at once; the last is the rank itself.
    there = tl.tuple([])
    for step in tl.static_range(R):
        there = there + (tl.load(addresses + (rank + 1 + step) % R),)  # noqa: RUF005 (Triton knows no star in a tuple)
    for start in range(program * BLOCK, num_words, programs * BLOCK):
        words = tl.tuple([])  # all before the first is stored, which would hold the others back
        for part in tl.static_range(4):
            n = start + part * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
            words = words + (tl.load(words_ptr + n, mask=n < num_words),)  # noqa: RUF005
        for part in tl.static_range(4):
            n = start + part * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
            place = (n // row * R + rank).to(tl.int64) * row + n % row
            for step in tl.static_range(R):
                tl.store((there[step] + at).to(words_ptr.dtype) + place, words[part], mask=n < num_words)
    tl.debug_barrier()  # all threads have written
    for step in tl.static_range(R - 1):
        flag = there[step].to(tl.pointer_type(tl.int32)) + (FIRST + program) * R + rank
        tl.atomic_xchg(flag, turn, sem="release", scope="sys")
    tl.store(turns + FIRST + program, turn)


@triton.jit
def give_up(began, patience):
    """End the process's work on its GPU, ``patience`` ns after it ``began`` to wait."""
    if globaltimer() - began > patience:
        tl.inline_asm_elementwise("trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def await_sent(addresses, turns, programs, patience, rank, R: tl.constexpr, FIRST: tl.constexpr, FLAGS: tl.constexpr):
    """Wait until all of this turn's words are there, of every rank; see ``Sent``. After it a kernel's end, or a barrier, comes before they
    are read."""
    n = tl.arange(0, FLAGS)
    there = (n < programs * R) & (n % R != rank)
    slot = FIRST + n // R
    turn = tl.load(turns + slot, mask=there, other=0)
    began = globaltimer()
    words = tl.load(addresses + rank).to(tl.pointer_type(tl.int32)) + slot * R + n % R
    left = 1
    while left > 0:
        come = tl.atomic_add(words, tl.zeros([FLAGS], tl.int32), mask=there, sem="acquire", scope="sys")
        left = tl.max(tl.where(there, turn - come, 0), 0)
        give_up(began, patience)
