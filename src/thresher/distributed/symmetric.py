"""Exchanges among GPUs that read one another's memory (PyTorch's symmetric memory): a kernel each, which a CUDA graph can hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from thresher.cache.device import INTERPRET, overlapped
from thresher.distributed.collectives import check_all, check_own, pad_heads, share_heads, unpad_heads
from thresher.distributed.reach import unsupported
from thresher.distributed.symmetric_kernels import (
    MEETING,
    SLOTS,
    gather_kernel,
    merge_few_kernel,
    merge_kernel,
    receive_kernel,
)
from thresher.errors import require
from thresher.ops.score_select.triton import multiprocessors
from thresher.ops.send import Send, Sent
from thresher.ops.sparse_attend.triton import Shares
from thresher.types import PartialAttention

ROOM = 64 * 2**20
"""Bytes that a rank can pass on at once: parts of 128 queries and 256 heads, or half of that to be read later."""

ALIGNED = 1024  # bytes that buffers begin at a multiple of
BLOCK = 1024  # words that a program of a gather passes on at a time
FEW = 9 * 2**19  # bytes of a merge, at most, that is done without flags: 17 requests of 128 heads of V3.2
# Shares loaded at once -> programs that a multiprocessor has room for: they all must be at work together.
BESIDE = {32: 2, 16: 2, 8: 4, 4: 8, 2: 8, 1: 8}
REGISTERS = 65536 * 7 // 8 // 128  # of a thread, where a multiprocessor has one program of four warps; an eighth is left


class SymmetricMemory:
    """A rank whose GPU can read its peers' memory, and they its: all GPUs of one host, or of one NVLink domain.

    Exchanges must follow one another on the GPU, also where streams differ. No multicast.

    Args:
        rank: which one this is.
        held: uint8 ``[size_of(ranks, room)]``, zeros before any rank's first exchange: this rank's memory.
        addresses: of every rank's memory, as this rank's GPU knows it.
        room: bytes that each rank can pass on at once.
        timeout_s: how long a kernel waits for a peer. Then it fails, and with it all that this process does on its GPU: PyTorch raises an
            AcceleratorError ("unspecified launch failure") where the process waits for the GPU next; see ``reach.gave_up``.

    Raises:
        ThresherError: in an exchange, more bytes than there is room for.
    """

    def __init__(self, rank: int, held: Tensor, addresses: Sequence[int], room: int = ROOM, timeout_s: float = 60.0) -> None:
        self.rank, self.ranks, self.room = rank, len(addresses), room
        # Of heads that were sent: 2 until they are asked for, 1 until all ranks have met after that.
        self._patience, self._held, self._begin, self._unread = int(timeout_s * 1e9), held, _flags(self.ranks), 0
        self._later = self._begin + 2 * (room + FEW)
        self._turns = torch.zeros(SLOTS, dtype=torch.int32, device=held.device)
        self._addresses = torch.tensor(addresses, dtype=torch.int64, device=held.device)
        self._multiprocessors = multiprocessors(held.device)

    @classmethod
    def of_group(cls, group: dist.ProcessGroup | None = None, room: int = ROOM, timeout_s: float = 60.0) -> SymmetricMemory:
        """This process among those of a process group, the default one if None; all of them make it together.

        Raises:
            ThresherError: where ``unsupported`` says why.
        """
        from torch.distributed import _symmetric_memory as memory

        why = unsupported(group)
        require(why is None, "symmetric memory must be there", why, "use ProcessGroup")
        group = group or dist.group.WORLD
        assert group is not None
        device = torch.device("cuda", torch.cuda.current_device())
        held = memory.empty(size_of(dist.get_world_size(group), room), dtype=torch.uint8, device=device)
        held.zero_()
        made = cls(dist.get_rank(group), held, memory.rendezvous(held, group.group_name).buffer_ptrs, room, timeout_s)
        torch.cuda.synchronize()
        dist.barrier(group)  # all flags are zeros before the first of them is set
        return made

    def gather(self, x: Tensor) -> Tensor:
        out = x.new_empty(self.ranks, *x.shape)
        self._gather(x, out, x.numel() * x.element_size())
        return out

    def gather_heads(self, x: Tensor, shares: Sequence[int]) -> Tensor:
        check_own(x, shares, self)
        padded = pad_heads(x, max(shares))
        out = x.new_empty(x.shape[0], self.ranks, *padded.shape[1:])
        self._gather(padded, out, padded[:1].numel() * x.element_size())
        return unpad_heads(out, shares)

    def _gather(self, x: Tensor, out: Tensor, row: int) -> None:
        """``row`` bytes of each rank, one after the other, then the next."""
        num = x.numel() * x.element_size()
        if not num:
            return
        word, here = _words(x, row)
        self._meets(num)
        gather_kernel[(self._programs(-(-len(here) // BLOCK), 2),)](
            here, out.view(-1).view(torch.uint8).view(word), self._addresses, self._turns, self._patience, self._begin, self.room,
            row // word.itemsize, len(here), self.rank, R=self.ranks, BLOCK=BLOCK, num_warps=4, **overlapped(x),
        )  # fmt: skip

    def send_heads(self, x: Tensor, shares: Sequence[int]) -> Callable[[], Tensor]:
        """``gather_heads`` in two: this puts the rank's own heads on their way, in a launch that waits for nobody.

        Raises:
            ThresherError: heads that are sent again before an exchange of another kind has come, or more bytes than there is room for.
        """
        send, received = self.sending(x, shares)
        if send is not None:
            send.launch()
        return received

    def sending(self, x: Tensor, shares: Sequence[int]) -> tuple[Send | None, Callable[[], Tensor]]:
        """What a kernel is to send, None where nothing is left to send, and what ``send_heads`` returns."""
        check_own(x, shares, self)
        must = "heads that are sent must be asked for, and another exchange come, before the next are sent"
        require(self._unread == 0, must, "sent too early", "merge what is attended to with them first")
        padded = pad_heads(x, max(shares))
        row = padded[:1].numel() * x.element_size()
        if row == 0 or row % 8:
            gathered = self.gather_heads(x, shares)
            return None, lambda: gathered
        word, here = _words(padded, row)
        need = self.ranks * padded.numel() * x.element_size()
        require(need <= self.room // 2, f"heads that are sent must fit {self.room // 2} bytes", need, "make SymmetricMemory with more room")
        self._unread = 2
        send = Send(here, row // word.itemsize, self._addresses, self._later, self._turns, MEETING, self.rank, self._patience)
        came = self._held[self._later : self._later + need].view(x.dtype).view(x.shape[0], self.ranks, *padded.shape[1:])
        return send, Received(self, send.sent, came, shares)

    def merge(self, part: PartialAttention) -> PartialAttention:
        return self._merged(Shares.of(part), part.out.shape[1], False)

    def merge_heads(self, part: PartialAttention, shares: Sequence[int]) -> PartialAttention:
        check_all(part, shares, self)
        return self.merge_shares(Shares.of(part), shares)

    def merge_shares(self, part: Shares, shares: Sequence[int]) -> PartialAttention:
        """``merge_heads`` of attention whose own shares are still to be added up, in the same launch."""
        every = part.out.shape[2]
        even = share_heads(sum(shares), self.ranks)
        require(list(shares) == even, f"symmetric memory shares {sum(shares)} heads as {even}", list(shares), "share them so")
        require(every == sum(shares), f"the part must be of all {sum(shares)} heads", every, "attend with the queries of all ranks")
        return self._merged(part, shares[self.rank], True)

    def _merged(self, part: Shares, heads: int, split: bool) -> PartialAttention:
        num, _, every, dim = part.out.shape
        require(dim & (dim - 1) == 0, "values must have a power of two of dims", dim, "use ProcessGroup")
        most = max(share_heads(every, self.ranks)) if split else every
        result, lse = part.out.new_empty(num, heads, dim), part.out.new_empty(num, heads)
        at_once = max(self.room // max(4 * self.ranks * most * (dim + 1), 1), 1)  # queries
        for begin in range(0, num if every else 0, at_once):
            some = slice(begin, begin + at_once)
            self._merge_into(result[some], lse[some], Shares(*(x[some].contiguous() for x in part)), most, split)
        return PartialAttention(result, lse)

    def _merge_into(self, result: Tensor, lse: Tensor, part: Shares, most: int, split: bool) -> None:
        """``most`` of the heads, which no rank has more of, are a task for each query."""
        num, shares, every, dim = part.out.shape
        tasks, steps = num * most, part.steps()
        beside = BESIDE[steps["STEP"]]
        programs = self._programs(tasks, beside)
        given = (*part, result, lse, self._addresses, self._turns, self._patience)
        sizes = (num, every, shares, self.rank)
        options = {"DIM": dim, "R": self.ranks, "SPLIT": split, "INTERPRET": INTERPRET}
        options |= {"num_warps": 4, "maxnreg": REGISTERS // beside // 8 * 8}
        options |= steps | overlapped(result)
        self._meets(4 * self.ranks * tasks * (dim + 1))
        words = dim // 2 if split else dim
        if programs == tasks and words and 8 * self.ranks * tasks * (words + 2) <= FEW:
            merge_few_kernel[(programs,)](*given, self._begin + 2 * self.room, FEW, *sizes, **options)
        else:
            merge_kernel[(programs,)](*given, self._begin, self.room, *sizes, **options)

    def _programs(self, most: int, beside: int) -> int:
        """Programs of a kernel, so many of which a multiprocessor runs at once."""
        return min(most, beside * self._multiprocessors, MEETING)

    def _meets(self, num: int) -> None:
        """Before a meeting of so many bytes."""
        require(num <= self.room, f"an exchange must fit {self.room} bytes", num, "make SymmetricMemory with more room")
        self._unread = 0 if self._unread == 1 else self._unread


@dataclass(frozen=True)
class Received:
    """Heads of all ranks, which come to lie in this rank's memory: there until heads are sent again.

    Attributes:
        ranks: who sent them.
        sent: for a kernel that waits for them.
        came: ``[Q, R, n, ...]``, of which rank r has the first ``shares[r]``.
        shares: how many heads each rank has.
    """

    ranks: SymmetricMemory
    sent: Sent
    came: Tensor
    shares: Sequence[int]

    def __call__(self) -> Tensor:
        """Wait for them, by a launch; ``[Q, heads, ...]``."""
        sent = self.sent
        receive_kernel[(1,)](
            sent.addresses, sent.turns, sent.programs, sent.patience, sent.rank, num_warps=4, **sent.constants, **overlapped(self.came)
        )
        return self.heads()

    def heads(self) -> Tensor:
        """``[Q, heads, ...]``, where another kernel has waited."""
        self.ranks._unread = 1
        return unpad_heads(self.came, self.shares)


def size_of(ranks: int, room: int = ROOM) -> int:
    """Bytes of each rank's memory: flags, two buffers of ``room`` bytes, two small ones, and half of one for what is read later."""
    require(room % (2 * ALIGNED) == 0, f"room must be a multiple of {2 * ALIGNED} bytes", room, "round it up")
    return _flags(ranks) + 2 * (room + FEW) + room // 2


def _flags(ranks: int) -> int:
    return -(-SLOTS * ranks * 4 // ALIGNED) * ALIGNED


def _words(x: Tensor, row: int) -> tuple[torch.dtype, Tensor]:
    """A tensor, whose rows have so many bytes, in the largest words that fit them."""
    word = next(kind for kind in (torch.int64, torch.int32, torch.uint8) if row % kind.itemsize == 0)
    return word, x.contiguous().view(-1).view(torch.uint8).view(word)
