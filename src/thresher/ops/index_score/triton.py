# mypy: disable-error-code="no-untyped-def"
"""Index scores as Triton kernels.

**The score of a pair does not depend on the tile.** Keys are the rows of a matrix product, (query, head) pairs its columns, so every
element is the same chain of tensor-core steps over the head dim; tiles always have at least 64 keys and 16 columns and programs 4 or 8
warps side by side along the keys, which keeps all of them on ``wgmma`` (fewer columns would fall to another instruction, with other
roundings). Heads are padded to a power of two from 8 on, with zeros, by their number alone. Then, in fp32: relu; eight sums, one for each
head index modulo 8, by explicit fused multiply-adds, heads ascending; a fixed tree over the eight; + 0.0; times the key's scale. Kernels
are compiled without implicit fusion, so a compiler has no say in the roundings. The bits differ from the reference's (docs/numerics.md,
"Two sets agree"), not between the forms.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from thresher.cache.device import INTERPRET, on_device, overlapped, runs_gluon, unit_rows
from thresher.errors import require
from thresher.ops.index_score.triton_kernels import block_kernel, gathered_kernel, paged_kernel, ragged_kernel
from thresher.types import IndexKeys, IndexQuery

FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16

# Launch parameters. 64 keys by 256 (query, head) columns are 128 accumulators a thread, without spills: two programs fit on a
# multiprocessor, one multiplying while the other sums. Few heads need registers for addresses and masks of more queries, and bf16
# needs twice the shared memory: both get 128 columns.
KEYS = 64
QUERIES = {8: 16, 16: 8, 32: 8, 64: 4, 128: 2}  # most queries a tile, by padded heads; half of it for bf16
MIN_COLUMNS = 16
# The gathered form has one tile a program: of 256 keys where these keep the multiprocessors busy, so that fewer load a query's heads, and
# columns are few enough for 64 registers a thread.
GATHERED_KEYS, MANY_GATHERED, FEW_COLUMNS = 128, 2**18, 64
QUADS = 32  # heads; on Hopper more are multiplied by groups of four warps with a chunk each (``gluon_quads.py``)
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
PROGRAMS = 8 * 132 * 4  # wanted: about eight for every one that an H100 or H200 runs at once
MIN_TILES, MAX_TILES = 2, 64  # key tiles a program of the ragged form
SHARED_PROGRAMS = 132 * 4  # of the paged form, where programs share the work out evenly among themselves
MAX_GROUPS = 512  # of rows that a program of the paged form looks at to do so
# With fewer queries a block of ``gluon.py`` is mostly padding.
HOPPER_QUERIES, HOPPER_ROWS, HOPPER_HEADS = 64, 16, range(1, 65)  # queries in all, queries of a request, heads


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


def padded_heads(num_heads: int) -> int:
    """The heads a tile has: a power of two from 8 on."""
    return max(8, triton.next_power_of_2(num_heads))


def layout(num_heads: int) -> dict[str, int]:
    """The constants by which the Hopper kernels deal columns, rows and tiles of up to ``QUADS`` heads out (``gluon_tiles.py``)."""
    heads = padded_heads(num_heads)
    a_chunk = min(heads, 16)
    rows = 128 // a_chunk
    return {"HEADS": heads, "BLOCK": 2 * rows, "ROWS": rows, "HB": a_chunk, "SUB": rows // 8, "TILES": 1 if heads > 16 else 2}


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
    hopper = _hopper(q, k.dtype)
    if hopper is not None:
        return hopper.index_score(q, weights, k, k_scales, starts, ends, out)
    q, weights, k = unit_rows(q), unit_rows(weights), unit_rows(k)
    padded = padded_heads(heads)
    rows = QUERIES[padded] // (2 if q.dtype == BF16 else 1)
    tiles = key_tiles(triton.cdiv(num, rows), num_keys)
    with on_device(q):
        ragged_kernel[triton.cdiv(num, rows), triton.cdiv(num_keys, tiles * KEYS)](
            q, weights, k, k_scales.contiguous(), starts.contiguous(), ends.contiguous(), out, num, heads, num_keys, tiles,
            q.stride(0), q.stride(1), weights.stride(0), k.stride(0), out.stride(0),
            HEADS=padded, D=dim, BN=KEYS, BQ=rows, INTERPRET=INTERPRET, **OPTIONS,
        )  # fmt: skip
    return out


def paged_index_score(
    query: IndexQuery, keys: IndexKeys, width: int | None = None, out: Tensor | None = None, filled: bool = True
) -> Tensor:
    """The public function of this name, for a float8_e4m3fn query.

    Args:
        width: columns of the result. ``max(keys.lengths)`` when None, which reads the lengths on the host; pass an upper bound, such as
            the page table's room, where that must not happen (in a CUDA graph). Where filled, columns past a request's length are -inf.
        out: fp32 ``[Q, width]`` to write, rows contiguous; new memory when None.
        filled: whether columns that a row does not see are -inf; otherwise they may hold anything.
    """
    num, heads, dim = query.q.shape
    if width is None:
        width = int(keys.lengths.max()) if keys.num_requests else 0
    _check(query.q, FP8, width)
    out = _result(out, num, width, query.q.device)
    if not out.numel():
        return out
    crowded = num >= HOPPER_ROWS * keys.num_requests and keys.page_size % KEYS == 0 and len(keys.pages) > 0
    hopper = _hopper(query.q, FP8) if crowded else None
    if hopper is not None:
        return hopper.paged_index_score(query, keys, width, out)
    padded = padded_heads(heads)
    # Rows of one request lie together as a rule, num / num_requests of them.
    most = QUERIES[padded] if keys.page_size % KEYS == 0 else QUERIES[padded] // 2  # odd pages need an address a key
    step = min(max(num // max(keys.num_requests, 1), 1), most)
    tile = max(triton.next_power_of_2(step), MIN_COLUMNS // padded)
    groups = triton.cdiv(num, step)
    # One group needs no look at the others, and too many are too long a look.
    even = 1 < groups <= MAX_GROUPS
    programs = min(groups * triton.cdiv(width, KEYS), PROGRAMS if groups > MAX_GROUPS else SHARED_PROGRAMS)
    tensors, sizes, strides = paged_arguments(query, keys)
    with on_device(query.q):
        paged_kernel[(programs,)](
            *tensors, out, num, *sizes, width, *strides, out.stride(0), GROUPS=max(triton.next_power_of_2(groups), 16) if even else 0,
            STEP=step, PAGE=keys.page_size, FILLED=filled, HEADS=padded, D=dim, BN=KEYS, BQ=tile, INTERPRET=INTERPRET,
            **OPTIONS, **overlapped(query.q), **few_registers(tile * padded),
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
    rows = max(1, MIN_COLUMNS // padded)
    many = num * width >= MANY_GATHERED and rows * padded <= FEW_COLUMNS
    tile, options = (2 * GATHERED_KEYS, OPTIONS | {"num_warps": 8, "maxnreg": 64}) if many else (GATHERED_KEYS, OPTIONS)
    positions = unit_rows(positions)
    tensors, sizes, strides = paged_arguments(query, keys)
    with on_device(query.q):
        gathered_kernel[(num * triton.cdiv(width, tile),)](
            *tensors, positions, out, *sizes, width, *strides, positions.stride(0), out.stride(0),
            PAGE=keys.page_size, HEADS=padded, D=dim, BN=tile, BQ=rows, INTERPRET=INTERPRET, **options,
        )  # fmt: skip
    return out


def block_index_score(query: IndexQuery, keys: IndexKeys, blocks: Tensor, block_size: int, out: Tensor | None = None) -> Tensor:
    """The public function of this name, for a float8_e4m3fn query. No value is read on the host.

    Args:
        out: fp32 ``[Q, m * block_size]`` to write, rows contiguous; new memory when None.
    """
    num, heads, dim = query.q.shape
    width = blocks.shape[1] * block_size
    _check(query.q, FP8, width)
    out = _result(out, num, width, query.q.device)
    if not out.numel():
        return out
    padded = padded_heads(heads)
    blocks = unit_rows(blocks)
    tiles = key_tiles(num, width)
    chunks = triton.cdiv(width, tiles * KEYS)
    rows = max(1, MIN_COLUMNS // padded)
    tensors, sizes, strides = paged_arguments(query, keys)
    with on_device(query.q):
        block_kernel[(num * chunks,)](
            *tensors, blocks, out, num, *sizes, blocks.shape[1], chunks, tiles, *strides, blocks.stride(0), out.stride(0),
            BLOCK_SIZE=block_size, BLOCKS=triton.next_power_of_2(tiles * KEYS // block_size + 2), PAGE=keys.page_size,
            HEADS=padded, D=dim, BN=KEYS, BQ=rows, INTERPRET=INTERPRET, **OPTIONS, **few_registers(rows * padded),
        )  # fmt: skip
    return out


def few_registers(columns: int) -> dict[str, int]:
    """For tiles of few (query, head) columns: four programs fit on a multiprocessor, and nothing is spilled."""
    return {"maxnreg": 128} if columns <= 64 else {}


def paged_arguments(query: IndexQuery, keys: IndexKeys) -> tuple[tuple[Tensor, ...], tuple[int, ...], tuple[int, ...]]:
    """``(tensors, sizes, strides)`` that the paged, gathered and block kernels share, in the order of their parameters."""
    num_pages, page_size, _, key_bytes = keys.pages.shape
    flat = keys.pages.view(num_pages, page_size * key_bytes)
    q, weights, table = unit_rows(query.q), unit_rows(query.weights), unit_rows(keys.page_table)
    tensors = (q, weights, flat.view(FP8), flat.view(torch.float32), table, keys.lengths.contiguous())
    sizes = (query.num_heads, keys.num_requests, num_pages, table.shape[1])
    strides = (q.stride(0), q.stride(1), weights.stride(0), page_size * key_bytes // 4, table.stride(0))
    return (*tensors, query.positions.contiguous(), query.requests.contiguous()), sizes, strides


def _hopper(q: Tensor, k_dtype: torch.dtype) -> ModuleType | None:
    """The module with the kernels for many queries on Hopper, which have the same bits, where they can run and are faster."""
    num, heads, dim = q.shape
    fits = num >= HOPPER_QUERIES and heads in HOPPER_HEADS and dim in (64, 128) and (q.dtype, k_dtype) == (FP8, FP8)
    return import_module("thresher.ops.index_score.gluon") if fits and runs_gluon(q) else None


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
