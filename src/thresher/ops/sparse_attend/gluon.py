"""Sparse MLA decode over FP8 latents on Hopper: rounded where ``triton.py``'s kernel rounds, and faster.

Written in Gluon, Triton's layer below its tile language, for what the tile language does not say on Hopper: some warps fetch latents and
some convert them to bf16 while others multiply. Without that the tensor cores wait for every conversion.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from thresher.ops.sparse_attend.gluon_kernels import decode_kernel

HEADS, TILE = 64, 64  # of a program: fewer heads are padded; slots
REGISTERS = (224, 88, 32)  # a thread, of those that multiply 384 dims (192 for accumulators), that convert and that load; the rest have 168


def launcher(
    q: Tensor, cache_data: Tensor, slots: Tensor, scale: float, counts: Tensor | None = None, early: bool = True
) -> Callable[[int, int, int, Tensor, Tensor, Tensor], None]:
    """``launch(grid, shares, share_tiles, out, lse, total)`` for checked arguments; q and slots have rows of stride 1. ``counts`` and
    ``early`` as for ``triton.attend_in_shares``."""
    words = cache_data.view(torch.int32)
    units = (cache_data.stride(0) // 16, cache_data.stride(1) // 16)
    num_slots = cache_data.shape[0] * cache_data.shape[1]

    def launch(grid: int, shares: int, share_tiles: int, out: Tensor, lse: Tensor, total: Tensor) -> None:
        decode_kernel[(grid,)](
            # Where a share has one tile, fewer cannot make it shorter.
            q, words, slots, counts if share_tiles > 1 else None, out, lse, total,
            scale * math.log2(math.e), num_slots, q.shape[1], slots.shape[1], shares, share_tiles, *units, *q.stride()[:2], slots.stride(0),
            # Pages of a size that the compiler knows, so that no division stands before a row's address.
            SPLIT=shares > 1, PAGE=cache_data.shape[1], TILE=TILE, REGISTERS=REGISTERS, num_warps=4, launch_pdl=early,
        )  # fmt: skip

    return launch
