"""Tokens over several ranks: how many each must keep, who keeps what, and one merged output."""

from thresher.distributed.collectives import Alone, Collectives, ProcessGroup, own_heads, share_heads
from thresher.distributed.coverage import expected_coverage, local_topk, miss_probability
from thresher.distributed.exact import ExactMerge
from thresher.distributed.idsa import IDSA
from thresher.distributed.ranks import run_on_rank
from thresher.distributed.shards import Shard, gather_union, local_attention, localise, split_keys, union
from thresher.distributed.simulate import run
from thresher.distributed.single import Replicated, Single

__all__ = [
    "IDSA",
    "Alone",
    "Collectives",
    "ExactMerge",
    "ProcessGroup",
    "Replicated",
    "Shard",
    "Single",
    "expected_coverage",
    "gather_union",
    "local_attention",
    "local_topk",
    "localise",
    "miss_probability",
    "own_heads",
    "run",
    "run_on_rank",
    "share_heads",
    "split_keys",
    "union",
]
