"""Index scores by DeepGEMM, through its Python package: the ragged form and the paged one (it has no gathered form).

It reads our keys as they lie, in pages of 64 too. Converted are: int64 ranges and lengths to int32; the page table to one row a query; and
the columns outside a query's range, which it leaves unwritten, become -inf. Not promised, so that "auto" never comes here: the bits of a
score, which differ from ours and between the two forms, and the sign of a zero.

``*_inputs`` convert, ``*_logits`` call the package and do nothing else. The paged kernel wants a schedule over the multiprocessors, made
by a kernel from the lengths: a function of a step's lengths alone, which engines make once for all layers. ``paged_inputs`` makes it, and
may be recorded in a CUDA graph when ``width`` is given; a schedule made before serves as long as the lengths stay.

Source of the interface: DeepGEMM, sgl-deep-gemm 0.1.4, on Hopper.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thresher.cache.index_keys import visible_counts
from thresher.errors import require
from thresher.ops.dispatch import on_device
from thresher.types import IndexKeys, IndexQuery

PAGE_SIZE = 64
HEADS = (32, 64)
HEAD_DIMS = (32, 64, 128)
MAX_QUERIES = 2**15  # of the paged form, whose schedule is made in shared memory


class RaggedInputs(NamedTuple):
    """``q`` e4m3 ``[Q, H, D]``, ``k`` e4m3 ``[N, D]``, ``k_scales`` fp32 ``[N]``, ``weights`` fp32 ``[Q, H]``, ranges int32 ``[Q]``."""

    q: Tensor
    k: Tensor
    k_scales: Tensor
    weights: Tensor
    starts: Tensor
    ends: Tensor


class PagedInputs(NamedTuple):
    """``q`` e4m3 ``[Q, 1, H, D]``, ``pages``, ``weights`` fp32 ``[Q, H]``, ``lengths`` int32 ``[Q, 1]``, at least 1, ``table`` int32 ``[Q,
    max_pages]``, ``schedule`` int32 ``[multiprocessors + 1, 2]``, ``width``: columns."""

    q: Tensor
    pages: Tensor
    weights: Tensor
    lengths: Tensor
    table: Tensor
    schedule: Tensor
    width: int


def load() -> Any:
    """The package. Importing it loads its host code; kernels are compiled at their first call."""
    return import_module("deep_gemm")


def unsupported(q_dtype: torch.dtype, k_dtype: torch.dtype, num_heads: int, head_dim: int, num_keys: int = 0) -> str | None:
    """Why it cannot run, or None.

    Args:
        q_dtype: of the queries.
        k_dtype: of the keys.
        num_heads: H.
        head_dim: D.
        num_keys: the number of columns scored.
    """
    if (q_dtype, k_dtype) != (torch.float8_e4m3fn, torch.float8_e4m3fn):
        return f"needs float8_e4m3fn queries and keys, not {q_dtype} and {k_dtype}"
    if num_heads not in HEADS:
        return f"needs 32 or 64 heads, not {num_heads}"
    if head_dim not in HEAD_DIMS:
        return f"needs a head_dim of 32, 64 or 128, not {head_dim}"
    return None if num_keys < 2**30 else f"needs fewer than 2**30 keys, not {num_keys}"


def index_score(q: Tensor, weights: Tensor, k: Tensor, k_scales: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """See ``thresher.ops.index_score.index_score``; rows of the result may lie apart."""
    num, num_keys = q.shape[0], k.shape[0]
    if num == 0 or num_keys == 0:
        return q.new_full((num, num_keys), -torch.inf, dtype=torch.float32)
    with on_device(q):
        logits = ragged_logits(ragged_inputs(q, weights, k, k_scales, starts, ends))
    _check_shape(logits, num, num_keys)
    column = torch.arange(num_keys, device=q.device)
    return logits.masked_fill_((column < starts[:, None]) | (column >= ends[:, None]), -torch.inf)


def paged_index_score(query: IndexQuery, keys: IndexKeys, width: int | None = None, filled: bool = True) -> Tensor:
    """See ``thresher.ops.index_score.paged_index_score``; rows of the result may lie apart.

    Args:
        query: the queries.
        keys: contiguous pages of 64 tokens.
        width: columns to return, at least every length; None reads the longest length from the device.
        filled: whether columns out of a query's sight become -inf.

    Raises:
        ThresherError: pages of another size or apart from each other, or more than 32768 queries.
    """
    if width is None:
        width = int(keys.lengths.max()) if keys.num_requests else 0
    num = query.num_queries
    _check_pages(query, keys)
    if num == 0 or width == 0:
        return query.q.new_full((num, width), -torch.inf, dtype=torch.float32)
    with on_device(query.q):
        logits = paged_logits(paged_inputs(query, keys, width))
    _check_shape(logits, num, width)
    if not filled:
        return logits
    column = torch.arange(width, device=query.q.device)
    return logits.masked_fill_(column >= visible_counts(query, keys)[:, None], -torch.inf)


def ragged_inputs(q: Tensor, weights: Tensor, k: Tensor, k_scales: Tensor, starts: Tensor, ends: Tensor) -> RaggedInputs:
    """The arguments of ``index_score`` as the package wants them. An empty range ends where it starts: a negative one would not end."""
    low = starts.clamp(0, k.shape[0])
    high = torch.maximum(ends.clamp(max=k.shape[0]), low)
    return RaggedInputs(q.contiguous(), k.contiguous(), k_scales.contiguous(), weights.contiguous(), low.int(), high.int())


def ragged_logits(inputs: RaggedInputs) -> Tensor:
    """fp32 ``[Q, N]``; what stands outside a query's range has no meaning."""
    q, k, k_scales, weights, starts, ends = inputs
    return _tensor(load().fp8_mqa_logits(q, (k, k_scales), weights, starts, ends, clean_logits=False))


