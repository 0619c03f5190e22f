"""A counter-based hash: the same inputs give the same value on any device, in any batch."""

from __future__ import annotations

from torch import Tensor

MASK = 0xFFFFFFFF


def mix32(x: Tensor) -> Tensor:
    """A bijection of 32-bit values (held in int64) that spreads every bit: two rounds of xor-shift and odd multiply.

    Both constants are below 2**31, so no product of the signed 64-bit arithmetic overflows.
    """
    x = x & MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x6C8E9CF5) & MASK
    return x ^ (x >> 16)


def hash_counters(first: Tensor, *rest: Tensor) -> Tensor:
    """One 32-bit hash of several int64 counters (broadcast together), their order included. Counts above 2**32 wrap."""
    h = mix32(first)
    for counter in rest:
        h = mix32(h + mix32(counter + 0x1B873593))
    return h


def hash_scores(h: Tensor) -> Tensor:
    """The high 24 bits of a hash as fp32, exact: uniform scores to rank by."""
    return (h >> 8).float()
