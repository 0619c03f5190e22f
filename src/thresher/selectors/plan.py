"""Which selector each layer of a model uses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from thresher.errors import require
from thresher.selectors.base import Selector
from thresher.selectors.parse import SELECTORS, parse, to_text
from thresher.selectors.shared import Shared

ENTRY = re.compile(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*=(.*)", re.DOTALL)


@dataclass(frozen=True)
class LayerPlan:
    """One selector per layer: dense here, DSA there, shared with an earlier layer elsewhere.

    Attributes:
        layers: the selector of each layer, in order. A ``Shared`` points to an earlier layer that is not itself shared.
    """

    layers: tuple[Selector, ...]

    def __post_init__(self) -> None:
        require(len(self.layers) > 0, "a LayerPlan must have at least one layer", "none", "pass one selector per layer")
        for i, selector in enumerate(self.layers):
            if isinstance(selector, Shared):
                source = selector.layer
                must = f"layer {i} must share with an earlier layer that is not itself shared"
                ok = source < i and not isinstance(self.layers[source], Shared)
                require(ok, must, f"layer={source}", "point it at the layer that selects")

    @classmethod
    def uniform(cls, selector: Selector, num_layers: int) -> LayerPlan:
        """The same selector in each of ``num_layers`` layers."""
        return cls((selector,) * num_layers)

    @classmethod
    def from_text(
        cls,
        text: str,
        num_layers: int,
        selectors: Mapping[str, type[Selector]] = SELECTORS,
        defaults: Mapping[str, object] = MappingProxyType({}),
    ) -> LayerPlan:
        """A plan such as ``0-1=dense;2-29=dsa:topk=512;5=shared:layer=4``.

        Args:
            text: entries ``layer=selector`` or ``first-last=selector`` (both ends included), parted by ``;``. Later entries win.
            num_layers: layers of the model; each must be covered, and no entry may go past them.
            selectors: names and classes, as in ``parse``.
            defaults: as in ``parse``.

        Raises:
            ThresherError: an entry that cannot be read, a layer out of range or left out, or a selector ``parse`` refuses.
        """
        layers: dict[int, Selector] = {}
        for entry in filter(str.strip, text.split(";")):
            match = ENTRY.fullmatch(entry)
            require(match is not None, "a plan entry must be layer=selector or first-last=selector", repr(entry.strip()), "write 0-1=dense")
            assert match is not None
            first, last = int(match[1]), int(match[2] or match[1])
            bounds = f"layers of an entry must be ascending and below {num_layers}"
            require(first <= last < num_layers, bounds, repr(entry.strip()), f"name layers 0-{num_layers - 1}")
            selector = parse(match[3], selectors, defaults)
            layers.update(dict.fromkeys(range(first, last + 1), selector))
        missing = [i for i in range(num_layers) if i not in layers]
        require(
            not missing, f"each of the {num_layers} layers must have a selector", f"none for {missing}", "add an entry such as 0-1=dense"
        )
        return cls(tuple(layers[i] for i in range(num_layers)))

    def to_text(self, selectors: Mapping[str, type[Selector]] = SELECTORS) -> str:
        """The text that ``from_text`` turns back into this plan, equal neighbours in one entry."""
        starts = [i for i, s in enumerate(self.layers) if i == 0 or s != self.layers[i - 1]]
        entries = []
        for first, after in zip(starts, [*starts[1:], len(self.layers)], strict=True):
            span = str(first) if after == first + 1 else f"{first}-{after - 1}"
            entries.append(f"{span}={to_text(self.layers[first], selectors)}")
        return ";".join(entries)

    def __getitem__(self, layer: int) -> Selector:
        return self.layers[layer]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Selector]:
        return iter(self.layers)
