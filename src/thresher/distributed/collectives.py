"""What ranks tell one another: four exchanges, and PyTorch's process groups (gloo, NCCL) behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from thresher.distributed.watch import Watch
from thresher.errors import ThresherError, require
from thresher.ops.merge import merge
from thresher.types import PartialAttention

if TYPE_CHECKING:
    from thresher.ops.sparse_attend.triton import Shares


class Collectives(Protocol):
    """A rank among others. All ranks call the same exchanges in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def ranks(self) -> int: ...

    def gather(self, x: Tensor) -> Tensor:
        """``[R, *x.shape]``: every rank's tensor, of one shape and dtype, in rank order."""
        ...

    def gather_heads(self, x: Tensor, shares: Sequence[int]) -> Tensor:
        """``x [Q, own heads, ...]`` of every rank, as ``[Q, heads, ...]``; rank r has the next ``shares[r]`` heads."""
        ...

    def merge(self, part: PartialAttention) -> PartialAttention:
        """All ranks' parts merged, on every rank the same bits: ``ops.merge`` over them in rank order."""
        ...

    def merge_heads(self, part: PartialAttention, shares: Sequence[int]) -> PartialAttention:
        """``merge`` of parts that are ``rounded``, of which a rank gets its own heads alone: what a layer of attention ends with."""
        ...


def share_heads(heads: int, ranks: int) -> list[int]:
    """How many heads each rank has: as many as others, or one more or fewer."""
    return [(rank + 1) * heads // ranks - rank * heads // ranks for rank in range(ranks)]


def own_heads(shares: Sequence[int], rank: int) -> slice:
    """Which heads a rank has: the ``shares[rank]`` behind those of the ranks before it."""
    return slice(sum(shares[:rank]), sum(shares[: rank + 1]))


def own_share(whole: int, ranks: Collectives) -> int:
    """How many of so many heads, or of anything else that is shared out as they are, this rank has."""
    return share_heads(whole, ranks.ranks)[ranks.rank]


def add_up(part: Tensor, ranks: Collectives) -> Tensor:
    """The sum over all ranks of ``part [T, ...]``, in fp32 and in rank order: on every rank the same bits."""
    return part if ranks.ranks == 1 else ranks.gather(part).float().sum(0).to(part.dtype)


def rounded(part: PartialAttention) -> PartialAttention:
    """A part as ranks send it for ``merge_heads``: outputs in bf16, which is what the layer's next product is given."""
    return replace(part, out=part.out.bfloat16().float())


def pad_heads(x: Tensor, heads: int) -> Tensor:
    """``x [Q, n, ...]`` with heads of zeros behind it, up to ``heads``."""
    missing = heads - x.shape[1]
    return torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1) if missing else x


def unpad_heads(x: Tensor, shares: Sequence[int]) -> Tensor:
    """``x [Q, R, n, ...]``, of which rank r has ``shares[r]`` heads, as ``[Q, heads, ...]``."""
    if min(shares) == x.shape[2]:
        return x.flatten(1, 2)
    return torch.cat([x[:, rank, :share] for rank, share in enumerate(shares)], 1)


def unheard(rank: int, ranks: int, timeout_s: float | None, why: str = "") -> str:
    """What a rank says that waited for another in vain."""
    within = "" if timeout_s is None else f" within {timeout_s:g} s"
    return f"every rank must answer{within}; got: rank {rank} of {ranks} heard from one no more{why}; see what the others printed"


class Alone:
    """One rank, which has nobody to ask."""

    rank, ranks = 0, 1

    def gather(self, x: Tensor) -> Tensor:
        return x[None]

    def gather_heads(self, x: Tensor, shares: Sequence[int]) -> Tensor:
        check_own(x, shares, self)
        return x

    def merge(self, part: PartialAttention) -> PartialAttention:
        return merge([part])

    def merge_heads(self, part: PartialAttention, shares: Sequence[int]) -> PartialAttention:
        check_all(part, shares, self)
        return merge([rounded(part)])


