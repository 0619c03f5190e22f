# mypy: disable-error-code="no-untyped-def"
"""What FlashMLA is given and what it returns, each turned into ours in one launch, where PyTorch takes four or five.

The first may be on its way while the launch ahead still runs (programmatic dependent launch), but lets none begin before its own end: what
the package launches next was not written to wait for it. The second waits for all before it, as a plain launch does. The package's last
kernel, which adds up shares, leaves without waiting for the one that attends where a query was not shared, so its end tells nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from thresher.cache.device import on_device, overlapped, unit_rows

BLOCK = 1024  # slots of a program
ROWS = 4  # heads of queries of a program


@triton.jit
def inside_kernel(slots_ptr, out_ptr, num, slots_row, num_slots, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if OVERLAP:
        gdc_wait()
    slot = tl.load(slots_ptr + row * slots_row + column, mask=column < num, other=-1)
    tl.store(out_ptr + row * num + column, tl.where((slot < 0) | (slot >= num_slots), -1, slot), mask=column < num)


@triton.jit
def part_kernel(
    out_ptr, lse_ptr, whole_ptr, sums_ptr, num_rows, heads, out_query, out_head, lse_query, lse_head, DIM: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    query, head = (row // heads).to(tl.int64), row % heads
    ok = row < num_rows
    lse = tl.load(lse_ptr + query * lse_query + head * lse_head, mask=ok, other=0.0)
    d = tl.arange(0, DIM)[None, :]
    out = tl.load(out_ptr + (query * out_query + head * out_head)[:, None] + d, mask=ok[:, None], other=0.0)
    tl.store(sums_ptr + row, tl.where(lse == float("inf"), -float("inf"), lse), mask=ok)
    tl.store(whole_ptr + row.to(tl.int64)[:, None] * DIM + d, out.to(tl.float32), mask=ok[:, None])


def inside(slots: Tensor, num_slots: int) -> Tensor:
    """int32 ``[Q, K]``, contiguous: the slots, -1 for those outside ``0..num_slots - 1``."""
    slots = unit_rows(slots)
    rows, num = slots.shape
    out = torch.empty(rows, num, dtype=torch.int32, device=slots.device)
    if out.numel():
        with on_device(slots):
            inside_kernel[(rows, triton.cdiv(num, BLOCK))](
                slots, out, num, slots.stride(0), num_slots, BLOCK=BLOCK, num_warps=4, **overlapped(slots)
            )
    return out


def as_part(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Copies fp32 ``[Q, N, D]`` and ``[Q, N]`` of bf16 ``out`` and fp32 ``lse``, -inf for +inf; D is a power of two."""
    out = unit_rows(out)
    num, heads, dim = out.shape
    whole = torch.empty(num, heads, dim, dtype=torch.float32, device=out.device)
    sums = torch.empty(num, heads, dtype=torch.float32, device=out.device)
    if sums.numel():
        with on_device(out):
            part_kernel[(triton.cdiv(num * heads, ROWS),)](
                out, lse, whole, sums, num * heads, heads, out.stride(0), out.stride(1), lse.stride(0), lse.stride(1),
                DIM=dim, ROWS=ROWS, num_warps=4,
            )  # fmt: skip
    return whole, sums
