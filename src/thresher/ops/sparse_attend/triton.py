"""Sparse attention on a GPU: gather, softmax and values in one pass over the selected slots.

Where queries are few (decode), a query's slots are cut into shares that run side by side, and a second kernel adds the shares up, always
in the same way. How many there are follows from shapes alone, so equal calls give equal bits.

Products are taken in the inputs' own type with fp32 accumulation (FP8 latents become bf16 first; inputs of several types, fp32),
probabilities are rounded to that type before they meet the values, and all else is fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from thresher.cache.device import INTERPRET, on_device, overlapped, runs_gluon, unit_rows
from thresher.cache.latents import FP8_BYTES, LATENT_DIM, ROPE_DIM
from thresher.errors import ThresherError, require
from thresher.ops.sparse_attend.triton_kernels import combine_kernel, gqa_kernel, mla_kernel
from thresher.types import PartialAttention

MLA_DIM = LATENT_DIM + ROPE_DIM
MAX_DIM = 256
MAX_HEADS = 128
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

# Queries times head tiles below this are cut into shares until about so many programs run: the multiprocessors of an H100 or H200. It is
# no property of the device at hand, or else two devices would cut, and so round, differently.
PROGRAMS = 132

# Heads in a tile -> slots in a tile, warps, stages of the load pipeline. Tiles of 64 heads run on wgmma and fill shared memory and
# registers; smaller ones run on mma.sync, where the weight of a tile is its conversion to bf16, not its products.
MLA_FP8 = {16: (64, 8, 2), 32: (64, 8, 2), 64: (64, 8, 2)}
MLA_BF16 = {16: (64, 8, 3), 32: (64, 8, 3), 64: (64, 8, 2)}
GQA_HALF = {16: (64, 4, 3), 32: (64, 4, 3), 64: (64, 8, 3)}
GQA_FLOAT = {16: (32, 8, 2)}  # no tensor cores; larger tiles spill


class Shares(NamedTuple):
    """Attention over S shares of every query's slots. Where there is one, it is all: ``out`` is the output and ``peaks`` the lse.

    Attributes:
        out: fp32 ``[Q, S, N, D]``, values summed, each weighted by two to what its score has above the share's peak.
        peaks: fp32 ``[Q, S, N]``, of scores in base 2.
        totals: fp32 ``[Q, S, N]``, the weights summed.
    """

    out: Tensor
    peaks: Tensor
    totals: Tensor

    @classmethod
    def of(cls, part: PartialAttention) -> Shares:
        """All of it as one share."""
        return cls(part.out[:, None], part.lse[:, None], part.lse[:, None])

    def added(self) -> PartialAttention:
        """All shares together, by one launch where there are several."""
        num, shares, heads, dim = self.out.shape
        if shares == 1:
            return PartialAttention(self.out[:, 0], self.peaks[:, 0])
        out, lse = self.out.new_empty(num, heads, dim), self.out.new_empty(num, heads)
        block = triton.next_power_of_2(dim)
        with on_device(out):
            combine_kernel[(num * heads,)](
                *self, out, lse, heads, shares, DIM=dim, BLOCK=block, num_warps=max(block // 128, 1), **self.steps(), **overlapped(out)
            )
        return PartialAttention(out, lse)

    def steps(self) -> dict[str, int]:
        """How ``add_shares`` goes through them."""
        wide = triton.next_power_of_2(self.out.shape[1])
        return {"SHARES": wide, "STEP": min(wide, 32)}


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why ``sparse_attend`` cannot run here, or None."""
    if not {q.dtype, k.dtype, v.dtype} <= TYPES.keys():
        return f"needs bfloat16, float16 or float32, not {q.dtype}, {k.dtype} and {v.dtype}"
    if not (1 <= k.shape[-1] <= MAX_DIM and 1 <= v.shape[-1] <= MAX_DIM):
        return f"needs head dims of 1 to {MAX_DIM}, not {k.shape[-1]} and {v.shape[-1]}"
    return _no_gradient(q, k, v)


def unsupported_mla(q: Tensor, latents: Tensor, value_dim: int = LATENT_DIM) -> str | None:
    """Why ``sparse_attend_mla`` cannot run here, or None."""
    if q.dtype != torch.bfloat16 or latents.dtype != torch.bfloat16:
        return f"needs bfloat16 queries and latents, not {q.dtype} and {latents.dtype}"
    if (latents.shape[-1], value_dim) != (MLA_DIM, LATENT_DIM):
        return f"needs latents of {MLA_DIM} dims with a value of {LATENT_DIM}, not {latents.shape[-1]} and {value_dim}"
    return _too_many_heads(q) or _no_gradient(q, latents)


