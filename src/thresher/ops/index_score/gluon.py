"""Index scores of many queries on Hopper: the same bits as ``triton.py``, faster where the tensor cores are the limit (prefill).

Written in Gluon, Triton's layer below its tile language, for what the tile language does not say on Hopper: warps with different
jobs, keys fetched by the copy engine, and a matrix product that runs while the one before it is summed up.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from thresher.cache.device import on_device, unit_rows
from thresher.ops.index_score.gluon_kernels import prefill_kernel
from thresher.ops.index_score.gluon_quad_kernels import prefill_quads_kernel
from thresher.ops.index_score.triton import QUADS, layout
from thresher.types import IndexKeys, IndexQuery

FP8 = torch.float8_e4m3fn
STAGES = 6  # tiles under way
QUAD_STAGES = 4
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def index_score(q: Tensor, weights: Tensor, k: Tensor, k_scales: Tensor, starts: Tensor, ends: Tensor, out: Tensor) -> Tensor:
    """``triton.index_score`` for checked arguments, at least one query and one key."""
    num_keys, dim = k.shape
    k = k if k.stride(1) == 1 and k.stride(0) % 16 == 0 and k.data_ptr() % 16 == 0 else k.contiguous()
    desc = TensorDescriptor(k, [1, num_keys, dim], [16 * -(-k.stride(0) * num_keys // 16), k.stride(0), 1], [1, 64, dim], _layout(dim))
    k_scales = k_scales.contiguous() if k_scales.data_ptr() % 16 == 0 else k_scales.clone(memory_format=torch.contiguous_format)
    tiles = TensorDescriptor(k_scales, [1, num_keys], [-(-num_keys // 4) * 4, 1], [1, 64], gl.NVMMASharedLayout(0, 32, 2))
    low, high = starts.contiguous(), ends.contiguous()
    return _run(desc, tiles, q, weights, low, high, low, low, low, out, num_keys, (1, 1, num_keys, 0), 0)


def paged_index_score(query: IndexQuery, keys: IndexKeys, width: int, out: Tensor) -> Tensor:
    """``triton.paged_index_score`` for checked arguments, at least one query and one page; pages hold a multiple of 64 tokens."""
    desc, scales, table, record = paged_keys(keys)
    positions, requests, lengths = query.positions.contiguous(), query.requests.contiguous(), keys.lengths.contiguous()
    sizes = (keys.num_requests, keys.pages.shape[0], table.shape[1] * keys.page_size, table.stride(0))
    tiles = scale_tiles(scales, keys.pages.shape[0], record // 4)
    return _run(
        desc, tiles, query.q, query.weights, positions, positions, requests, lengths, table, out, width, sizes, keys.page_size
    )


def paged_keys(keys: IndexKeys) -> tuple[TensorDescriptor, Tensor, Tensor, int]:
    """What a Hopper kernel reads paged keys by: tiles for the copy engine, all bytes as fp32 for the scales, the page table, and the bytes
    of a page."""
    pages, size, dim = keys.pages.shape[0], keys.page_size, keys.head_dim
    flat, record = keys.pages.contiguous().view(-1), size * (dim + 4)
    desc = TensorDescriptor(flat.view(FP8), [pages, size, dim], [record, dim, 1], [1, 64, dim], _layout(dim))
    return desc, flat.view(torch.float32), unit_rows(keys.page_table), record


def scale_tiles(words: Tensor, rows: int, row: int) -> TensorDescriptor:
    """Scales for the copy engine, 64 at a time: fp32 ``words``, read as ``rows`` of ``row`` words, a multiple of 4."""
    return TensorDescriptor(words, [rows, row], [row, 1], [1, 64], gl.NVMMASharedLayout(0, 32, 2))


def _run(
    desc: TensorDescriptor, s_desc: TensorDescriptor, q: Tensor, weights: Tensor, low: Tensor, high: Tensor, owners: Tensor,
    lengths: Tensor, table: Tensor, out: Tensor, width: int, sizes: tuple[int, int, int, int], page: int,
) -> Tensor:  # fmt: skip
    num, heads, dim = q.shape
    num_requests, num_pages, num_keys, table_row = sizes
    q, weights = unit_rows(q), unit_rows(weights)
    programs = (torch.cuda.get_device_properties(q.device).multi_processor_count,)
    sizes_and_strides = (num, heads, num_keys, num_requests, num_pages, width, q.stride(0), q.stride(1), weights.stride(0))
    with on_device(q):
        if heads > QUADS:
            prefill_quads_kernel[programs](
                desc, s_desc, q, weights, low, high, owners, lengths, table, out, *sizes_and_strides, table_row, out.stride(0),
                STAGES=QUAD_STAGES, D=dim, PAGE=page, **OPTIONS,
            )  # fmt: skip
        else:
            dealt = layout(heads)
            prefill_kernel[programs](
                desc, s_desc, q, weights, low, high, owners, lengths, table, out, *sizes_and_strides, table_row, out.stride(0),
                STAGES=STAGES // dealt["TILES"], D=dim, PAGE=page, **dealt, **OPTIONS,
            )  # fmt: skip
    return out


def _layout(dim: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(dim, 8, 3)
