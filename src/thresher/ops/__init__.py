"""What a device computes: one folder per operation.

Each folder holds the specification and the public function (``__init__.py``) and the definition on a CPU (``reference.py``).
"""

from thresher.ops.hadamard import hadamard
from thresher.ops.hisa_select import hisa_select
from thresher.ops.index_score import block_index_score, gathered_index_score, index_score, paged_index_score
from thresher.ops.keep_best import keep_best
from thresher.ops.merge import merge
from thresher.ops.pool_keys import grow_means, partial_means, pool_blocks, pool_keys
from thresher.ops.quantize import dequantize_fp8, quantize_fp8, quantize_queries, store_index_keys, store_latents, store_step
from thresher.ops.rope import apply_rope
from thresher.ops.route_heads import head_mass, route_heads, routed_query
from thresher.ops.score_select import score_select
from thresher.ops.select import select_blocks, select_topk, select_topk_in_blocks, select_topk_slots
from thresher.ops.sparse_attend import sparse_attend, sparse_attend_mla, sparse_attend_mla_fp8
from thresher.ops.to_slots import to_slots

__all__ = [
    "apply_rope",
    "block_index_score",
    "dequantize_fp8",
    "gathered_index_score",
    "grow_means",
    "hadamard",
    "head_mass",
    "hisa_select",
    "index_score",
    "keep_best",
    "merge",
    "paged_index_score",
    "partial_means",
    "pool_blocks",
    "pool_keys",
    "quantize_fp8",
    "quantize_queries",
    "route_heads",
    "routed_query",
    "score_select",
    "select_blocks",
    "select_topk",
    "select_topk_in_blocks",
    "select_topk_slots",
    "sparse_attend",
    "sparse_attend_mla",
    "sparse_attend_mla_fp8",
    "store_index_keys",
    "store_latents",
    "store_step",
    "to_slots",
]
