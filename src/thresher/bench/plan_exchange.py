"""How long ranks take to exchange bytes: measured between two GPUs, carried over to more, and to a link between nodes that is given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from thresher.bench.plan_fit import non_negative
from thresher.errors import require

KIB = 1024
# Key of ``MEASURED`` -> what records call it.
KINDS = {"symmetric": "symmetric memory", "nccl": "NCCL"}
# us, by the bytes that a rank has from the other, of 1, 8 and 32 requests as tests/gpu/test_two_gpus.py times them: bf16 queries gathered;
# bf16 outputs with fp32 log-sum-exps exchanged and merged. The time in which ranks wait for one another is in them.
SOURCE = "two H200 of one host, NVLink, PyTorch 2.11, CUDA graphs of 16, means of both ranks' medians, 2026-11-30"
_QUERIES, _OUTPUTS = ([requests * each for requests in (1, 8, 32)] for each in (64 * 1152, 64 * 1028))
MEASURED = {
    "symmetric": {
        "gather": dict(zip(_QUERIES, (5.9, 7.6, 15.6), strict=True)),
        "merge": dict(zip(_OUTPUTS, (3.9, 8.3, 15.0), strict=True)),
    },
    "nccl": {
        "gather": dict(zip(_QUERIES, (9.1, 14.7, 33.8), strict=True)),
        "merge": dict(zip(_OUTPUTS, (26.6, 41.9, 83.2), strict=True)),
    },
}


def kind_of(settings: Mapping[str, Any]) -> str | None:
    """The key of ``MEASURED`` that a record's exchange has; None of one that is not among them."""
    return next((kind for kind, called in KINDS.items() if called == settings.get("exchange")), None)


@dataclass(frozen=True)
class Exchange:
    """How ranks exchange: every rank has some bytes from each of the others.

    Methods take the part of a step that an exchange is: "gather", "merge", or "candidates", which are gathered as queries are.

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

    def measured(self, part: str) -> dict[int, float]:
        """Bytes -> us, of the one that is timed for this part."""
        return MEASURED[self.kind]["gather" if part == "candidates" else part]

    def coefficients(self, part: str) -> tuple[float, float]:
        """Of a fit to what was measured: us of an exchange however small, and us a byte."""
        measured = self.measured(part)
        fixed, slope = non_negative([(1.0, float(size)) for size in measured], list(measured.values()))
        return fixed, slope

    def time_us(self, part: str, bytes_each: float) -> float:
        """``a + b * bytes`` from the ranks of this node, then ``latency + bytes / bandwidth`` from the others; 0 for one rank.

        Args:
            part: which exchange.
            bytes_each: what a rank has from each other rank.
        """
        if self.ranks == 1:
            return 0.0
        near = self.ranks // self.nodes
        fixed, slope = self.coefficients(part)
        time = fixed + slope * bytes_each * (near - 1)
        if self.latency_us is not None and self.bandwidth is not None:
            time += self.latency_us + 1e6 * bytes_each * (self.ranks - near) / self.bandwidth
        return time

    def outside(self, part: str, bytes_each: float) -> list[str]:
        """In what this exchange is not one that was measured."""
        sizes, near = list(self.measured(part)), self.ranks // self.nodes
        received = bytes_each * (near - 1)
        found = [] if self.ranks == 2 and self.nodes == 1 else [f"{self.ranks} ranks, measured 2"]
        found += [] if self.nodes == 1 else ["the link between nodes, as given"]
        if near > 1 and not sizes[0] <= received <= sizes[-1]:
            found.append(f"{received / KIB:.0f} KiB, measured {sizes[0] // KIB} to {sizes[-1] // KIB}")
        return found
