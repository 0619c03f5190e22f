"""How long ranks take to exchange bytes: measured between two GPUs, carried over to more, and to a link between nodes that is given."""

from __future__ import annotations

import math
from dataclasses import dataclass

from thresher.bench.plan_fit import non_negative
from thresher.errors import require

KIB = 1024
# us, by the bytes that a rank has from the other, as tests/gpu/test_two_gpus.py times them: queries gathered, and over symmetric memory
# outputs merged, of 1, 8 and 32 requests. The time in which ranks wait for one another is in them.
SOURCE = "two H200 of one host, NVLink, PyTorch 2.11, CUDA graphs of 16, medians, 2026-11-30"
MEASURED = {
    "symmetric": {72 * KIB: 5.9, 131328: 7.2, 576 * KIB: 7.5, 1050624: 9.8, 2304 * KIB: 15.2, 4202496: 19.8},
    "nccl": {72 * KIB: 8.8, 576 * KIB: 13.4, 2304 * KIB: 30.0},
}


@dataclass(frozen=True)
class Exchange:
    """One exchange: every rank has some bytes from each of the others.

    Attributes:
        ranks: GPUs, all nodes together.
        nodes: hosts with the same number of them each.
        kind: a key of ``MEASURED``.
        latency_us, bandwidth: of the link between nodes: microseconds, and bytes a second for each GPU; None on one node.

    Raises:
        ThresherError: nodes that do not divide ranks, several nodes without a link, or a link without nodes.
    """

    ranks: int
    nodes: int = 1
    kind: str = "symmetric"
    latency_us: float | None = None
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        fits = self.nodes >= 1 and self.ranks % self.nodes == 0
        require(fits, f"nodes must divide {self.ranks} GPUs", self.nodes, "--gpus counts the GPUs of all nodes")
        require(self.kind in MEASURED, f"the exchange must be one of {', '.join(MEASURED)}", repr(self.kind), "choose another")
        link = (self.latency_us, self.bandwidth)
        if self.nodes == 1:
            require(link == (None, None), "a link's latency and bandwidth must come with several nodes", link, "give --nodes")
        else:
            must = "several nodes need the link's latency of 0 us or more and its bandwidth above 0"
            latency, bandwidth = (math.nan if value is None else value for value in link)
            given = 0 <= latency < math.inf and 0 < bandwidth < math.inf
            require(given, must, link, "give --link-latency-us and --link-bandwidth-gbs")

    def coefficients(self) -> tuple[float, float]:
        """Of a fit to ``MEASURED``: us of an exchange however small, and us a byte."""
        fixed, slope = non_negative([(1.0, float(size)) for size in MEASURED[self.kind]], list(MEASURED[self.kind].values()))
        return fixed, slope

    def time_us(self, bytes_each: float) -> float:
        """``a + b * bytes`` from the ranks of this node, then ``latency + bytes / bandwidth`` from the others; 0 for one rank.

        Args:
            bytes_each: what a rank has from each other rank.
        """
        if self.ranks == 1:
            return 0.0
        near = self.ranks // self.nodes
        fixed, slope = self.coefficients()
        time = fixed + slope * bytes_each * (near - 1)
        if self.latency_us is not None and self.bandwidth is not None:
            time += self.latency_us + 1e6 * bytes_each * (self.ranks - near) / self.bandwidth
        return time

    def outside(self, bytes_each: float) -> list[str]:
        """In what this exchange is not one that was measured."""
        sizes, near = list(MEASURED[self.kind]), self.ranks // self.nodes
        received = bytes_each * (near - 1)
        found = [] if self.ranks == 2 and self.nodes == 1 else [f"{self.ranks} ranks, measured 2"]
        found += [] if self.nodes == 1 else ["the link between nodes, as given"]
        if near > 1 and not sizes[0] <= received <= sizes[-1]:
            found.append(f"{received / KIB:.0f} KiB, measured {sizes[0] // KIB} to {sizes[-1] // KIB}")
        return found
