"""Which of the requests' tokens a rank holds, and in which slots."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.cache.pages import PageTable
from thresher.cache.placement import Placement
from thresher.errors import require


class PlacedTable:
    """A ``PageTable`` of the tokens that one rank holds, told of all: every rank calls it alike.

    Args:
        num_requests: B.
        capacity: tokens that each request may reach, on all ranks together.
        placement: where tokens live.
        rank: which rank this is.
        page_size: tokens in a page.
        device: as for ``PageTable``.
    """

    def __init__(
        self, num_requests: int, capacity: int, placement: Placement, rank: int, page_size: int = 64, device: torch.device | str = "cpu"
    ) -> None:
        most = int(placement.local_length(torch.tensor([capacity]), rank)[0])
        self.pages = PageTable(num_requests, num_requests * -(-most // page_size), page_size, device)
        self.capacity, self.placement, self.rank = capacity, placement, rank
        self._length = [0] * num_requests

    def length(self, request: int) -> int:
        """Tokens of ``request`` on all ranks together, without asking the device."""
        return self._length[request]

    def append(self, request: int, num_tokens: int) -> Tensor:
        """Make room for the next ``num_tokens`` of ``request``.

        Returns:
            int64 ``[num_tokens]``: their slots on this rank, -1 for those of other ranks.

        Raises:
            ThresherError: a text past the capacity; nothing changes then.
        """
        start = self._length[request]
        end = start + num_tokens
        must = f"the text of request {request} must fit its {self.capacity} tokens"
        require(end <= self.capacity, must, f"{end} tokens", "ask for a larger capacity")
        slots = self.pages.append(request, self._held(end) - self.pages.length(request))
        self._length[request] = end
        positions = torch.arange(start, end, device=slots.device)
        # By the mask alone, so that nothing waits for the device.
        return torch.full_like(positions, -1).masked_scatter(self.placement.holds(positions, self.rank), slots)

    def rollback(self, request: int, length: int) -> int:
        """Keep the first ``length`` tokens of ``request``; how many of them are held here.

        Raises:
            ThresherError: ``length`` is negative or longer than what is held.
        """
        now = self._length[request]
        require(0 <= length <= now, f"rollback length must lie in [0, {now}]", length, "use append to grow")
        held = self._held(length)
        self.pages.rollback(request, held)
        self._length[request] = length
        return held

    def slots(self, request: int, positions: Tensor) -> Tensor:
        """int64, as ``positions`` (int64, of tokens that there are): their slots on this rank, -1 for those of other ranks."""
        held = self.placement.holds(positions, self.rank)
        return self.pages.slots(request, self.placement.to_local(positions).masked_fill(~held, -1))

    def _held(self, length: int) -> int:
        """Of the first ``length`` tokens."""
        return int(self.placement.local_length(torch.tensor([length]), self.rank)[0])
