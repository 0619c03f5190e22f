"""The log-sum-exp merge on a GPU, one pass over the parts in their order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from thresher.cache.device import on_device
from thresher.types import PartialAttention

ROWS = 4
BLOCK = 128


@triton.jit
def _merge_kernel(
    out_ptr, lse_ptr, result_ptr, lse_result_ptr, parts, rows, dim, out_stride, lse_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """A few (query, head) rows by a block of dims. The lse are read again in each pass, from cache."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    lse_ptr += row
    out_ptr += row[:, None] * dim + d[None, :]
    here = inside[:, None] & (d < dim)[None, :]

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    at = lse_ptr
    for _ in range(parts):
        peak = tl.maximum(peak, tl.load(at, mask=inside, other=float("-inf")))
        at += lse_stride
    empty = peak == float("-inf")
    peak = tl.where(empty, 0.0, peak)
    total = tl.zeros([ROWS], tl.float32)
    at = lse_ptr
    for _ in range(parts):
        total += tl.exp(tl.load(at, mask=inside, other=float("-inf")) - peak)
        at += lse_stride
    total = tl.where(empty, 1.0, total)

    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    at = lse_ptr
    for _ in range(parts):
        lse = tl.load(at, mask=inside, other=float("-inf"))
        # What an empty part holds is not read: it may be NaN.
        values = tl.load(out_ptr, mask=here & (lse != float("-inf"))[:, None], other=0.0)
        acc += (tl.exp(lse - peak) / total)[:, None] * values
        at += lse_stride
        out_ptr += out_stride
    tl.store(result_ptr + row[:, None] * dim + d[None, :], acc, mask=here)
    if tl.program_id(1) == 0:
        tl.store(lse_result_ptr + row, tl.where(empty, float("-inf"), peak + tl.log(total)), mask=inside)


def unsupported() -> str | None:
    """Why the kernel cannot run, or None. It takes all that the public function takes."""
    return None


def merge(parts: Sequence[PartialAttention]) -> PartialAttention:
    """See ``thresher.ops.merge.merge``. Copies the parts into one tensor first; ``merge_stacked`` does without."""
    return merge_stacked(torch.stack([part.out for part in parts]), torch.stack([part.lse for part in parts]))


def merge_stacked(out: Tensor, lse: Tensor) -> PartialAttention:
    """``merge`` of parts that lie in one tensor each, as after an all-gather.

    Args:
        out: fp32 ``[R, Q, N, Dv]``; the parts may be any distance apart.
        lse: fp32 ``[R, Q, N]``, below +inf; -inf marks an empty part, whose ``out`` is not read.

    Returns:
        out fp32 ``[Q, N, Dv]`` and lse fp32 ``[Q, N]``; 0 and -inf where all parts are empty. Sums run over R in order.
    """
    num_parts, num, heads, dim = out.shape
    result, lse_result = out.new_empty(num, heads, dim), lse.new_empty(num, heads)
    rows = num * heads
    if rows == 0:
        return PartialAttention(result, lse_result)
    out = out if out[0].is_contiguous() else out.contiguous()
    lse = lse if lse[0].is_contiguous() else lse.contiguous()
    grid = (triton.cdiv(rows, ROWS), max(1, triton.cdiv(dim, BLOCK)))
    with on_device(out):
        _merge_kernel[grid](
            out, lse, result, lse_result, num_parts, rows, dim, out.stride(0), lse.stride(0), ROWS=ROWS, BLOCK=BLOCK, num_warps=4
        )
    return PartialAttention(result, lse_result)