class ProcessGroup:
    """The ranks of a ``torch.distributed`` process group.

    Args:
        group: the group; the default one if None.
        timeout_s: what it was made with, for the message.

    Raises:
        ThresherError: in every exchange, where a rank does not answer in time or is gone. Over NCCL, where the GPU alone waits, the process
            ends with that line.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout_s: float | None = None) -> None:
        self.group, self.timeout_s = group, timeout_s
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        on_gpu = dist.get_backend(group) == "nccl"
        self._watch = Watch(timeout_s, unheard(self.rank, self.ranks, timeout_s)) if on_gpu and timeout_s is not None else None

    def gather(self, x: Tensor) -> Tensor:
        out = x.new_empty(self.ranks, *x.shape)
        if x.numel():
            # As bytes, since not every backend knows all dtypes.
            there, here = (held.view(-1).view(torch.uint8) for held in (out, x.contiguous()))
            self._exchange(lambda: _all_gather(there, here, group=self.group))
        return out

    def gather_heads(self, x: Tensor, shares: Sequence[int]) -> Tensor:
        check_own(x, shares, self)
        return unpad_heads(self.gather(pad_heads(x, max(shares))).transpose(0, 1), shares)

    def merge(self, part: PartialAttention) -> PartialAttention:
        out, lse = self.gather(part.out), self.gather(part.lse)
        return merge([PartialAttention(*both) for both in zip(out, lse, strict=True)])

    def merge_heads(self, part: PartialAttention, shares: Sequence[int]) -> PartialAttention:
        check_all(part, shares, self)
        if part.out.is_cuda:
            from thresher.ops.sparse_attend.triton import Shares

            return self.merge_shares(Shares.of(part), shares)
        return self._merge_heads(part, shares)

    def merge_shares(self, part: Shares, shares: Sequence[int]) -> PartialAttention:
        """``merge_heads`` of attention on a GPU whose own shares are still to be added up: between one launch and another."""
        from thresher.distributed import packed

        num, dim = part.out.shape[0], part.out.shape[3]
        if packed.unfit(list(shares), dim) is not None:
            return self._merge_heads(part.added(), shares)
        got = self._swap(packed.pack(part, self.ranks).view(torch.uint8), num, shares, 2 * (dim + 2))
        return packed.merge_packed(got.view(torch.int16), dim)

    def _merge_heads(self, part: PartialAttention, shares: Sequence[int]) -> PartialAttention:
        """By PyTorch's operations."""
        # As bytes, since not every backend knows bf16: a head's output and, behind it, its lse.
        out, lse = (x.contiguous().view(torch.uint8) for x in (part.out.bfloat16(), part.lse[:, :, None]))
        both = torch.cat([out, lse], 2)
        sent = torch.cat([piece.flatten() for piece in both.split(list(shares), 1)])
        outs, lses = (x.contiguous() for x in self._swap(sent, len(both), shares, both.shape[2]).split([out.shape[2], 4], 3))
        outs, lses = outs.view(torch.bfloat16).float(), lses.view(torch.float32)[..., 0]
        return merge([PartialAttention(*each) for each in zip(outs, lses, strict=True)])

    def _swap(self, sent: Tensor, num: int, shares: Sequence[int], row: int) -> Tensor:
        """uint8 ``[R, num, own heads, row]``, this rank's heads of all ranks, for every rank's heads of this one in rank order."""
        got = sent.new_empty(self.ranks, num, shares[self.rank], row)
        sizes = [got[0].numel()] * self.ranks, [num * share * row for share in shares]
        self._exchange(lambda: dist.all_to_all_single(got.view(-1), sent, *sizes, group=self.group))
        return got

    def _exchange(self, exchange: Callable[[], object]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            why = str(error).strip().splitlines()[0]
            raise ThresherError(unheard(self.rank, self.ranks, self.timeout_s, f" ({why})")) from None
        if self._watch is not None:
            self._watch.expect()


def check_ranks(wanted: int, ranks: Collectives) -> None:
    """Raises ``ThresherError`` where a placement is for another number of ranks than there are."""
    require(wanted == ranks.ranks, f"the placement must be for the {ranks.ranks} ranks there are", wanted, "start as many processes")


def stack_parts(parts: Sequence[PartialAttention]) -> PartialAttention:
    """Parts of some heads each, in rank order, as one of all heads."""
    return PartialAttention(torch.cat([part.out for part in parts], 1), torch.cat([part.lse for part in parts], 1))


def check_own(x: Tensor, shares: Sequence[int], ranks: Collectives) -> None:
    """Raises ``ThresherError`` where ``x [Q, n, ...]`` is not of the rank's own heads."""
    _check_shares(shares, ranks)
    own = shares[ranks.rank]
    require(x.shape[1] == own, f"rank {ranks.rank} must pass its own {own} heads", x.shape[1], "pass them alone")


def check_all(part: PartialAttention, shares: Sequence[int], ranks: Collectives) -> None:
    """Raises ``ThresherError`` where a part is not of all heads."""
    _check_shares(shares, ranks)
    heads = part.out.shape[1]
    require(heads == sum(shares), f"the part must be of all {sum(shares)} heads", heads, "attend with the queries of all ranks")


def _check_shares(shares: Sequence[int], ranks: Collectives) -> None:
    require(len(shares) == ranks.ranks, f"there must be a share of the heads for each of the {ranks.ranks} ranks", len(shares), "name all")


# Its name from PyTorch 2.13 on, which warns of the other.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
