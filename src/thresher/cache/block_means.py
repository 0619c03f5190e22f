"""Cached means of full blocks of index keys, grown as tokens arrive (MISA, arXiv 2605.07363; HISA, arXiv 2603.28458)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from thresher.errors import require
from thresher.types import IndexKeys

Grow = Callable[[IndexKeys, IndexKeys, Tensor, Tensor, int], None]
MEANS_PAGE = 64  # blocks


def pages_of_means(keys: IndexKeys, block_size: int) -> int:
    """Pages, for each request, for the means of as many blocks as the page table of ``keys`` has room for."""
    return max(1, -(-(keys.room // block_size) // MEANS_PAGE))


def empty_means(num_requests: int, pages: int, head_dim: int, device: torch.device) -> IndexKeys:
    """Zeros, so many pages for each request, those of one after the other's, and no block in them yet."""
    made = torch.zeros(num_requests * pages, MEANS_PAGE, 1, head_dim + 4, dtype=torch.uint8, device=device)
    table = torch.arange(num_requests * pages, dtype=torch.int32, device=device).view(num_requests, pages)
    return IndexKeys(made, table, torch.zeros(num_requests, dtype=torch.int64, device=device))


class Growing(NamedTuple):
    """Means that have yet to be brought up to date.

    Attributes:
        means: keys whose positions are block numbers; ``lengths`` are how many full blocks there were.
        pooled, tickets: as ``thresher.ops.grow_means`` takes them.
    """

    means: IndexKeys
    pooled: Tensor
    tickets: Tensor


def held_means(means: IndexKeys | Growing) -> IndexKeys:
    """Where they are, brought up to date or not."""
    return means.means if isinstance(means, Growing) else means


class BlockMeans:
    """The mean key of every full block of each request, in the key cache's own FP8 format.

    A mean depends only on its block's keys, so means grown token by token, made at once, or made again after a rollback have the same bits.
    Those of a request stand in pages of its own, whichever pages its keys have: as much room as the page table has, 1 / block_size of the
    keys it could hold. On a GPU nothing is read on the host, so a step can be recorded in a CUDA graph, once ``update`` has been called
    outside of one.

    Args:
        block_size: tokens in a block.
        grow: ``grow(keys, means, pooled, tickets, block_size)``, the operation that pools what is new (``thresher.ops.grow_means``).
    """

    def __init__(self, block_size: int, grow: Grow) -> None:
        require(block_size >= 1, "block_size must be at least 1", block_size, "pass tokens in a block")
        self.block_size = block_size
        self._grow = grow
        self._means: IndexKeys | None = None
        self._pooled = self._tickets = torch.zeros(0)

    def update(self, keys: IndexKeys) -> IndexKeys:
        """Pool the blocks of every request that were completed since the last call.

        Returns:
            The means of the requests of ``keys`` as keys whose positions are block numbers. The next call writes there again.

        Raises:
            ThresherError: what ``grow`` raises, as where a request was cut without ``rollback``; or memory has to be made while a CUDA
                graph is recorded.
        """
        growing = self.growing(keys)
        self._grow(keys, *growing, self.block_size)
        return growing.means

    def growing(self, keys: IndexKeys) -> Growing:
        """The means as they are, with room for those that ``keys`` have more of: for an operation that brings them up to date itself.

        Raises:
            ThresherError: memory has to be made while a CUDA graph is recorded.
        """
        self._make_room(keys)
        assert self._means is not None
        num = keys.num_requests
        means = IndexKeys(self._means.pages, self._means.page_table[:num], self._means.lengths[:num])
        return Growing(means, self._pooled[:num], self._tickets[:num])

    def rollback(self, request: int, length: int) -> None:
        """Forget the means of blocks that reach past the first ``length`` tokens of ``request``; 0 when its row is given to another.

        Raises:
            ThresherError: ``length`` is negative.
        """
        require(length >= 0, "length must be at least 0", length, "pass the tokens kept")
        if self._means is not None and request < len(self._pooled):
            self._pooled[request].clamp_(max=length)
            self._means.lengths[request].clamp_(max=length // self.block_size)

    def _make_room(self, keys: IndexKeys) -> None:
        """Pages for as many requests and blocks as the page table has room for; what they held stays."""
        num, width = keys.num_requests, pages_of_means(keys, self.block_size)
        old = self._means
        if old is not None and num <= old.num_requests and width <= old.page_table.shape[1] and old.pages.device == keys.pages.device:
            return
        device = keys.pages.device
        recording = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        require(not recording, "block means must have room before a CUDA graph is recorded", "no room", "select once before recording")
        kept = 0 if old is None else old.num_requests
        num, width = max(num, kept), width if old is None else max(width, old.page_table.shape[1])
        made, pooled = empty_means(num, width, keys.head_dim, device), torch.zeros(num, dtype=torch.int64, device=device)
        if old is not None:
            held = old.page_table.shape[1]
            made.pages.unflatten(0, (num, width))[:kept, :held] = old.pages.unflatten(0, (kept, held))
            pooled[:kept], made.lengths[:kept] = self._pooled, old.lengths
        self._means = made
        self._pooled, self._tickets = pooled, torch.zeros(num, dtype=torch.int32, device=device)
