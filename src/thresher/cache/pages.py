"""One page allocator for all requests, and the step from positions to slots (``slot = page * page_size + offset``)."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from thresher.errors import require


def check_slots(slots: Tensor, num_slots: int) -> None:
    """Raise ``ThresherError`` unless ``slots`` is int64 and every entry lies in ``[0, num_slots)``."""
    require(slots.dtype == torch.int64, "slots must be int64", slots.dtype, "convert it")
    if slots.numel():
        low, high = (int(x) for x in torch.aminmax(slots))
        require(
            low >= 0 and high < num_slots,
            f"slots must lie in [0, {num_slots})",
            f"{low}..{high}",
            "take them from a PageTable of this size",
        )


class PageTable:
    """Which pages each request holds. Pages are handed out smallest free first, so equal calls give equal slots.

    ``table`` (int32 ``[B, max_pages]``, -1 where unused) and ``lengths`` (int64 ``[B]``) are snapshots: a later call replaces them
    and never writes into a tensor handed out before. ``table`` grows in width as needed and has at least one column.

    Args:
        num_requests: rows B.
        num_pages: pages shared by all requests.
        page_size: tokens in a page.
        device: where ``table``, ``lengths`` and slots live; the free list is on the host.
    """

    def __init__(self, num_requests: int, num_pages: int, page_size: int = 64, device: torch.device | str = "cpu") -> None:
        require(num_requests >= 1, "num_requests must be at least 1", num_requests, "pass the number of rows")
        require(num_pages >= 0, "num_pages must be at least 0", num_pages, "pass the number of pages")
        require(page_size >= 1, "page_size must be at least 1", page_size, "64 is usual")
        self.page_size = page_size
        self.num_pages = num_pages
        self.table = torch.full((num_requests, 1), -1, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(num_requests, dtype=torch.int64, device=device)
        self._free = list(range(num_pages))
        self._held: list[list[int]] = [[] for _ in range(num_requests)]
        self._length = [0] * num_requests

    @property
    def num_requests(self) -> int:
        return len(self._held)

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    def length(self, request: int) -> int:
        """Tokens held for ``request``, without asking the device."""
        self._check_request(request)
        return self._length[request]

    def append(self, request: int, num_tokens: int) -> Tensor:
        """Make room for ``num_tokens`` after the last token of ``request``.

        Returns:
            int64 ``[num_tokens]``: their slots.

        Raises:
            ThresherError: no such request, a negative count, or too few free pages (nothing changes then).
        """
        self._check_request(request)
        require(num_tokens >= 0, "num_tokens must be at least 0", num_tokens, "use rollback to cut")
        held, start = self._held[request], self._length[request]
        end = start + num_tokens
        need = -(-end // self.page_size) - len(held)
        do = "free or roll back a request, or make the cache larger"
        require(need <= len(self._free), f"request {request} needs {need} more pages", f"{len(self._free)} free of {self.num_pages}", do)
        if need > 0:
            new = [heapq.heappop(self._free) for _ in range(need)]
            self._write_row(request, len(held), new)
            held.extend(new)
        self._set_length(request, end)
        return self._to_slots(request, torch.arange(start, end, device=self.table.device))

    def rollback(self, request: int, length: int) -> None:
        """Keep the first ``length`` tokens of ``request`` and free the pages that lie wholly past them.

        Raises:
            ThresherError: no such request, or ``length`` is negative or longer than what is held.
        """
        self._check_request(request)
        now = self._length[request]
        require(0 <= length <= now, f"rollback length must lie in [0, {now}]", length, "use append to grow")
        keep = -(-length // self.page_size)
        gone = self._held[request][keep:]
        if gone:
            del self._held[request][keep:]
            for page in gone:
                heapq.heappush(self._free, page)
            self._write_row(request, keep, [-1] * len(gone))
        self._set_length(request, length)

    def free(self, request: int) -> None:
        """Give back every page of ``request``; its row can serve a new request."""
        self.rollback(request, 0)

    def slots(self, request: int, positions: Tensor) -> Tensor:
        """Slots of logical positions.

        Args:
            positions: int64 or int32, any shape, each in ``[0, length)`` or -1.

        Returns:
            int64, the same shape; -1 stays -1.

        Raises:
            ThresherError: no such request, or a position the request does not hold.
        """
        self._check_request(request)
        positions = positions.to(self.table.device, torch.int64)
        if positions.numel():
            low, high = (int(x) for x in torch.aminmax(positions))
            now = self._length[request]
            require(
                low >= -1 and high < now,
                f"positions of request {request} must lie in [0, {now}), or be -1",
                f"{low}..{high}",
                "append first",
            )
        return self._to_slots(request, positions).masked_fill(positions < 0, -1)

    def _to_slots(self, request: int, positions: Tensor) -> Tensor:
        pages = self.table[request].to(torch.int64)[positions.clamp_min(0) // self.page_size]
        return pages * self.page_size + positions % self.page_size

    def _write_row(self, request: int, first: int, pages: list[int]) -> None:
        width = max(self.table.shape[1], first + len(pages))
        table = self.table.new_full((self.num_requests, width), -1)
        table[:, : self.table.shape[1]] = self.table
        table[request, first : first + len(pages)] = torch.tensor(pages, dtype=torch.int32, device=table.device)
        self.table = table

    def _set_length(self, request: int, length: int) -> None:
        self._length[request] = length
        self.lengths = self.lengths.clone()
        self.lengths[request] = length

    def _check_request(self, request: int) -> None:
        require(0 <= request < self.num_requests, f"request must lie in [0, {self.num_requests})", request, "pass a row of the table")
