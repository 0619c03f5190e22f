"""Tokens over several ranks: how many each must keep, who keeps what, and one merged output."""

from thresher.distributed.coverage import expected_coverage, local_topk, miss_probability
from thresher.distributed.exact import ExactMerge
from thresher.distributed.idsa import IDSA
from thresher.distributed.shards import Shard, local_attention, localise, split_keys, union
from thresher.distributed.simulate import run
from thresher.distributed.single import Single

__all__ = [
    "IDSA",
    "ExactMerge",
    "Shard",
    "Single",
    "expected_coverage",
    "local_attention",
    "local_topk",
    "localise",
    "miss_probability",
    "run",
    "split_keys",
    "union",
]
