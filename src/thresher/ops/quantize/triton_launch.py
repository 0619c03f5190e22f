"""What the launches of ``triton.py`` and ``triton_step.py`` share: how much a program does, and how caches and rotations are passed."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from thresher.cache.device import INTERPRET
from thresher.cache.latents import FP8_BYTES
from thresher.errors import require

TILE = 2048  # elements of a program's tile: 8 or 16 rows of 128 are enough loads in flight
TURNED = 256  # where rows are rotated and transformed: of more, what threads exchange takes three times as long (docs/lab-log.md)
NUM_WARPS = 4
SPREAD = 4 * 132  # programs, before one takes more than a row: a few for each multiprocessor of an H200


def rows_each(num: int, dim: int) -> int:
    """Rows of a program that turns them. Few are spread over more programs, rather than one after the other in a few."""
    return min(max(1, TURNED // dim), triton.next_power_of_2(triton.cdiv(max(num, 1), SPREAD)))


def heads_each(num: int, heads: int, dim: int) -> int:
    """Heads of a program, all of one query."""
    return min(rows_each(num * heads, dim), triton.next_power_of_2(max(heads, 1)))


def warps_of(rows: int, dim: int) -> int:
    """Warps of a program with so many rows: one for 128 elements."""
    return min(NUM_WARPS, max(1, rows * dim // 128))


def flat_pages(pages: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """An index-key cache as bytes and as fp32."""
    require(pages.is_contiguous(), "pages must be contiguous", f"strides {pages.stride()}", "pass IndexKeyCache.pages")
    require(pages.shape[3] == dim + 4, f"pages must hold keys of {dim} dims", tuple(pages.shape), "use the cache of this indexer")
    flat = pages.view(-1)
    return flat, flat.view(torch.float32)


def flat_records(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A latent cache as bytes, as fp32 and as 16-bit words."""
    ok = data.is_contiguous() and data.shape[-1] == FP8_BYTES
    require(ok, f"data must be contiguous [pages, page_size, 1, {FP8_BYTES}]", tuple(data.shape), "pass LatentCache(fp8=True).data")
    flat = data.view(-1)
    return flat, flat.view(torch.float32), flat.view(torch.int16)


def rotation(dim: int, rotary_dim: int, style: str) -> dict[str, object]:
    """Launch options of a kernel that rotates rows of ``dim``."""
    # Unfused, so that a product is rounded before it is added, as PyTorch does.
    return {
        "DIM": dim,
        "LOG_DIM": dim.bit_length() - 1,
        "ROTARY": rotary_dim,
        "INTERLEAVED": style == "interleaved",
        "FACTOR": dim**-0.5,
        "INTERPRET": INTERPRET,
        "enable_fp_fusion": False,
    }


@functools.lru_cache(maxsize=64)
def inv_freq(theta: float, rotary_dim: int, device: torch.device) -> Tensor:
    """fp32 ``[rotary_dim / 2]``, rounded once from fp64, as ``ops/rope`` has it."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / max(rotary_dim, 1)
    return (theta**-exponent).float()
