"""One launch: a program for a piece of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thresher.cache.device import on_device, overlapped, unit_rows, wait_for_inputs
from thresher.ops.send import Sent, await_sent

BLOCK = 1024  # indices of a program


@triton.jit(do_not_specialize=["programs", "patience", "rank"])
def slots_kernel(
    indices_ptr, table_ptr, requests_ptr, out_ptr, topk, indices_row, table_row, width, num_requests, page_size,
    addresses, turns, programs, patience, rank,
    BLOCK: tl.constexpr, R: tl.constexpr, FIRST: tl.constexpr, FLAGS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """With R > 1 it ends when what all ranks sent is there; see ``Sent``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(OVERLAP)
    request = tl.load(requests_ptr + row)
    index = tl.load(indices_ptr + row * indices_row + column, mask=column < topk, other=-1)
    page = tl.maximum(index, 0) // page_size
    there = (index >= 0) & (page < width) & (request >= 0) & (request < num_requests)
    held = tl.load(table_ptr + request * table_row + page, mask=there, other=-1)
    tl.store(out_ptr + row * topk + column, tl.where(held < 0, -1, held * page_size + index % page_size), mask=column < topk)
    if R > 1 and tl.program_id(0) + tl.program_id(1) == 0:
        await_sent(addresses, turns, programs, patience, rank, R, FIRST, FLAGS)


def to_slots(indices: Tensor, page_table: Tensor, requests: Tensor, page_size: int, sent: Sent | None = None) -> Tensor:
    """Slots of positions: see ``thresher.ops.to_slots.to_slots``; with ``sent`` the same launch waits for what all ranks sent."""
    indices, page_table, requests = unit_rows(indices), unit_rows(page_table), requests.contiguous()
    num, topk = indices.shape
    out = torch.empty(num, topk, dtype=torch.int32, device=indices.device)
    arguments: tuple[object, ...] = (None, None, 0, 0, 0)
    constants = {"R": 1, "FIRST": 0, "FLAGS": 1}
    if sent is not None:
        arguments, constants = (sent.addresses, sent.turns, sent.programs, sent.patience, sent.rank), sent.constants
    if out.numel():
        with on_device(indices):
            slots_kernel[(num, triton.cdiv(topk, BLOCK))](
                indices, page_table, requests, out, topk, indices.stride(0), page_table.stride(0), page_table.shape[1],
                page_table.shape[0], page_size, *arguments, BLOCK=BLOCK, num_warps=4, **constants, **overlapped(indices),
            )  # fmt: skip
    return out
