"""Attention over what all ranks hold, of the heads that are this rank's own: queries go out early, outputs are merged at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from thresher.distributed.collectives import Collectives
from thresher.ops import sparse_attend_mla_fp8, to_slots
from thresher.ops.dispatch import AUTO
from thresher.ops.quantize import store_step
from thresher.ops.sparse_attend import kernel_over_fp8
from thresher.types import PartialAttention


def store_and_send(
    ranks: Collectives, attention_q: Tensor, shares: Sequence[int], *step: Any, **options: Any
) -> tuple[tuple[Tensor, Tensor], Callable[[], Tensor]]:
    """Store a step's tokens and put the attention's queries on their way, over symmetric memory by one launch.

    Args:
        ranks: the ranks.
        attention_q: ``[Q, own heads, ...]``, this rank's.
        shares: how many heads each rank has, as ``collectives.share_heads`` says.
        step, options: of ``ops.quantize.store_step``.

    Returns:
        What ``store_step`` gives; and a function that gives all ranks' queries, ``[Q, heads, ...]``, which ``attend_merged`` must follow
        before others are sent.
    """
    sending = getattr(ranks, "sending", None)
    if sending is None:
        gathered = ranks.gather_heads(attention_q, shares)
        return store_step(*step, **options), lambda: gathered
    send, receive = sending(attention_q, shares)
    from thresher.ops.quantize.triton_step import store_step as launch

    return launch(*step, **options, send=send), receive


def slots_and_heads(
    received: Callable[[], Tensor], indices: Tensor, page_table: Tensor, requests: Tensor, page_size: int
) -> tuple[Tensor, Tensor]:
    """``ops.to_slots``, and what ``received`` gives, over symmetric memory by one launch."""
    sent = getattr(received, "sent", None)
    if sent is None or not indices.numel():
        return to_slots(indices, page_table, requests, page_size), received()
    from thresher.ops.to_slots import triton

    return triton.to_slots(indices, page_table, requests, page_size, sent), received.heads()  # type: ignore[attr-defined]


def attend_merged(
    ranks: Collectives, q: Tensor, cache_data: Tensor, slots: Tensor, scale: float, shares: Sequence[int]
) -> PartialAttention:
    """``sparse_attend_mla_fp8`` over every rank's slots of its own cache, merged; a rank gets its own heads.

    Args:
        ranks: the ranks.
        q: bf16 ``[Q, heads, 576]``, all ranks' queries.
        cache_data: uint8 ``[P, page_size, 1, 656]``, this rank's.
        slots: int32 ``[Q, K]`` of this cache, -1 for none.
        scale: softmax scale.
        shares: how many heads each rank has, as ``collectives.share_heads`` says.

    Returns:
        out fp32 ``[Q, own heads, 512]`` and lse fp32 ``[Q, own heads]``, with the bits of ``ops.merge`` over the ranks' parts, each
        ``collectives.rounded``: outputs travel as bf16.
    """
    merge_shares = getattr(ranks, "merge_shares", None)
    kernel = kernel_over_fp8(q, cache_data, slots, AUTO, q.device)
    if merge_shares is not None and kernel is not None and kernel.__module__.endswith("sparse_attend.triton"):
        from thresher.ops.sparse_attend.triton import attend_in_shares

        merged: PartialAttention = merge_shares(attend_in_shares(q, cache_data, slots, scale), shares)
        return merged
    return ranks.merge_heads(sparse_attend_mla_fp8(q, cache_data, slots, scale), shares)
