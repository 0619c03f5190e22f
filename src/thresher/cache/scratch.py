"""What launches of a step hand on: memory that each leaves as it found it, in zeros, and words that one is to send for another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Scratch:
    """Zeros for kernels whose launches follow one another on one stream: of a layer, or of all layers of a model.

    It grows outside of CUDA graphs, and what it once gave stays allocated, since a graph may hold it.

    Attributes:
        errand: an ``ops.send.Send``, for the next selection that has a warp to spare: it sends that beside its work, and ends when what
            the other ranks sent has come.
    """

    errand: Any = field(default=None, repr=False)
    _held: dict[torch.device, list[Tensor]] = field(default_factory=dict, repr=False)

    def zeros(self, words: int, device: torch.device) -> Tensor:
        """int32 zeros, at least ``words`` of them, which whoever asks leaves as zeros.

        Where it must grow while a graph is recorded, they are that graph's own, cleared by each replay.
        """
        held = self._held.setdefault(device, [])
        if held and len(held[-1]) >= words:
            return held[-1]
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return torch.zeros(words, dtype=torch.int32, device=device)
        held.append(torch.zeros(max(words, 2 * len(held[-1]) if held else 0), dtype=torch.int32, device=device))
        return held[-1]

    def take_errand(self) -> Any:
        """The errand, whoever asks being the one who does it."""
        errand, self.errand = self.errand, None
        return errand
