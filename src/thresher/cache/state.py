"""What a selector keeps between steps and layers; passed in, so selectors stay frozen values."""

from __future__ import annotations

from dataclasses import dataclass, field

from thresher.cache.block_means import BlockMeans, Grow
from thresher.cache.scratch import Scratch
from thresher.types import Selection


@dataclass
class LayerState:
    """One layer's state on one rank, grown with its cache and cut back with it.

    Attributes:
        layer: index of the layer.
        selections: layer -> selection of the current step; one dict shared by every layer of the model.
        scratch: for kernels of a step; it may be one for every layer, if their steps follow one another on one stream.
    """

    layer: int
    selections: dict[int, Selection] = field(default_factory=dict)
    scratch: Scratch = field(default_factory=Scratch)
    _means: dict[int, BlockMeans] = field(default_factory=dict, init=False, repr=False)

    def block_means(self, block_size: int, grow: Grow) -> BlockMeans:
        """The cached means of blocks of ``block_size`` tokens, made on first use with ``grow`` and kept.

        Raises:
            ThresherError: ``block_size`` is under 1.
        """
        if block_size not in self._means:
            self._means[block_size] = BlockMeans(block_size, grow)
        return self._means[block_size]

    def rollback(self, request: int, length: int) -> None:
        """Cut everything kept for ``request`` back to its first ``length`` tokens; the selections of the step are dropped."""
        for means in self._means.values():
            means.rollback(request, length)
        self.selections.clear()
