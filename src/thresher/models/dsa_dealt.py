"""How the layers of a DSA model attend where the tokens are dealt out over ranks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from thresher.cache.state import LayerState
from thresher.distributed.attend import Coming, attend_merged, counts_of, slots_and_heads, store_and_send
from thresher.distributed.collectives import Collectives, share_heads
from thresher.distributed.shards import Shard
from thresher.distributed.simulate import OverRanks
from thresher.models.dsa_cache import Fp8Cache
from thresher.models.dsa_config import DsaConfig
from thresher.models.dsa_layers import Attend, DsaInput
from thresher.types import IndexQuery


def attend_dealt(
    config: DsaConfig,
    ranks: Collectives,
    placed: Sequence[OverRanks],
    caches: Sequence[Fp8Cache],
    states: Sequence[LayerState],
    positions: Tensor,
    slots: Tensor,
    requests: Tensor,
) -> Attend:
    """Every rank selects of the tokens it holds and attends to them with all heads; it gets the outputs of its own.

    The heads' queries are on their way while tokens are selected. Selectors get no attention inputs.

    Args:
        config: the model's.
        ranks: the ranks.
        placed: an ``IDSA`` or ``ExactMerge`` a layer.
        caches, states: a layer's, of this rank.
        positions: int64 ``[T]``, where each token stands in its request.
        slots: int64 ``[T]``, in this rank's caches; -1 for tokens of other ranks.
        requests: int64 ``[T]``.
    """
    local = placed[0].placement.local_end(positions, ranks.rank)
    shares = share_heads(config.num_attention_heads, ranks.ranks)
    asked: dict[int, IndexQuery] = {}

    def attend(given: DsaInput) -> Tensor:
        layer, cache, state = given.layer, caches[given.layer], states[given.layer]
        own, source = given.q.bfloat16(), config.index_layers[given.layer]
        keys = caches[source].view()
        if given.index is None:
            cache.store(slots, given)
            coming = Coming.there(ranks.gather_heads(own, shares))
        else:
            made, coming = store_and_send(ranks, own, shares, keys, state.scratch, *cache.step(slots, given))
            asked[layer] = IndexQuery(*made, local, requests)
        picked = placed[layer].own_set_of(asked[source], Shard(keys, state), ranks)
        state.selections[layer] = picked
        table = cache.table
        there, q = slots_and_heads(coming, picked, table.table, requests, table.page_size)
        counts, early = counts_of(placed[layer], picked), picked.slots is None
        return attend_merged(ranks, q, cache.latents.data, there, config.softmax_scale, shares, counts, early).out

    return attend
