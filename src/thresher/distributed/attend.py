"""Attention over what all ranks hold, of the heads that are this rank's own: queries go out while tokens are selected, outputs are merged
at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from thresher.cache.scratch import Scratch
from thresher.distributed.collectives import Collectives
from thresher.distributed.exact import ExactMerge
from thresher.distributed.simulate import OverRanks
from thresher.ops import sparse_attend_mla_fp8, to_slots
from thresher.ops.dispatch import AUTO, meaning, reason
from thresher.ops.quantize import store_step
from thresher.ops.sparse_attend import kernel_over_fp8
from thresher.types import IndexKeys, PartialAttention, Selection


def store_and_send(
    ranks: Collectives, attention_q: Tensor, shares: Sequence[int], keys: IndexKeys, scratch: Scratch, *step: Any, **options: Any
) -> tuple[tuple[Tensor, Tensor], Callable[[], Tensor]]:
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
        What ``store_step`` gives; and a function that gives all ranks' queries, ``[Q, heads, ...]``, which ``attend_merged`` must follow
        before others are sent.
    """
    sending = getattr(ranks, "sending", None)
    if sending is None:
        gathered = ranks.gather_heads(attention_q, shares)
        return store_step(*step, **options), lambda: gathered
    made = store_step(*step, **options)
    send, receive = sending(attention_q, shares)
    if send is not None and _selection_sends(attention_q, keys):
        scratch.errand = send
    elif send is not None:
        send.launch()
    return made, receive


def _selection_sends(q: Tensor, keys: IndexKeys) -> bool:
    """Whether the selection is a launch of step.cu, as far as that is known before."""
    if meaning() not in (AUTO, "cuda") or reason("score_select", "cuda", q.device) is not None:
        return False
    from thresher.ops.score_select.cuda import worthwhile

    return worthwhile(0, q.shape[0], keys.num_requests, keys.room, True)


def slots_and_heads(
    received: Callable[[], Tensor], indices: Tensor, page_table: Tensor, requests: Tensor, page_size: int, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """``ops.to_slots``, and what ``received`` gives, over symmetric memory by one launch; ``scratch`` as for ``store_and_send``."""
    unsent = scratch.take_errand()
    if unsent is not None:  # a selector that runs no such launch
        unsent.launch()
    sent = getattr(received, "sent", None)
    if sent is None or not indices.numel():
        return to_slots(indices, page_table, requests, page_size), received()
    from thresher.ops.to_slots import triton

    return triton.to_slots(indices, page_table, requests, page_size, sent), received.heads()  # type: ignore[attr-defined]


def counts_of(over: OverRanks, picked: Selection) -> Tensor | None:
    """How many a rank selected, where that is far below what there is room for: its part of a global top-k. For ``attend_merged``."""
    return picked.lengths if isinstance(over, ExactMerge) else None


def attend_merged(
    ranks: Collectives, q: Tensor, cache_data: Tensor, slots: Tensor, scale: float, shares: Sequence[int], counts: Tensor | None = None
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

    Returns:
        out fp32 ``[Q, own heads, 512]`` and lse fp32 ``[Q, own heads]``, with the bits of ``ops.merge`` over the ranks' parts, each
        ``collectives.rounded``: outputs travel as bf16.
    """
    merge_shares = getattr(ranks, "merge_shares", None)
    kernel = kernel_over_fp8(q, cache_data, slots, AUTO, q.device)
    if merge_shares is not None and kernel is not None and kernel.__module__.endswith("sparse_attend.triton"):
        from thresher.ops.sparse_attend.triton import attend_in_shares

        merged: PartialAttention = merge_shares(attend_in_shares(q, cache_data, slots, scale, counts), shares)
        return merged
    return ranks.merge_heads(sparse_attend_mla_fp8(q, cache_data, slots, scale), shares)
