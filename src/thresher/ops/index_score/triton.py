# mypy: disable-error-code="no-untyped-def"
"""Index scores as Triton kernels: one device function, ``score_tile``, and three ways to bring it keys and queries.

**The score of a pair does not depend on the tile.** Keys are the rows of a matrix product, (query, head) pairs its columns, so every
element is the same chain of tensor-core steps over the head dim; tiles always have at least 64 keys and 16 columns and programs 4 warps
side by side along the keys, which keeps all of them on ``wgmma`` (fewer columns would fall to another instruction, with other roundings).
Heads are padded to a power of two from 8 on, with zeros, by their number alone. Then, in fp32: relu; eight sums, one for each head
index modulo 8, by explicit fused multiply-adds, heads ascending; a fixed tree over the eight; + 0.0; times the key's scale. Kernels are
compiled without implicit fusion, so a compiler has no say in the roundings. The bits differ from the reference's (docs/numerics.md,
"Two sets agree"), not between the forms.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from thresher.cache.device import as_mask
from thresher.errors import require
from thresher.types import IndexKeys, IndexQuery

INTERPRET = bool(triton.knobs.runtime.interpret)

FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16

# Launch parameters. 64 keys by 256 (query, head) columns are 128 accumulators a thread, without spills: two programs fit on a
# multiprocessor, one multiplying while the other sums. Few heads need registers for addresses and masks of more queries, and bf16
# needs twice the shared memory: both get 128 columns.
KEYS = 64
QUERIES = {8: 16, 16: 8, 32: 8, 64: 4, 128: 2}  # most queries a tile, by padded heads; half of it for bf16
MIN_COLUMNS = 16
GATHERED_KEYS = 128  # the gathered form has one tile a program
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
PROGRAMS = 8 * 132 * 4  # wanted: about eight for every one that an H100 or H200 runs at once
MIN_TILES, MAX_TILES = 2, 64  # key tiles a program

STAGES = tl.constexpr(3)  # named at the loop, so that the scales are prefetched too and not the product's operands alone
NO_REQUEST = tl.constexpr(2**31 - 1)


def unsupported(q_dtype: torch.dtype, k_dtype: torch.dtype, num_heads: int, head_dim: int, num_keys: int = 0) -> str | None:
    """Why these kernels cannot run, or None.

    Args:
        q_dtype: of the queries.
        k_dtype: of the keys; a paged cache holds float8_e4m3fn.
        num_heads: H.
        head_dim: D.
        num_keys: the number of columns scored.
    """
    if (q_dtype, k_dtype) not in ((FP8, FP8), (BF16, BF16)):
        return f"needs float8_e4m3fn queries and keys, or both bfloat16 in the ragged form, not {q_dtype} and {k_dtype}"
    if head_dim not in (64, 128):
        return f"needs a head_dim of 64 or 128, not {head_dim}"
    if not 1 <= num_heads <= 128:
        return f"needs 1 to 128 heads, not {num_heads}"
    return None if num_keys < 2**26 else f"needs fewer than 2**26 keys, not {num_keys}"


@triton.jit
def _head_sums(dots, weights, total, HEADS: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, FIRST: tl.constexpr):
    """``[BN, BQ, HEADS]`` to ``[BN, BQ, 8]``: heads ascending, each onto the sum of its index modulo 8."""
    if HEADS == 8:
        weights = tl.broadcast_to(weights, [BN, BQ, 8])
        total = dots * weights if FIRST else tl.fma(dots, weights, total)
    else:
        low_dots, high_dots = tl.split(tl.permute(tl.reshape(dots, [BN, BQ, 2, HEADS // 2]), (0, 1, 3, 2)))
        low, high = tl.split(tl.permute(tl.reshape(weights, [1, BQ, 2, HEADS // 2]), (0, 1, 3, 2)))
        total = _head_sums(low_dots, low, total, HEADS // 2, BN, BQ, FIRST)
        total = _head_sums(high_dots, high, total, HEADS // 2, BN, BQ, False)
    return total


@triton.jit
def score_tile(keys, scales, queries, weights, HEADS: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, INTERPRET: tl.constexpr):
    """THE score: keys ``[BN, D]``, scales ``[BN]``, queries ``[BQ * HEADS, D]``, weights ``[1, BQ, HEADS]`` to fp32 ``[BN, BQ]``."""
    if INTERPRET:  # bf16 products are wrong there
        keys = keys.to(tl.float32)
        queries = queries.to(tl.float32)
    dots = tl.dot(keys, tl.trans(queries))
    dots = tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL)
    sums = _head_sums(tl.reshape(dots, [BN, BQ, HEADS]), weights, 0.0, HEADS, BN, BQ, True)
    return (tl.sum(sums, axis=2) + 0.0) * scales[:, None]


@triton.jit
def _load_queries(q, weights, first, num_rows, num_heads, q_row, q_head, w_row, HEADS: tl.constexpr, BQ: tl.constexpr, D: tl.constexpr):
    """Rows ``first .. first + num_rows - 1``; zeros for the rows and heads beyond."""
    column = tl.arange(0, BQ * HEADS)
    row, head = column // HEADS, column % HEADS
    offset = (first + row).to(tl.int64) * q_row + head * q_head
    used = (row < num_rows) & (head < num_heads)
    queries = tl.load(q + offset[:, None] + tl.arange(0, D)[None, :], mask=used[:, None], other=0.0)
    row, head = tl.arange(0, BQ)[None, :, None], tl.arange(0, HEADS)[None, None, :]
    used = (row < num_rows) & (head < num_heads)
    return queries, tl.load(weights + (first + row).to(tl.int64) * w_row + head, mask=used, other=0.0)


@triton.jit
def _fill(out, row_offset, rows, first, end, BN: tl.constexpr):
    """-inf into the columns ``first .. end - 1`` of the rows that ``rows`` keeps, whose column 0 lies at ``row_offset``."""
    for start in range(first, end, BN):
        n = start + tl.arange(0, BN)
        tl.store(out + row_offset[None, :] + n[:, None], float("-inf"), mask=(n < end)[:, None] & rows[None, :])


@triton.jit
def _live(low, high, first, last, BN: tl.constexpr):
    """The part of the columns ``first .. last - 1`` that meets ``low .. high - 1``, from a tile's begin; past ``last`` when empty."""
    begin = first + tl.maximum(low - first, 0) // BN * BN
    return begin, tl.maximum(tl.minimum(high, last), begin)


