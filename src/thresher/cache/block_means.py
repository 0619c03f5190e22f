"""Cached means of full blocks of index keys, grown as tokens arrive (MISA, arXiv 2605.07363; HISA, arXiv 2603.28458)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from thresher.cache.index_keys import pack_pages, read_keys
from thresher.errors import require
from thresher.types import IndexKeys

Pool = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
PoolPages = Callable[[IndexKeys, Sequence[int], Sequence[int], int], Sequence[tuple[Tensor, Tensor]]]


class PackedMeans(tuple[tuple[Tensor, Tensor], ...]):
    """The means of every request, ``(e4m3 [nb, D], fp32 [nb])`` each, which are also packed one after the other once asked for."""

    _rows: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    @property
    def most(self) -> int:
        """Full blocks of the request that has most of them."""
        return max((len(scales) for _, scales in self), default=0)

    def rows(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All values e4m3 ``[N, D]``, scales fp32 ``[N]``, and each request's first row and number of rows, int64 ``[B]``."""
        if self._rows is None:
            counts = [len(scales) for _, scales in self]
            starts = [sum(counts[:request]) for request in range(len(counts))]
            if counts == [self.most] and counts[0]:
                where = torch.arange(0, 2 * counts[0], counts[0], device=device)[:, None]  # no copy from the host, for CUDA graphs
            else:
                where = torch.tensor([starts, counts], dtype=torch.int64).to(device, non_blocking=True)
            self._rows = (*join(self), where[0], where[1])
        return self._rows


def join(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Values and scales of several requests or steps one after the other; what is alone is not copied."""
    if len(parts) == 1:
        return parts[0]
    # torch has no float8 concatenation on every device.
    values = torch.cat([values.view(torch.uint8) for values, _ in parts]).view(torch.float8_e4m3fn)
    return values, torch.cat([scales for _, scales in parts])


class BlockMeans:
    """The mean key of every full block of each request, in the key cache's own FP8 format.

    A mean depends only on its block's keys, so means grown token by token, made at once, or made again after a rollback have the same bits.

    Args:
        block_size: tokens in a block.
        pool: ``pool(values[N, D], scales[N], block_size) -> (e4m3 [N // block_size, D], fp32 [N // block_size])``,
            the pooling operation (``thresher.ops.pool_keys.pool_keys``).
        pool_pages: ``pool_pages(keys, starts, ends, block_size)``, the same for all requests at once and without a copy of the keys
            (``thresher.ops.pool_keys.pool_pages``); None pools with ``pool``, request after request.
    """

    def __init__(self, block_size: int, pool: Pool, pool_pages: PoolPages | None = None) -> None:
        require(block_size >= 1, "block_size must be at least 1", block_size, "pass tokens in a block")
        self.block_size = block_size
        self._pool, self._pool_pages = pool, pool_pages
        self._means: dict[int, tuple[Tensor, Tensor]] = {}
        self._packed: IndexKeys | None = None
        self._all: PackedMeans | None = None

    def update(self, keys: IndexKeys) -> None:
        """Pool the blocks of every request that were completed since the last call.

        Raises:
            ThresherError: a request holds fewer full blocks than were pooled (it was cut without ``rollback``).
        """
        starts, ends = [], []
        for request, length in enumerate(keys.lengths.tolist()):
            done, full = self._num_blocks(request), length // self.block_size
            do = f"call rollback({request}, length) when the cache is cut"
            require(done <= full, f"request {request} must hold the {done} blocks already pooled", f"{full} full blocks", do)
            starts.append(done)
            ends.append(full)
        grown = [r for r in range(len(ends)) if ends[r] > starts[r] or r not in self._means]
        if grown and self._pool_pages is not None:
            means = self._pool_pages(keys, starts, ends, self.block_size)
            for request in grown:
                self._append(request, *means[request])
        else:
            for request in grown:
                values, scales = read_keys(keys, request, starts[request] * self.block_size, ends[request] * self.block_size)
                if ends[request] > starts[request]:
                    values, scales = self._pool(values, scales, self.block_size)
                self._append(request, values, scales)

    def of(self, request: int) -> tuple[Tensor, Tensor]:
        """The means of one request: float8_e4m3fn ``[nb, D]`` and fp32 ``[nb]``, nb its full blocks; never written later.

        Raises:
            ThresherError: ``update`` has not seen this request.
        """
        require(request in self._means, "update(keys) must come before of(request)", f"request {request}", "call it first")
        return self._means[request]

    def packed(self, num_requests: int) -> IndexKeys:
        """The means of requests ``0 .. num_requests - 1`` as keys whose positions are block numbers; kept until a mean comes or goes.

        Args:
            num_requests: at least 1.

        Raises:
            ThresherError: ``num_requests`` is under 1, or ``update`` has not seen one of the requests.
        """
        require(num_requests >= 1, "num_requests must be at least 1", num_requests, "pass keys of a request")
        if self._packed is None or self._packed.num_requests != num_requests:
            self._packed = pack_pages([self.of(request) for request in range(num_requests)])
        return self._packed

    def all(self, num_requests: int) -> PackedMeans:
        """The means of requests ``0 .. num_requests - 1``, packed at most once until one of them changes.

        Raises:
            ThresherError: ``update`` has not seen one of them.
        """
        if self._all is None or len(self._all) != num_requests:
            self._all = PackedMeans(self.of(request) for request in range(num_requests))
        return self._all

    def rollback(self, request: int, length: int) -> None:
        """Forget the means of blocks that reach past the first ``length`` tokens of ``request``; 0 when its row is given to another.

        Raises:
            ThresherError: ``length`` is negative.
        """
        require(length >= 0, "length must be at least 0", length, "pass the tokens kept")
        if request in self._means:
            keep = length // self.block_size
            values, scales = self._means[request]
            if keep < scales.shape[0]:
                self._means[request] = values[:keep], scales[:keep]
                self._packed = self._all = None

    def _num_blocks(self, request: int) -> int:
        return self._means[request][1].shape[0] if request in self._means else 0

    def _append(self, request: int, values: Tensor, scales: Tensor) -> None:
        held = [self._means[request]] if request in self._means else []
        self._means[request] = join([*held, (values, scales)])
        self._packed = self._all = None
