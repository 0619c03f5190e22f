"""Triton functions that kernels of several operations share: the FP8 rule, and ordered sums over keys.

Imported by kernel modules, and for CUDA tensors, so that the package needs no Triton without a GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thresher.types import IndexKeys, IndexQuery

# The interpreter computes wrongly in bf16 and rounds wrongly to bf16 and e4m3; kernels take explicit steps there.
INTERPRET = bool(triton.knobs.runtime.interpret)


class Rows(NamedTuple):
    """Where FP8 vectors lie, as a kernel takes it: row r of page p begins at ``p * value_stride + r * D`` of ``values``, its scale at
    ``p * scale_stride + scale_start + r`` of ``scales``. With page_size 0 there are no pages: ``table`` holds first rows, one a request.
    """

    values: Tensor
    scales: Tensor
    table: Tensor
    table_width: int
    num_pages: int
    page_size: int
    value_stride: int
    scale_stride: int
    scale_start: int


def paged_rows(keys: IndexKeys) -> Rows:
    """Index keys in pages; the cache's memory is read in place."""
    pages, size, dim = keys.pages, keys.page_size, keys.head_dim
    num, width = pages.shape[0], size * (dim + 4)
    flat = pages.view(-1)
    table = keys.page_table.contiguous()
    values, scales = flat.view(torch.float8_e4m3fn), flat.view(torch.float32)
    return Rows(values, scales, table, table.shape[1], num, size, width, width // 4, size * dim // 4)


def flat_rows(values: Tensor, scales: Tensor, starts: Tensor) -> Rows:
    """Rows ``[N, D]`` one after the other; those of request b begin at ``starts[b]`` (int64)."""
    return Rows(values.contiguous(), scales.contiguous(), starts, 0, values.shape[0], 0, 0, 0, 0)


# Gluon is an experimental part of Triton: these versions have been tried.
GLUON = "3.6."


def on_hopper(tensor: Tensor) -> bool:
    """Whether a tensor is on a card that kernels for Hopper alone run on."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) == (9, 0)


def runs_gluon(tensor: Tensor) -> bool:
    """Whether kernels written in Gluon for Hopper can run for a tensor."""
    return on_hopper(tensor) and triton.__version__.startswith(GLUON)


def overlapped(tensor: Tensor) -> dict[str, bool]:
    """Launch options of a kernel that waits for the launch ahead before it reads what that wrote, as ``wait_for_inputs`` does: from Hopper
    on it may be put on its way while that still runs (programmatic dependent launch)."""
    overlap = not INTERPRET and (not tensor.is_cuda or torch.cuda.get_device_capability(tensor.device) >= (9, 0))
    return {"OVERLAP": overlap, "launch_pdl": overlap}


def unit_rows(tensor: Tensor) -> Tensor:
    """The tensor with a last dim of stride 1."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Launches go to this tensor's GPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def warps_of(head_dim: int) -> int:
    """Warps of a program of ``ordered_sum``: a thread for each dim, as far as there are."""
    return min(max(triton.next_power_of_2(head_dim) // 32, 1), 32)


def keys_under_way(page_size: int, block_size: int) -> int:
    """How many loads ``ordered_sum`` starts at once: as many as lie in one page from any start it can have, which needs one look-up."""
    fits = (n for n in (32, 16, 8) if page_size % n == 0 and block_size % n == 0)
    return 4 if INTERPRET else next(fits, 8)


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """What launches ahead of this one wrote can be read, and the next may be put on its way. Comes before the first load or store."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def as_mask(condition):
    """A scalar condition that may mask a block. Compiled, it is the condition itself.

    Triton's interpreter keeps the type of what was compared beside a comparison, and a block made of one scalar gets that type; from 3.7 on
    it refuses such a mask. The first operand's type wins, so this one is bool.
    """
    return tl.full([], True, tl.int1) & condition


@triton.jit
def round_to_bf16(x, INTERPRET: tl.constexpr):
    """fp32 rounded to bf16, to nearest even, as its 16 bits."""
    if INTERPRET:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x != x, 0x7FC0, rounded).to(tl.int16)
    else:
        rounded = x.to(tl.bfloat16).to(tl.int16, bitcast=True)
    return rounded


@triton.jit
def from_bf16(bits):
    """fp32 of the 16 bits of bf16."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def round_like(x, ptr, INTERPRET: tl.constexpr):
    """x rounded to the type behind ``ptr``, as fp32."""
    if ptr.dtype.element_ty == tl.bfloat16:
        rounded = from_bf16(round_to_bf16(x, INTERPRET))
    elif ptr.dtype.element_ty == tl.float16:
        rounded = x.to(tl.float16).to(tl.float32)
    else:
        rounded = x
    return rounded


@triton.jit
def quantize_tile(x, INTERPRET: tl.constexpr):
    """fp32 ``[R, D]`` to e4m3 codes uint8 ``[R, D]`` and scales fp32 ``[R]``: ``cache.fp8.quantize_fp8``, to the bit.

    The scale comes from the bits of the largest magnitude, all in integers, so NaN and infinity are seen too; such a row is stored as NaN
    under scale 1, since a kernel cannot refuse it.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    top = tl.max(magnitude, 1)
    finite = top < 0x7F800000
    floored = tl.maximum(top, 0x38D1B717)  # fp32 1e-4
    # amax / 448 rounded up to a power of two: amax = 1.f * 2**(e - 127), 448 = 1.75 * 2**8; one step more when 1.f > 1.75.
    exponent = (floored >> 23) - 8 + tl.where((floored & 0x7FFFFF) > 0x600000, 1, 0)
    exponent = tl.where(finite, exponent, 127)
    scales = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    scaled = tl.where(finite[:, None], x, 0.0) * inverse[:, None]
    if INTERPRET:
        bits = scaled.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
        # Below 2**-6 e4m3 is a grid of 2**-9: adding 2**23 rounds to it.
        small = (tl.abs(scaled) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
        codes = (tl.where(magnitude < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)
    else:
        codes = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return tl.where(finite[:, None], codes, 0x7F).to(tl.uint8), scales


@triton.jit
def find_rows(
    table_ptr,
    request,
    index,
    ok,
    table_width,
    num_pages,
    DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    SCALE_START: tl.constexpr,
):
    """Offsets (int64) of the values and the scale of rows ``index`` of a request, and which of them exist. See ``Rows``."""
    if PAGE_SIZE == 0:
        row = tl.load(table_ptr + request) + index
        value_at, scale_at = row * DIM, row
        ok = ok & (row >= 0) & (row < num_pages)
    else:
        column = index // PAGE_SIZE
        ok = ok & (index >= 0) & (column < table_width)
        page = tl.load(table_ptr + request.to(tl.int64) * table_width + column, mask=ok, other=-1).to(tl.int64)
        ok = ok & (page >= 0) & (page < num_pages)
        row = index - column * PAGE_SIZE
        value_at, scale_at = page * VALUE_STRIDE + row * DIM, page * SCALE_STRIDE + SCALE_START + row
    return value_at, scale_at, ok


@triton.jit
def _load_keys(
    values_ptr,
    scales_ptr,
    table_ptr,
    request,
    start,
    base,
    count,
    table_width,
    num_pages,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    SCALE_START: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Values e4m3 ``[1, D]`` and scales of UNROLL keys from position ``start + base`` on, two tuples; zeros from ``count`` on."""
    d = tl.arange(0, BLOCK_D)[None, :]
    # A run of UNROLL keys that starts at a multiple of UNROLL lies in one page.
    ONE_PAGE: tl.constexpr = PAGE_SIZE == 0 or (PAGE_SIZE % UNROLL == 0 and BLOCK_SIZE % UNROLL == 0)
    value_at, scale_at, found = find_rows(
        table_ptr, request, start + base, base < count, table_width, num_pages, DIM, PAGE_SIZE, VALUE_STRIDE, SCALE_STRIDE, SCALE_START
    )
    values, scales = tl.tuple([]), tl.tuple([])
    for step in tl.static_range(UNROLL):
        if not ONE_PAGE and step > 0:
            value_at, scale_at, found = find_rows(
                table_ptr,
                request,
                start + base + step,
                base + step < count,
                table_width,
                num_pages,
                DIM,
                PAGE_SIZE,
                VALUE_STRIDE,
                SCALE_STRIDE,
                SCALE_START,
            )
        ok = as_mask(found & (base + step < count))
        # Triton knows no star in a tuple.
        values = values + (tl.load(values_ptr + value_at + d, mask=ok & (d < DIM), other=0.0),)  # noqa: RUF005
        scales = scales + (tl.load(scales_ptr + scale_at, mask=ok, other=0.0),)  # noqa: RUF005
        if ONE_PAGE:
            value_at += DIM
            scale_at += 1
    return values, scales


@triton.jit
def _add_keys(total, values, scales, base, count, sums_ptr, first, DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr):
    """``total`` and UNROLL keys, one after the other. Where ``sums_ptr`` is not None the sums after ``first`` and later keys are stored."""
    d = tl.arange(0, BLOCK_D)[None, :]
    for step in tl.static_range(UNROLL):
        total += values[step].to(tl.float32) * scales[step]
        if sums_ptr is not None:
            key = base + step
            ok = as_mask((key >= first) & (key < count))
            tl.store(sums_ptr + (key - first).to(tl.int64) * DIM + d, total, mask=ok & (d < DIM))
    return total


@triton.jit
def ordered_sum(
    values_ptr,
    scales_ptr,
    table_ptr,
    request,
    start,
    count,
    sums_ptr,
    first,
    table_width,
    num_pages,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    SCALE_START: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Sum fp32 ``[1, D]`` of the keys at positions ``start .. start + count - 1`` of a request.

    ``start`` is a multiple of the block size. The sum runs in position order from +0.0. A key's value times its scale is exact, so a fused
    multiply-add has the same bits. Keys that the table does not hold count as zeros.
    Where ``sums_ptr`` is not None, the sum that ends with key ``first + i`` is stored there as row i, for each i up to the last key.

    While one run of UNROLL keys is added, the loads of the next are under way: a block is walked alone, with little else to wait for.
    """
    total = tl.zeros([1, BLOCK_D], tl.float32)
    values, scales = _load_keys(
        values_ptr, scales_ptr, table_ptr, request, start, 0, count, table_width, num_pages,
        BLOCK_SIZE, DIM, BLOCK_D, PAGE_SIZE, VALUE_STRIDE, SCALE_STRIDE, SCALE_START, UNROLL,
    )  # fmt: skip
    # Two runs a turn, so that none has to move from register to register.
    for base in range(0, count, 2 * UNROLL):
        more_values, more_scales = _load_keys(
            values_ptr, scales_ptr, table_ptr, request, start, base + UNROLL, count, table_width, num_pages,
            BLOCK_SIZE, DIM, BLOCK_D, PAGE_SIZE, VALUE_STRIDE, SCALE_STRIDE, SCALE_START, UNROLL,
        )  # fmt: skip
        total = _add_keys(total, values, scales, base, count, sums_ptr, first, DIM, BLOCK_D, UNROLL)
        values, scales = _load_keys(
            values_ptr, scales_ptr, table_ptr, request, start, base + 2 * UNROLL, count, table_width, num_pages,
            BLOCK_SIZE, DIM, BLOCK_D, PAGE_SIZE, VALUE_STRIDE, SCALE_STRIDE, SCALE_START, UNROLL,
        )  # fmt: skip
        total = _add_keys(total, more_values, more_scales, base + UNROLL, count, sums_ptr, first, DIM, BLOCK_D, UNROLL)
    return total


@triton.jit
def mean_of(total, count, BLOCK_D: tl.constexpr, INTERPRET: tl.constexpr):
    """A sum ``[1, D]`` of ``count`` keys over their count, quantised: codes ``[1, D]`` and scale ``[1]``. No key gives a zero mean."""
    # "/" is an approximate division on a GPU.
    return quantize_tile(tl.div_rn(total, tl.zeros([1, BLOCK_D], tl.float32) + tl.maximum(count, 1).to(tl.float32)), INTERPRET)


@triton.jit
def _visible_kernel(positions, requests, lengths, counts, num, num_requests, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < num
    request = tl.load(requests + at, mask=here, other=-1)
    known = (request >= 0) & (request < num_requests)
    length = tl.load(lengths + tl.where(known, request, 0), mask=known, other=0)
    position = tl.load(positions + at, mask=here, other=-1)
    tl.store(counts + at, tl.maximum(tl.minimum(position + 1, length), 0), mask=here)


def count_visible(query: IndexQuery, keys: IndexKeys) -> Tensor:
    """``index_keys.visible_counts`` in one launch, where PyTorch takes four; 0 for a request that is not there."""
    num, block = query.num_queries, 128
    counts = torch.empty(num, dtype=torch.int64, device=query.q.device)
    if num:
        with on_device(query.q):
            _visible_kernel[(triton.cdiv(num, block),)](
                query.positions.contiguous(), query.requests.contiguous(), keys.lengths.contiguous(),
                counts, num, keys.num_requests, BLOCK=block,
            )  # fmt: skip
    return counts