@triton.jit(do_not_specialize=["num_queries", "num_heads", "num_keys", "tiles"])
def ragged_kernel(
    q, weights, k, k_scales, starts, ends, out, num_queries, num_heads, num_keys, tiles, q_row, q_head, w_row, k_row, out_row,
    HEADS: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of BQ rows, chunks of ``tiles`` tiles of keys)."""
    first_row = tl.program_id(0) * BQ
    num_rows = tl.minimum(num_queries - first_row, BQ)
    row = tl.arange(0, BQ)
    rows = row < num_rows
    start = tl.load(starts + first_row + row, mask=rows, other=0)
    end = tl.load(ends + first_row + row, mask=rows, other=0)
    start = tl.minimum(tl.maximum(start, 0), num_keys).to(tl.int32)
    end = tl.minimum(tl.maximum(end, 0), num_keys).to(tl.int32)
    some = start < end
    first = tl.program_id(1) * tiles * BN
    last = tl.minimum(first + tiles * BN, num_keys)
    begin, stop = _live(tl.min(tl.where(some, start, num_keys)), tl.max(tl.where(some, end, 0)), first, last, BN)
    out_tile, row_offset = out + first_row.to(tl.int64) * out_row, row * out_row
    _fill(out_tile, row_offset, rows, first, tl.minimum(begin, last), BN)
    if begin < stop:
        queries, head_weights = _load_queries(q, weights, first_row, num_rows, num_heads, q_row, q_head, w_row, HEADS, BQ, D)
        for n0 in tl.range(begin, stop, BN, num_stages=STAGES):
            n = n0 + tl.arange(0, BN)
            here = n < last
            tile = k + tl.cast(n0, tl.int64) * k_row
            keys = tl.load(tile + tl.arange(0, BN)[:, None] * k_row + tl.arange(0, D)[None, :], mask=here[:, None], other=0.0)
            scales = tl.load(k_scales + n, mask=here, other=0.0)
            score = score_tile(keys, scales, queries, head_weights, HEADS, BN, BQ, INTERPRET)
            seen = (n[:, None] >= start[None, :]) & (n[:, None] < end[None, :])
            score = tl.where(seen, score, float("-inf"))
            tl.store(out_tile + row_offset[None, :] + n[:, None], score, mask=here[:, None] & rows[None, :])
    _fill(out_tile, row_offset, rows, begin + tl.cdiv(stop - begin, BN) * BN, last, BN)


@triton.jit(do_not_specialize=["num_queries", "num_heads", "num_requests", "num_pages", "max_pages", "width", "tiles"])
def paged_kernel(
    q, weights, values, scales, page_table, lengths, positions, requests, out,
    num_queries, num_heads, num_requests, num_pages, max_pages, width, tiles, q_row, q_head, w_row, page_words, table_row, out_row,
    STEP: tl.constexpr, PAGE: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of STEP <= BQ rows, chunks of ``tiles`` tiles of positions). Rows of one tile may belong to several requests."""
    first_row = tl.program_id(0) * STEP
    num_rows = tl.minimum(num_queries - first_row, STEP)
    row = tl.arange(0, BQ)
    rows = row < num_rows
    request = tl.load(requests + first_row + row, mask=rows, other=0)
    position = tl.load(positions + first_row + row, mask=rows, other=-1)
    known = rows & (request >= 0) & (request < num_requests)
    length = tl.load(lengths + tl.where(known, request, 0), mask=known, other=0)
    held = tl.minimum(tl.maximum(length, 0), max_pages.to(tl.int64) * PAGE)
    end = (tl.minimum(tl.maximum(position, -1), held - 1) + 1).to(tl.int32)
    # A request that is not there is one more request, of no tokens: its rows are written too.
    owner = tl.where(rows, tl.where(known, request, num_requests), NO_REQUEST).to(tl.int32)
    first = tl.program_id(1) * tiles * BN
    last = tl.minimum(first + tiles * BN, width)
    out_tile, row_offset = out + first_row.to(tl.int64) * out_row, row * out_row
    wanted_rows = tl.where(tl.max(end) > first, num_rows, 0)  # nothing to see here, nothing to load
    queries, head_weights = _load_queries(q, weights, first_row, wanted_rows, num_heads, q_row, q_head, w_row, HEADS, BQ, D)
    current = tl.min(owner)
    while current < NO_REQUEST:
        mine = owner == current
        begin, stop = _live(0, tl.max(tl.where(mine, end, 0)), first, last, BN)
        table = page_table + current.to(tl.int64) * table_row
        for n0 in tl.range(begin, stop, BN, num_stages=STAGES):
            n = n0 + tl.arange(0, BN)
            if PAGE % BN == 0:
                page = tl.load(table + n0 // PAGE)
                valid = as_mask((page >= 0) & (page < num_pages))
                word = tl.where(valid, page, 0).to(tl.int64) * page_words
                tile = values + word * 4 + (n0 % PAGE) * D
                keys = tl.load(tile + tl.arange(0, BN)[:, None] * D + tl.arange(0, D)[None, :], mask=valid, other=0.0)
                scale = tl.load(scales + word + PAGE * D // 4 + n0 % PAGE + tl.arange(0, BN), mask=valid, other=0.0)
                seen = (n < stop) & valid
            else:
                page = tl.load(table + n // PAGE, mask=n < stop, other=-1)
                seen = (page >= 0) & (page < num_pages)
                word = tl.where(seen, page, 0).to(tl.int64) * page_words
                offset = word * 4 + (n % PAGE) * D
                keys = tl.load(values + offset[:, None] + tl.arange(0, D)[None, :], mask=seen[:, None], other=0.0)
                scale = tl.load(scales + word + PAGE * D // 4 + n % PAGE, mask=seen, other=0.0)
            score = score_tile(keys, scale, queries, head_weights, HEADS, BN, BQ, INTERPRET)
            score = tl.where(seen[:, None] & (n[:, None] < end[None, :]), score, float("-inf"))
            tl.store(out_tile + row_offset[None, :] + n[:, None], score, mask=(n < last)[:, None] & mine[None, :])
        _fill(out_tile, row_offset, mine, begin + tl.cdiv(stop - begin, BN) * BN, last, BN)
        current = tl.min(tl.where(owner > current, owner, NO_REQUEST))


@triton.jit(do_not_specialize=["num_heads", "num_requests", "num_pages", "max_pages", "width"])
def gathered_kernel(
    q, weights, values, scales, page_table, lengths, positions, requests, wanted, out,
    num_heads, num_requests, num_pages, max_pages, width, q_row, q_head, w_row, page_words, table_row, wanted_row, out_row,
    PAGE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid: queries times tiles of BN candidates, those of a query together. It is row 0 of its tile; others, if any, are zeros."""
    tiles = tl.cdiv(width, BN)
    row = tl.program_id(0) // tiles
    request = tl.load(requests + row)
    known = (request >= 0) & (request < num_requests)
    request = tl.where(known, request, 0)
    held = tl.minimum(tl.load(lengths + request, mask=known, other=0), max_pages.to(tl.int64) * PAGE)
    end = tl.minimum(tl.load(positions + row), held - 1) + 1
    n = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    here = n < width
    position = tl.load(wanted + row.to(tl.int64) * wanted_row + n, mask=here, other=-1)
    seen = (position >= 0) & (position < end)
    out_tile = out + row.to(tl.int64) * out_row + n[:, None] + tl.zeros([1, BQ], tl.int32)
    store = here[:, None] & (tl.arange(0, BQ) == 0)[None, :]
    if tl.max(seen.to(tl.int32)) == 0:
        tl.store(out_tile, float("-inf"), mask=store)
    else:
        safe = tl.where(seen, position, 0).to(tl.int32)
        page = tl.load(page_table + request * table_row + safe // PAGE, mask=seen, other=-1)
        seen = (page >= 0) & (page < num_pages)
        word = tl.where(seen, page, 0).to(tl.int64) * page_words
        offset = word * 4 + (safe % PAGE) * D
        keys = tl.load(values + offset[:, None] + tl.arange(0, D)[None, :], mask=seen[:, None], other=0.0)
        scale = tl.load(scales + word + PAGE * D // 4 + safe % PAGE, mask=seen, other=0.0)
        queries, head_weights = _load_queries(q, weights, row, 1, num_heads, q_row, q_head, w_row, HEADS, BQ, D)
        score = score_tile(keys, scale, queries, head_weights, HEADS, BN, BQ, INTERPRET)
        tl.store(out_tile, tl.where(seen[:, None], score, float("-inf")), mask=store)


def padded_heads(num_heads: int) -> int:
    """The heads a tile has: a power of two from 8 on."""
    return max(8, triton.next_power_of_2(num_heads))


def key_tiles(row_tiles: int, num_keys: int) -> int:
    """Key tiles a program scans, a power of two."""
    share = row_tiles * triton.cdiv(num_keys, KEYS) // PROGRAMS
    return min(max(triton.next_power_of_2(max(share, 1)), MIN_TILES), MAX_TILES)


def index_score(q: Tensor, weights: Tensor, k: Tensor, k_scales: Tensor, starts: Tensor, ends: Tensor, out: Tensor | None = None) -> Tensor:
    """The public function of this name; q and k are both float8_e4m3fn or both bfloat16. No value is read on the host.

    Args:
        out: fp32 ``[Q, N]`` to write, rows contiguous; new memory when None.
    """
    num, heads, dim = q.shape
    num_keys = k.shape[0]
    _check(q, k.dtype, num_keys)
    out = _result(out, num, num_keys, q.device)
    if not out.numel():
        return out
    q, weights, k = _rows(q), _rows(weights), _rows(k)
    padded = padded_heads(heads)
    rows = QUERIES[padded] // (2 if q.dtype == BF16 else 1)
    tiles = key_tiles(triton.cdiv(num, rows), num_keys)
    with _on(q):
        ragged_kernel[triton.cdiv(num, rows), triton.cdiv(num_keys, tiles * KEYS)](
            q, weights, k, k_scales.contiguous(), starts.contiguous(), ends.contiguous(), out, num, heads, num_keys, tiles,
            q.stride(0), q.stride(1), weights.stride(0), k.stride(0), out.stride(0),
            HEADS=padded, D=dim, BN=KEYS, BQ=rows, INTERPRET=INTERPRET, **OPTIONS,
        )  # fmt: skip
    return out


def paged_index_score(query: IndexQuery, keys: IndexKeys, width: int | None = None, out: Tensor | None = None) -> Tensor:
    """The public function of this name, for a float8_e4m3fn query.

    Args:
        width: columns of the result. ``max(keys.lengths)`` when None, which reads the lengths on the host; pass an upper bound, such as
            the page table's room, where that must not happen (in a CUDA graph). Columns past a request's length are -inf.
        out: fp32 ``[Q, width]`` to write, rows contiguous; new memory when None.
    """
    num, heads, dim = query.q.shape
    if width is None:
        width = int(keys.lengths.max()) if keys.num_requests else 0
    _check(query.q, FP8, width)
    out = _result(out, num, width, query.q.device)
    if not out.numel():
        return out
    padded = padded_heads(heads)
    # Rows of one request lie together as a rule, num / num_requests of them.
    most = QUERIES[padded] if keys.page_size % KEYS == 0 else QUERIES[padded] // 2  # odd pages need an address a key
    step = min(max(num // max(keys.num_requests, 1), 1), most)
    tile = max(triton.next_power_of_2(step), MIN_COLUMNS // padded)
    tiles = key_tiles(triton.cdiv(num, step), width)
    tensors, sizes, strides = _paged_arguments(query, keys)
    with _on(query.q):
        paged_kernel[triton.cdiv(num, step), triton.cdiv(width, tiles * KEYS)](
            *tensors, out, num, *sizes, width, tiles, *strides, out.stride(0),
            STEP=step, PAGE=keys.page_size, HEADS=padded, D=dim, BN=KEYS, BQ=tile, INTERPRET=INTERPRET, **OPTIONS,
        )  # fmt: skip
    return out


def gathered_index_score(query: IndexQuery, keys: IndexKeys, positions: Tensor, out: Tensor | None = None) -> Tensor:
    """The public function of this name, for a float8_e4m3fn query. No value is read on the host.

    Args:
        out: fp32 ``[Q, C]`` to write, rows contiguous; new memory when None.
    """
    num, heads, dim = query.q.shape
    width = positions.shape[1]
    _check(query.q, FP8, width)
    out = _result(out, num, width, query.q.device)
    if not out.numel():
        return out
    padded = padded_heads(heads)
    positions = _rows(positions)
    tensors, sizes, strides = _paged_arguments(query, keys)
    with _on(query.q):
        gathered_kernel[(num * triton.cdiv(width, GATHERED_KEYS),)](
            *tensors, positions, out, *sizes, width, *strides, positions.stride(0), out.stride(0),
            PAGE=keys.page_size, HEADS=padded, D=dim, BN=GATHERED_KEYS, BQ=max(1, MIN_COLUMNS // padded), INTERPRET=INTERPRET, **OPTIONS,
        )  # fmt: skip
    return out


def _paged_arguments(query: IndexQuery, keys: IndexKeys) -> tuple[tuple[Tensor, ...], tuple[int, ...], tuple[int, ...]]:
    """``(tensors, sizes, strides)`` that the paged and gathered kernels share, in the order of their parameters."""
    num_pages, page_size, _, key_bytes = keys.pages.shape
    flat = keys.pages.view(num_pages, page_size * key_bytes)
    q, weights, table = _rows(query.q), _rows(query.weights), _rows(keys.page_table)
    tensors = (q, weights, flat.view(FP8), flat.view(torch.float32), table, keys.lengths.contiguous())
    sizes = (query.num_heads, keys.num_requests, num_pages, table.shape[1])
    strides = (q.stride(0), q.stride(1), weights.stride(0), page_size * key_bytes // 4, table.stride(0))
    return (*tensors, query.positions.contiguous(), query.requests.contiguous()), sizes, strides


def _check(q: Tensor, k_dtype: torch.dtype, num_keys: int) -> None:
    reason = unsupported(q.dtype, k_dtype, q.shape[1], q.shape[2], num_keys)
    require(reason is None, f"the triton index score {reason}", f"q {tuple(q.shape)}", "use another impl")


def _result(out: Tensor | None, num: int, width: int, device: torch.device) -> Tensor:
    if out is None:
        return torch.empty(num, width, device=device)
    ok = out.shape == (num, width) and out.dtype == torch.float32 and (width < 2 or out.stride(1) == 1) and out.stride(0) < 2**26
    must = f"out must be float32 [{num}, {width}] with contiguous rows"
    require(ok, must, f"{out.dtype} {tuple(out.shape)}, strides {out.stride()}", "allocate it so")
    return out


def _rows(x: Tensor) -> Tensor:
    """``x`` with a last dim of stride 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
