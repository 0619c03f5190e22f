"""Exchanges among GPUs that read one another's memory (PyTorch's symmetric memory): a kernel each, which a CUDA graph can hold."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from thresher.distributed.collectives import check_all, check_own, pad_heads, share_heads
from thresher.errors import require
from thresher.types import PartialAttention

ROOM = 64 * 2**20
"""Bytes that a rank can pass on at once: parts of 128 queries and 256 heads."""

ALIGNED = 1024  # bytes that buffers begin at a multiple of
BLOCK, HEADS = 1024, 4  # words, heads that a program of the kernels passes on at a time


class SymmetricMemory:
    """The ranks of a process group whose GPUs can read one another's memory: those of one host, or of one NVLink domain.

    All ranks make it together. There are two buffers, used in turn: a rank writes to one again only after its peers have come to the
    exchange between, and so have read what it held. So exchanges must follow one another on the GPU, also where streams differ. No
    multicast.

    Args:
        group: the group; the default one if None.
        room: bytes that each rank can pass on at once; memory of twice as many is taken.
        timeout_s: how long a kernel waits for a peer. Then it fails, and with it all that this process does on its GPU: PyTorch raises an
            AcceleratorError ("unspecified launch failure") where the process waits for the GPU next; see ``gave_up``.

    Raises:
        ThresherError: where ``unsupported`` says why; in an exchange, more bytes than there is room for.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, room: int = ROOM, timeout_s: float = 60.0) -> None:
        from torch.distributed import _symmetric_memory as memory

        from thresher.distributed.symmetric_kernels import FLAGS

        why = unsupported(group)
        require(why is None, "symmetric memory must be there", why, "use ProcessGroup")
        group = group or dist.group.WORLD
        assert group is not None
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.room, self._turn, self._patience = -(-room // ALIGNED) * ALIGNED, 0, int(timeout_s * 1e9)
        self._begin = -(-FLAGS * self.ranks * 4 // ALIGNED) * ALIGNED
        device = torch.device("cuda", torch.cuda.current_device())
        self._held = memory.empty(self._begin + 2 * self.room, dtype=torch.uint8, device=device)
        self._held.zero_()
        handle = memory.rendezvous(self._held, group.group_name)
        self._turns = torch.zeros(FLAGS, dtype=torch.int32, device=device)
        self._addresses = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device)
        torch.cuda.synchronize()
        dist.barrier(group)  # all flags are zeros before the first of them is set

    def gather(self, x: Tensor) -> Tensor:
        out = x.new_empty(self.ranks, *x.shape)
        self._gather(x, out, x.numel() * x.element_size())
        return out

    def gather_heads(self, x: Tensor, shares: Sequence[int]) -> Tensor:
        check_own(x, shares, self)
        most = max(shares)
        padded = pad_heads(x, most)
        out = x.new_empty(x.shape[0], self.ranks, *padded.shape[1:])
        self._gather(padded, out, padded[:1].numel() * x.element_size())
        if min(shares) == most:
            return out.flatten(1, 2)
        return torch.cat([out[:, rank, :share] for rank, share in enumerate(shares)], 1)

    def _gather(self, x: Tensor, out: Tensor, row: int) -> None:
        """``row`` bytes of each rank, one after the other, then the next."""
        from thresher.distributed.symmetric_kernels import FLAGS, gather_kernel

        num = x.numel() * x.element_size()
        if not num:
            return
        word = next(kind for kind in (torch.int64, torch.int32, torch.uint8) if row % kind.itemsize == 0)
        here, there = (held.view(-1).view(torch.uint8).view(word) for held in (x.contiguous(), out))
        programs = min(-(-len(here) // BLOCK), FLAGS)
        gather_kernel[(programs,)](
            here, there, self._addresses, self._turns, self._patience, self._next(num), row // word.itemsize, len(here), self.rank,
            R=self.ranks, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip

    def merge(self, part: PartialAttention) -> PartialAttention:
        return self._merged(part, part.out.shape[1], False)

    def merge_heads(self, part: PartialAttention, shares: Sequence[int]) -> PartialAttention:
        check_all(part, shares, self)
        even = share_heads(sum(shares), self.ranks)
        require(list(shares) == even, f"symmetric memory shares {sum(shares)} heads as {even}", list(shares), "share them so")
        return self._merged(part, shares[self.rank], True)

    def _merged(self, part: PartialAttention, heads: int, split: bool) -> PartialAttention:
        from thresher.distributed.symmetric_kernels import FLAGS, merge_kernel

        num, every, dim = part.out.shape
        require(dim & (dim - 1) == 0, "values must have a power of two of dims", dim, "use ProcessGroup")
        result, lse_result = part.out.new_empty(num, heads, dim), part.lse.new_empty(num, heads)
        if num * every:
            most = max(share_heads(every, self.ranks)) if split else every
            chunks = -(-most // HEADS)
            merge_kernel[(min(num * chunks, FLAGS),)](
                part.out.contiguous(), part.lse.contiguous(), result, lse_result, self._addresses, self._turns,
                self._patience, self._next(4 * num * every * (dim + 1)), num, every, chunks, self.rank,
                DIM=dim, R=self.ranks, HEADS=HEADS, SPLIT=split, num_warps=8,
            )  # fmt: skip
        return PartialAttention(result, lse_result)

    def _next(self, num: int) -> int:
        """Where the next buffer begins, for so many bytes."""
        require(num <= self.room, f"an exchange must fit {self.room} bytes", num, "make SymmetricMemory with more room")
        self._turn ^= 1
        return self._begin + self._turn * self.room


def gave_up(error: BaseException) -> bool:
    """Whether an error is that of a kernel that waited too long for a peer."""
    return isinstance(error, torch.AcceleratorError) and "unspecified launch failure" in str(error)


def unsupported(group: dist.ProcessGroup | None = None) -> str | None:
    """Why a process group has no symmetric memory here, or None. It asks about this process and its host alone."""
    if not torch.cuda.is_available():
        return "needs GPUs"
    if dist.get_backend(group) != "nccl":
        return f"needs a process group over NCCL, not {dist.get_backend(group)}"
    return unreadable(dist.get_world_size(group))


def unreadable(ranks: int) -> str | None:
    """Why this host's GPUs cannot be so many ranks that read one another's memory, or None."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if there < max(ranks, 2):
        return f"needs {max(ranks, 2)} GPUs on one host, which has {there}"
    pairs = itertools.permutations(range(ranks), 2)
    apart = [f"{one} and {other}" for one, other in pairs if not torch.cuda.can_device_access_peer(one, other)]
    return f"GPUs {', '.join(apart)} cannot read one another's memory" if apart else None
