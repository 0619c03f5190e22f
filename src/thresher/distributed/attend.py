"""Attention over what all ranks hold, of the heads that are this rank's own: queries go out while tokens are selected, outputs are merged
at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from thresher.cache.scratch import Scratch
from thresher.distributed.collectives import Collectives
from thresher.distributed.exact import ExactMerge
from thresher.distributed.simulate import OverRanks
from thresher.ops import sparse_attend_mla_fp8
from thresher.ops.dispatch import AUTO, meaning, reason
from thresher.ops.quantize import store_step
from thresher.ops.send import Send
from thresher.ops.sparse_attend import kernel_over_fp8
from thresher.ops.to_slots import slots_of
from thresher.types import IndexKeys, PartialAttention, Selection


@dataclass(frozen=True)
class Coming:
    """All ranks' queries, on their way.

    Attributes:
        receive: waits for them and gives them, ``[Q, heads, ...]``; over symmetric memory a ``symmetric.Received``.
        scratch: None, or the selection's, which has been left an errand: to send this rank's and to wait for the others'.
    """

    receive: Callable[[], Tensor]
    scratch: Scratch | None = None

    @classmethod
    def there(cls, q: Tensor) -> Coming:
        """Those that have come."""
        return cls(lambda: q)

    def come(self) -> bool:
        """Whether the selection has waited for them. Where it did not take its errand, this rank's are sent now."""
        if self.scratch is None:
            return False
        unsent = self.scratch.take_errand()
        if unsent is not None:
            unsent.launch()
        return unsent is None


def store_and_send(
    ranks: Collectives, attention_q: Tensor, shares: Sequence[int], keys: IndexKeys, scratch: Scratch, *step: Any, **options: Any
) -> tuple[tuple[Tensor, Tensor], Coming]:
    """Store a step's tokens and put the attention's queries on their way, which nobody waits for before tokens are selected: over symmetric
    memory by the launch that selects, which has a warp to spare, or where that cannot by one of their own.

    Args:
        ranks: the ranks.
        attention_q: ``[Q, own heads, ...]``, this rank's.
        shares: how many heads each rank has, as ``collectives.share_heads`` says.
        keys: that are selected from.
        scratch: of the selection.
        step, options: of ``ops.quantize.store_step``.

    Returns:
        What ``store_step`` gives; and all ranks' queries, for ``slots_and_heads``, which ``attend_merged`` must follow before others are
        sent.
    """
    sending = getattr(ranks, "sending", None)
    if sending is None:
        gathered = ranks.gather_heads(attention_q, shares)
        return store_step(*step, **options), Coming.there(gathered)
    made = store_step(*step, **options)
    send, receive = sending(attention_q, shares)
    if send is not None and _selection_sends(send, attention_q, keys):
        scratch.errand = send
        return made, Coming(receive, scratch)
    if send is not None:
        send.launch()
    return made, Coming(receive)


def _selection_sends(send: Send, q: Tensor, keys: IndexKeys) -> bool:
    """Whether the selection is a launch of step.cu that can send them, as far as that is known before."""
    if meaning() not in (AUTO, "cuda") or reason("score_select", "cuda", q.device) is not None:
        return False
    from thresher.ops.score_select import cuda
    from thresher.ops.score_select.triton import multiprocessors

    return cuda.sends(send, multiprocessors(q.device)) and cuda.worthwhile(0, q.shape[0], keys.num_requests, keys.room, True)


def slots_and_heads(
    coming: Coming, picked: Selection, page_table: Tensor, requests: Tensor, page_size: int
) -> tuple[Tensor, Tensor]:
    """``slots_of``, and all ranks' queries. Over symmetric memory the selection has found both, or one launch does."""
    sent = getattr(coming.receive, "sent", None)
    if coming.come():
        return slots_of(picked, page_table, requests, page_size), coming.receive.heads()  # type: ignore[attr-defined]
    if sent is None or picked.slots is not None or not picked.indices.numel():
        return slots_of(picked, page_table, requests, page_size), coming.receive()
    from thresher.ops.to_slots import triton

    return triton.to_slots(picked.indices, page_table, requests, page_size, sent), coming.receive.heads()  # type: ignore[attr-defined]


def counts_of(over: OverRanks, picked: Selection) -> Tensor | None:
    """How many a rank selected, where that is far below what there is room for: its part of a global top-k. For ``attend_merged``."""
    return picked.lengths if isinstance(over, ExactMerge) else None


def attend_merged(
    ranks: Collectives,
    q: Tensor,
    cache_data: Tensor,
    slots: Tensor,
    scale: float,
    shares: Sequence[int],
    counts: Tensor | None = None,
    early: bool = True,
) -> PartialAttention:
    """``sparse_attend_mla_fp8`` over every rank's slots of its own cache, merged; a rank gets its own heads.

    Args:
        ranks: the ranks.
        q: bf16 ``[Q, heads, 576]``, all ranks' queries.
        cache_data: uint8 ``[P, page_size, 1, 656]``, this rank's.
        slots: int32 ``[Q, K]`` of this cache, -1 for none.
        scale: softmax scale.
        shares: how many heads each rank has, as ``collectives.share_heads`` says.
        counts: integers ``[Q]``, of each row how many columns hold all of its slots; None where it is most of them.
        early: as for ``sparse_attend_mla_fp8``.

    Returns:
        out fp32 ``[Q, own heads, 512]`` and lse fp32 ``[Q, own heads]``, with the bits of ``ops.merge`` over the ranks' parts, each
        ``collectives.rounded``: outputs travel as bf16.
    """
    merge_shares = getattr(ranks, "merge_shares", None)
    kernel = kernel_over_fp8(q, cache_data, slots, AUTO, q.device)
    if merge_shares is not None and kernel is not None and kernel.__module__.endswith("sparse_attend.triton"):
        from thresher.ops.sparse_attend.triton import attend_in_shares

        merged: PartialAttention = merge_shares(attend_in_shares(q, cache_data, slots, scale, counts, early), shares)
        return merged
    return ranks.merge_heads(sparse_attend_mla_fp8(q, cache_data, slots, scale, early=early), shares)