def paged_inputs(query: IndexQuery, keys: IndexKeys, width: int) -> PagedInputs:
    """The arguments of ``paged_index_score`` as the package wants them, schedule included.

    Every query is a request of its own, with a row of the table and a length. A query that sees nothing is given one key, since a schedule
    of no work at all is not defined; unused entries of the table become page 0.
    """
    package = load()
    lengths = visible_counts(query, keys).clamp(1, width).int()[:, None].contiguous()
    table = keys.page_table[query.requests].clamp(min=0)
    schedule = _tensor(package.get_paged_mqa_logits_metadata(lengths, PAGE_SIZE, package.get_num_sms()))
    return PagedInputs(query.q[:, None].contiguous(), keys.pages, query.weights.contiguous(), lengths, table, schedule, width)


def paged_logits(inputs: PagedInputs) -> Tensor:
    """fp32 ``[Q, width]``; what stands past a query's length has no meaning."""
    q, pages, weights, lengths, table, schedule, width = inputs
    return _tensor(load().fp8_paged_mqa_logits(q, pages, weights, lengths, table, schedule, width, clean_logits=False))


def _check_pages(query: IndexQuery, keys: IndexKeys) -> None:
    require(keys.page_size == PAGE_SIZE, f"DeepGEMM needs pages of {PAGE_SIZE} tokens", keys.page_size, 'pass impl="triton"')
    require(keys.pages.is_contiguous(), "DeepGEMM needs contiguous pages", keys.pages.stride(), 'pass impl="triton"')
    require(
        query.num_queries <= MAX_QUERIES, f"DeepGEMM takes at most {MAX_QUERIES} paged queries", query.num_queries, "pass fewer at once"
    )


def _check_shape(logits: Tensor, num: int, width: int) -> None:
    ok = logits.shape == (num, width) and logits.dtype == torch.float32
    require(ok, f"DeepGEMM must return float32 [{num}, {width}]", f"{logits.dtype} {tuple(logits.shape)}", "install sgl-deep-gemm==0.1.4")


def _tensor(result: Any) -> Tensor:
    """The package hands back a tensor of its own kind on some versions; the memory is the same."""
    return result if isinstance(result, Tensor) else torch.utils.dlpack.from_dlpack(result)