def unsupported_mla_fp8(q: Tensor, cache_data: Tensor, slots: Tensor | None = None) -> str | None:
    """Why ``sparse_attend_mla_fp8`` cannot run here, or None; any slots will do."""
    if q.dtype != torch.bfloat16 or cache_data.dtype != torch.uint8:
        return f"needs bfloat16 queries and a uint8 cache, not {q.dtype} and {cache_data.dtype}"
    if q.dim() != 3 or cache_data.dim() != 4 or cache_data.shape[2:] != (1, FP8_BYTES):
        got = f"{list(q.shape)} and {list(cache_data.shape)}"
        return f"needs q [num_queries, heads, {MLA_DIM}] and a cache [pages, page_size, 1, {FP8_BYTES}], not {got}"
    if cache_data.stride(3) != 1 or cache_data.stride(0) % 16 or cache_data.stride(1) % 16 or cache_data.data_ptr() % 16:
        return "needs tokens of the cache at addresses that are multiples of 16 bytes"
    return _too_many_heads(q) or _no_gradient(q)


def sparse_attend(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, scale: float) -> PartialAttention:
    """See ``thresher.ops.sparse_attend.sparse_attend``. Slots outside 0..S - 1 count as absent; they are never read."""
    _refuse(unsupported(q, k, v))
    heads, k_dim = q.shape[1:]
    num_slots, groups, v_dim = v.shape
    dtypes = {q.dtype, k.dtype, v.dtype}
    dtype = q.dtype if len(dtypes) == 1 else torch.float32
    table = GQA_FLOAT if dtype == torch.float32 else GQA_HALF
    tile_heads = _tile_heads(heads // groups, table)
    tile, warps, stages = table[tile_heads]
    q, k, v, slots = unit_rows(q), unit_rows(k), unit_rows(v), unit_rows(slots)

    def launch(grid: int, shares: int, share_tiles: int, out: Tensor, lse: Tensor, total: Tensor) -> None:
        gqa_kernel[(grid,)](
            q,
            k,
            v,
            slots,
            out,
            lse,
            total,
            scale * math.log2(math.e),
            num_slots,
            groups,
            heads // groups,
            slots.shape[1],
            shares,
            share_tiles,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            slots.stride(0),
            K_DIM=k_dim,
            V_DIM=v_dim,
            BLOCK_K=max(16, triton.next_power_of_2(k_dim)),
            BLOCK_V=max(16, triton.next_power_of_2(v_dim)),
            # Everything is fp32 in the interpreter, whose bf16 arithmetic is wrong.
            TYPE=tl.float32 if INTERPRET else TYPES[dtype],
            SPLIT=shares > 1,
            HEADS=tile_heads,
            TILE=tile,
            num_warps=warps,
            num_stages=stages,
        )

    return _attend(launch, q, slots, num_slots, v_dim, groups * triton.cdiv(heads // groups, tile_heads), tile).added()


def sparse_attend_mla(q: Tensor, latents: Tensor, slots: Tensor, scale: float, value_dim: int = LATENT_DIM) -> PartialAttention:
    """See ``thresher.ops.sparse_attend.sparse_attend_mla``. Slots outside 0..S - 1 count as absent; they are never read."""
    _refuse(unsupported_mla(q, latents, value_dim))
    aligned = latents.stride(1) == 1 and latents.stride(0) % 8 == 0 and latents.data_ptr() % 16 == 0
    latents = latents if aligned else latents.clone(memory_format=torch.contiguous_format)
    return _mla(q, latents, latents, latents, slots, scale, latents.shape[0], (1, latents.stride(0) // 8, 0)).added()


def sparse_attend_mla_fp8(q: Tensor, cache_data: Tensor, slots: Tensor, scale: float, early: bool = True) -> PartialAttention:
    """``sparse_attend_mla`` over the FP8 cache as it lies in memory, each value multiplied by its group's scale and rounded to bf16.

    Args:
        q: bf16 ``[Q, N, 576]``, N at most 128.
        cache_data: uint8 ``[P, page_size, 1, 656]``, the bytes of ``LatentCache.data``; pages and tokens may be strided.
        slots: int32 ``[Q, K]``, ``page * page_size + offset``; any other value is absent and never read.
        scale: softmax scale.
        early: as for the public function.

    Returns:
        out fp32 ``[Q, N, 512]`` and lse fp32 ``[Q, N]``; 0 and -inf for a row without slots.

    Raises:
        ThresherError: a shape, dtype, device or alignment that does not fit.

    Source: the cache of DeepSeek-V3.2-Exp (arXiv 2512.02556).
    """
    return attend_in_shares(q, cache_data, slots, scale, early=early).added()


def attend_in_shares(
    q: Tensor, cache_data: Tensor, slots: Tensor, scale: float, counts: Tensor | None = None, early: bool = True
) -> Shares:
    """``sparse_attend_mla_fp8`` before its shares are added up.

    Args:
        counts: integers ``[Q]``: where each row's slots all stand in so many columns from the first on, which saves time where these are
            fewer than there are.
        early: as for the public function.
    """
    _refuse(unsupported_mla_fp8(q, cache_data))
    require(q.shape[2] == MLA_DIM, f"q must be [num_queries, heads, {MLA_DIM}]", tuple(q.shape), "use absorbed queries")
    ok = slots.dtype == torch.int32 and slots.dim() == 2 and slots.shape[0] == q.shape[0]
    require(ok, f"slots must be int32 [{q.shape[0]}, K]", f"{slots.dtype} {tuple(slots.shape)}", "convert them")
    require(cache_data.device == slots.device == q.device, f"cache_data and slots must be on {q.device}", cache_data.device, "move them")
    hopper = _hopper(q)
    if hopper is not None:
        q, slots, num_slots = unit_rows(q), unit_rows(slots), cache_data.shape[0] * cache_data.shape[1]
        launch = hopper.launcher(q, cache_data, slots, scale, counts, early)
        return _attend(launch, q, slots, num_slots, LATENT_DIM, triton.cdiv(q.shape[1], hopper.HEADS), hopper.TILE)
    pages, page_size = cache_data.shape[:2]
    latent, scales, rope = cache_data.view(torch.float8_e4m3fn), cache_data.view(torch.float32), cache_data.view(torch.bfloat16)
    layout = (page_size, cache_data.stride(0) // 16, cache_data.stride(1) // 16)
    return _mla(q, latent, scales, rope, slots, scale, pages * page_size, layout)


def _hopper(q: Tensor) -> ModuleType | None:
    """The module with the kernel for FP8 latents on Hopper, where it can run."""
    if not runs_gluon(q):
        return None
    return import_module("thresher.ops.sparse_attend.gluon")


def _mla(
    q: Tensor, latent: Tensor, scales: Tensor, rope: Tensor, slots: Tensor, scale: float, num_slots: int, layout: tuple[int, int, int]
) -> Shares:
    """``layout``: slots in a page, and the stride of a page and of a slot in units of 16 bytes."""
    fp8 = latent.dtype == torch.float8_e4m3fn
    table = MLA_FP8 if fp8 else MLA_BF16
    tile_heads = _tile_heads(q.shape[1], table)
    tile, warps, stages = table[tile_heads]
    q, slots = unit_rows(q), unit_rows(slots)

    def launch(grid: int, shares: int, share_tiles: int, out: Tensor, lse: Tensor, total: Tensor) -> None:
        mla_kernel[(grid,)](
            q,
            latent,
            scales,
            rope,
            slots,
            out,
            lse,
            total,
            scale * math.log2(math.e),
            num_slots,
            q.shape[1],
            slots.shape[1],
            shares,
            share_tiles,
            *layout,
            *q.stride()[:2],
            slots.stride(0),
            FP8=fp8,
            SPLIT=shares > 1,
            HEADS=tile_heads,
            TILE=tile,
            INTERPRET=INTERPRET,
            num_warps=warps,
            num_stages=stages,
        )

    return _attend(launch, q, slots, num_slots, LATENT_DIM, triton.cdiv(q.shape[1], tile_heads), tile)


def _attend(
    launch: Callable[[int, int, int, Tensor, Tensor, Tensor], None],
    q: Tensor,
    slots: Tensor,
    num_slots: int,
    v_dim: int,
    head_tiles: int,
    tile: int,
) -> Shares:
    """All shares, by one launch."""
    num, heads = q.shape[:2]
    topk = slots.shape[1]
    if min(num, heads, topk, num_slots) == 0:
        none = q.new_full((num, 1, heads), -math.inf, dtype=torch.float32)
        return Shares(q.new_zeros(num, 1, heads, v_dim, dtype=torch.float32), none, none)
    shares, share_tiles = cut(num * head_tiles, topk, tile)
    out = q.new_empty(num, shares, heads, v_dim, dtype=torch.float32)
    peaks = q.new_empty(num, shares, heads, dtype=torch.float32)
    totals = torch.empty_like(peaks) if shares > 1 else peaks
    with on_device(q):
        launch(num * head_tiles * shares, shares, share_tiles, out, peaks, totals)
    return Shares(out, peaks, totals)


def cut(programs: int, topk: int, tile: int) -> tuple[int, int]:
    """Shares of a query's slots and tiles in a share: about ``PROGRAMS`` programs in all, by shapes alone; no share is empty."""
    tiles = triton.cdiv(topk, tile)
    share_tiles = triton.cdiv(tiles, min(tiles, max(1, PROGRAMS // programs)))
    return triton.cdiv(tiles, share_tiles), share_tiles


def _tile_heads(heads: int, table: dict[int, tuple[int, int, int]]) -> int:
    """Rows of a tile of heads: the smallest of the table that holds them all, else its largest."""
    return min((rows for rows in table if rows >= heads), default=max(table))


def _refuse(why: str | None) -> None:
    if why:
        raise ThresherError(f'the Triton kernel must be able to run; got: {why}; pass impl="reference"')


def _too_many_heads(q: Tensor) -> str | None:
    return None if 1 <= q.shape[1] <= MAX_HEADS else f"needs 1 to {MAX_HEADS} heads, not {q.shape[1]}"


def _no_gradient(*tensors: Tensor) -> str | None:
    return "has no gradient" if torch.is_grad_enabled() and any(t.requires_grad for t in tensors) else None
