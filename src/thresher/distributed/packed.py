# mypy: disable-error-code="no-untyped-def"
"""``merge_heads`` on a GPU around somebody else's exchange: one launch before it and one after.

A head's row is its output in bf16 and, behind it, the bits of its fp32 lse: int16 ``[D + 2]``. Rows of one rank's heads stand together,
those of a query one after the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thresher.cache.device import INTERPRET, on_device, overlapped, wait_for_inputs
from thresher.distributed.collectives import share_heads
from thresher.distributed.symmetric_kernels import get_values, of_head, put_values, store_merged
from thresher.ops.sparse_attend.triton import Shares
from thresher.types import PartialAttention


def unfit(shares: list[int], dim: int) -> str | None:
    """Why heads that are shared out so cannot be packed here, or None."""
    if shares != share_heads(sum(shares), len(shares)):
        return f"needs heads shared out as {share_heads(sum(shares), len(shares))}, not {shares}"
    return None if dim > 1 and dim & (dim - 1) == 0 else f"needs values of a power of two of dims, at least 2, not {dim}"


def pack(part: Shares, ranks: int) -> Tensor:
    """int16 ``[Q * N * (D + 2)]``: the rows for every rank in rank order, of attention whose own shares are added up on the way."""
    num, shares, heads, dim = part.out.shape
    sent = torch.empty(num * heads * (dim + 2), dtype=torch.int16, device=part.out.device)
    if len(sent):
        with on_device(sent):
            pack_kernel[(num * heads,)](
                *(x.contiguous() for x in part), sent, heads, shares, DIM=dim, R=ranks, INTERPRET=INTERPRET, num_warps=4, **part.steps(),
                **overlapped(sent),
            )  # fmt: skip
    return sent


def merge_packed(got: Tensor, dim: int) -> PartialAttention:
    """The rows of one rank's heads from all ranks, int16 ``[R, Q, n, D + 2]``, merged as ``ops.merge`` does it."""
    ranks, num, heads, _ = got.shape
    out, lse = (torch.empty(*shape, dtype=torch.float32, device=got.device) for shape in ((num, heads, dim), (num, heads)))
    if lse.numel():
        with on_device(got):
            merge_packed_kernel[(num * heads,)](got, out, lse, num * heads, DIM=dim, R=ranks, num_warps=4, **overlapped(got))
    return PartialAttention(out, lse)


@triton.jit(do_not_specialize=["heads", "shares"])
def pack_kernel(
    parts, peaks, totals, sent, heads, shares,
    DIM: tl.constexpr, R: tl.constexpr, SHARES: tl.constexpr, STEP: tl.constexpr, INTERPRET: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A query and head of a program."""
    program, num = tl.program_id(0), tl.num_programs(0) // heads
    query, head = (program // heads).to(tl.int64), program % heads
    to = ((head + 1) * R - 1) // heads  # whose it is
    first = to * heads // R
    row = num * first + query * ((to + 1) * heads // R - first) + head - first
    wait_for_inputs(OVERLAP)
    values, lse = of_head(parts, peaks, totals, query, head, heads, shares, DIM, SHARES, STEP)
    at = sent + row * (DIM + 2)
    put_values(at, tl.arange(0, DIM), values, True, INTERPRET)
    tl.store((at + DIM).to(tl.pointer_type(tl.float32)), lse)


@triton.jit(do_not_specialize=["num"])
def merge_packed_kernel(got, out, lse_out, num, DIM: tl.constexpr, R: tl.constexpr, OVERLAP: tl.constexpr):
    """A query and head of a program, of ``num``."""
    row = tl.program_id(0).to(tl.int64)
    wait_for_inputs(OVERLAP)
    values, lses = tl.tuple([]), tl.tuple([])
    for rank in tl.static_range(R):
        at = got + (rank * num + row) * (DIM + 2)
        values = values + (get_values(at, tl.arange(0, DIM), True),)  # noqa: RUF005 (Triton knows no star in a tuple)
        lses = lses + (tl.load((at + DIM).to(tl.pointer_type(tl.float32))),)  # noqa: RUF005
    store_merged(out, lse_out, row, values, lses, DIM, R)
