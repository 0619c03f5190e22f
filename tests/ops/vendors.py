"""Stand-ins for other packages: their signatures and what they insist on, their results by our references, and what they leave undone.

They check as the originals' host code checks (dtypes, shapes, contiguity), and are as careless where those are: columns outside a range are
left as garbage, results come in any order, an empty row has lse +inf.
"""

from __future__ import annotations

import sys
import types

import torch

from thresher.ops import index_score, paged_index_score, sparse_attend_mla, sparse_attend_mla_fp8
from thresher.types import IndexKeys, IndexQuery

FP8, I32, BF16 = torch.float8_e4m3fn, torch.int32, torch.bfloat16
NUM_SMS = 7


def same(tensor, dtype, shape, contiguous=True):
    assert isinstance(tensor, torch.Tensor)
    assert tensor.dtype == dtype, f"{tensor.dtype}, not {dtype}"
    assert tuple(tensor.shape) == tuple(shape), f"{tuple(tensor.shape)}, not {tuple(shape)}"
    assert tensor.is_contiguous() if contiguous else tensor.stride(-1) == 1


def in_garbage(scores, width):
    """Scores in a wider buffer of garbage, which also stands wherever they are -inf."""
    buffer = torch.full((scores.shape[0], -(-width // 256) * 256 + 256), torch.nan)
    buffer[::2] = 1e30
    buffer = buffer[:, :width]
    return torch.where(scores == -torch.inf, buffer, scores, out=buffer) if scores.numel() else buffer


class DeepGemm(types.ModuleType):
    def __init__(self):
        super().__init__("deep_gemm")
        self.schedules = []
        self.calls = 0

    def get_num_sms(self):
        return NUM_SMS

    def fp8_mqa_logits(self, q, kv, weights, ks, ke, clean_logits=False, max_seqlen_k=0):
        self.calls += 1
        k, scales = kv
        (num, heads, dim), num_keys = q.shape, k.shape[0]
        assert heads in (32, 64)
        assert dim in (32, 64, 128)
        same(q, FP8, (num, heads, dim))
        same(k, FP8, (num_keys, dim))
        same(scales, torch.float32, (num_keys,))
        same(weights, torch.float32, (num, heads), contiguous=False)
        same(ks, I32, (num,))
        same(ke, I32, (num,))
        assert ((ks >= 0) & (ks <= ke) & (ke <= num_keys)).all(), "a negative range does not end on a GPU"
        assert not clean_logits
        assert max_seqlen_k == 0
        return in_garbage(index_score(q, weights, k, scales, ks.long(), ke.long(), impl="reference"), num_keys)

    def get_paged_mqa_logits_metadata(self, context_lens, block_kv, num_sms, indices=None):
        same(context_lens, I32, (context_lens.shape[0], 1))
        assert (block_kv, num_sms, indices) == (64, NUM_SMS, None)
        self.schedules.append((torch.zeros(num_sms + 1, 2, dtype=I32), context_lens.clone()))
        return self.schedules[-1][0]

    def fp8_paged_mqa_logits(
        self, q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len, clean_logits=False, indices=None
    ):
        self.calls += 1
        num, next_n, heads, dim = q.shape
        assert next_n == 1
        assert heads in (32, 64)
        same(q, FP8, (num, 1, heads, dim))
        same(kv_cache, torch.uint8, (kv_cache.shape[0], 64, 1, dim + 4))
        same(weights, torch.float32, (num, heads))
        same(context_lens, I32, (num, 1))
        same(block_table, I32, (num, block_table.shape[1]), contiguous=False)
        same(schedule_meta, I32, (NUM_SMS + 1, 2))
        made_for = next(lengths for schedule, lengths in self.schedules if schedule is schedule_meta)
        assert torch.equal(made_for, context_lens), "a schedule of other lengths"
        assert (context_lens >= 1).all()
        assert ((block_table >= 0) & (block_table < kv_cache.shape[0])).all()
        assert isinstance(max_context_len, int)
        assert context_lens.max() <= max_context_len
        assert not clean_logits
        assert indices is None
        lengths = context_lens[:, 0].long()
        query = IndexQuery(q[:, 0], weights, lengths - 1, torch.arange(num))
        scores = paged_index_score(query, IndexKeys(kv_cache, block_table, lengths), impl="reference")
        return in_garbage(torch.nn.functional.pad(scores, (0, max_context_len - scores.shape[1]), value=-torch.inf), max_context_len)


def shuffled_top_k(scores, lengths, topk, ties_to_larger=False):
    """int32 ``[Q, topk]`` in a random order; -1 only where a row is shorter than topk: -inf is a score like any other."""
    out = torch.full((scores.shape[0], topk), -1, dtype=I32)
    for row, length in enumerate(lengths.tolist()):
        mine = scores[row, :length]
        order = (
            mine.flip(0).sort(descending=True, stable=True).indices if ties_to_larger else mine.sort(descending=True, stable=True).indices
        )
        kept = (length - 1 - order if ties_to_larger else order)[:topk]
        out[row, : len(kept)] = kept[torch.randperm(len(kept))].int()
    return out


class FlashInfer(types.ModuleType):
    def __init__(self):
        super().__init__("flashinfer")
        self.tie_breaks = []

    def top_k_ragged_transform(self, input, offsets, lengths, k, deterministic=False, tie_break=0, dsa_graph_safe=False, row_starts=None):
        num, width = input.shape
        same(input, torch.float32, (num, width))
        same(offsets, I32, (num,))
        same(lengths, I32, (num,))
        assert not offsets.any()
        assert (lengths <= width).all()
        assert k <= 2048
        self.tie_breaks.append(tie_break)
        return shuffled_top_k(input, lengths, k, ties_to_larger=tie_break != 1)


VLLM_SCHEMAS = (  # as the object file of vllm 0.33.0 spells them
    "top_k_per_row_prefill(Tensor logits, Tensor rowStarts, Tensor rowEnds, Tensor! indices, int numRows, int stride0, int stride1, "
    "int topK) -> ()",
    "top_k_per_row_decode(Tensor logits, int next_n, Tensor seq_lens, Tensor! indices, int numRows, int stride0, int stride1, "
    "int topK) -> ()",
    "persistent_topk(Tensor logits, Tensor lengths, Tensor! output, Tensor workspace, int k, int max_seq_len) -> ()",
    "cooperative_topk(Tensor logits, Tensor lengths, Tensor! output, Tensor workspace, int k, int max_seq_len) -> ()",
)


class VllmOps:
    """The four operators, registered in ``torch.ops._C`` for tensors on a CPU. ``called``: names in order; ``spoil[name](out)`` after."""

    def __init__(self):
        self.called, self.spoil = [], {}
        self.library = torch.library.Library("_C", "FRAGMENT")
        for schema in VLLM_SCHEMAS:
            self.library.define(schema)
        for name in ("persistent_topk", "cooperative_topk"):
            self.library.impl(name, lambda *a, name=name: self.whole(name, *a), "CPU")
        self.library.impl("top_k_per_row_decode", self.decode, "CPU")
        self.library.impl("top_k_per_row_prefill", self.prefill, "CPU")

    def close(self):
        self.library._destroy()

    def finish(self, name, out, logits, lengths, topk):
        self.called.append(name)
        out.copy_(shuffled_top_k(logits, lengths, topk, ties_to_larger=True))
        self.spoil.get(name, lambda out: None)(out)

    def whole(self, name, logits, lengths, out, workspace, topk, max_seq_len):
        num = logits.shape[0]
        same(logits, torch.float32, logits.shape, contiguous=False)
        same(lengths, I32, (num,))
        same(out, I32, (num, topk))
        same(workspace, torch.uint8, workspace.shape)
        assert workspace.numel() >= 2**20
        assert topk in (512, 1024, 2048)
        assert lengths.max() <= max_seq_len <= logits.shape[1]
        assert logits.data_ptr() % 16 == 0
        if name == "cooperative_topk":
            assert num <= 64
            assert logits.stride(0) % 4 == 0
        self.finish(name, out, logits, lengths, topk)

    def decode(self, logits, next_n, seq_lens, out, rows, stride0, stride1, topk):
        assert next_n == 1
        self.per_row("top_k_per_row_decode", logits, torch.zeros_like(seq_lens), seq_lens, out, rows, stride0, stride1, topk)

    def prefill(self, logits, starts, ends, out, rows, stride0, stride1, topk):
        self.per_row("top_k_per_row_prefill", logits, starts, ends, out, rows, stride0, stride1, topk)

    def per_row(self, name, logits, starts, ends, out, rows, stride0, stride1, topk):
        assert (rows, stride0, stride1) == (logits.shape[0], *logits.stride())
        for tensor in (starts, ends):
            same(tensor, I32, (rows,))
        assert not starts.any()
        same(logits, torch.float32, logits.shape, contiguous=False)
        same(out, I32, (rows, topk))
        self.finish(name, out, logits, ends, topk)


class Schedule:
    shape = None


class FlashMla(types.ModuleType):
    def __init__(self):
        super().__init__("flash_mla")
        self.schedules = 0

    def get_mla_metadata(self, *args, **kwargs):
        self.schedules += 1
        return Schedule(), None

    def flash_mla_with_kvcache(
        self,
        q,
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        tile_scheduler_metadata,
        num_splits=None,
        softmax_scale=None,
        causal=False,
        is_fp8_kvcache=False,
        indices=None,
    ):
        assert isinstance(tile_scheduler_metadata, Schedule)
        assert (block_table, cache_seqlens, head_dim_v, num_splits, causal, is_fp8_kvcache) == (None, None, 512, None, False, True)
        batch, queries, heads, dim = q.shape
        topk = indices.shape[2]
        shape = (q.shape, k_cache.shape[1], topk)
        assert tile_scheduler_metadata.shape in (None, shape)
        tile_scheduler_metadata.shape = shape
        assert (queries, dim) == (1, 576)
        assert heads in (64, 128)
        assert topk % 64 == 0
        same(q, BF16, (batch, 1, heads, 576), contiguous=False)
        same(k_cache, torch.uint8, (*k_cache.shape[:2], 1, 656), contiguous=False)
        assert k_cache.stride(1) == 656
        same(indices, I32, (batch, 1, topk), contiguous=False)
        assert ((indices >= -1) & (indices < k_cache.shape[0] * k_cache.shape[1])).all()
        part = sparse_attend_mla_fp8(q[:, 0], k_cache, indices[:, 0].contiguous(), softmax_scale, impl="reference")
        lse = part.lse.masked_fill(part.lse == -torch.inf, torch.inf)
        return part.out.bfloat16()[:, None], lse[:, None].transpose(1, 2)

    def flash_mla_sparse_fwd(self, q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None):
        num, heads, _ = q.shape
        topk = indices.shape[2]
        assert heads in (64, 128)
        assert topk % 128 == 0
        assert d_v == 512
        same(q, BF16, (num, heads, 576), contiguous=False)
        same(kv, BF16, (kv.shape[0], 1, 576), contiguous=False)
        assert kv.stride(0) % 8 == 0
        same(indices, I32, (num, 1, topk), contiguous=False)
        slots = indices[:, 0].masked_fill(indices[:, 0] >= kv.shape[0], -1)
        part = sparse_attend_mla(q, kv[:, 0], slots, sm_scale, impl="reference")
        lse = part.lse.masked_fill(part.lse == -torch.inf, torch.inf)
        return part.out.bfloat16(), part.lse, lse


def install(monkeypatch, module):
    """Put a stand-in where ``import`` finds it."""
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module
