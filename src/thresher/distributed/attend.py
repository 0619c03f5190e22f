"""Attention over what all ranks hold, of the heads that are this rank's own: queries go out early, outputs are merged at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from thresher.distributed.collectives import Collectives
from thresher.ops import sparse_attend_mla_fp8
from thresher.types import PartialAttention


def send_heads(ranks: Collectives, q: Tensor, shares: Sequence[int]) -> Callable[[], Tensor]:
    """Begin to gather queries, which a rank can do before it selects.

    Args:
        ranks: the ranks.
        q: ``[Q, own heads, ...]``, this rank's.
        shares: how many heads each rank has, as ``collectives.share_heads`` says.

    Returns:
        A function that gives ``[Q, heads, ...]``, all ranks'. No other exchange may stand between.
    """
    gathered = ranks.gather_heads(q, shares)
    return lambda: gathered


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
        out fp32 ``[Q, own heads, 512]`` and lse fp32 ``[Q, own heads]``, with the bits of ``ops.merge`` over the ranks' parts.
    """
    return ranks.merge_heads(sparse_attend_mla_fp8(q, cache_data, slots, scale), shares)
