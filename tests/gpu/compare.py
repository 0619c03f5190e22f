"""Differences in words: which row, which index, got and want. Every function returns None where there is none."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def fail_on(problems: Iterable[str | None]) -> None:
    """One failure that names every problem."""
    found = [problem for problem in problems if problem]
    assert not found, f"{len(found)} problems\n" + "\n".join(found[:20])


def bits(x: Tensor) -> Tensor:
    """The bytes' integers, in x's shape."""
    widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(widths[x.element_size()])


def differ(what: str, got: Tensor, want: Tensor) -> str | None:
    """Other bits, another shape or another type."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{what}: {got.dtype} {tuple(got.shape)}, want {want.dtype} {tuple(want.shape)}"
    return _where(what, bits(got) != bits(want), got, want)


def differ_all(what: str, got: Iterable[Tensor], want: Iterable[Tensor]) -> list[str | None]:
    """``differ`` of each pair."""
    return [differ(f"{what}, result {i}", *pair) for i, pair in enumerate(zip(got, want, strict=True))]


def exceed(what: str, got: Tensor, want: Tensor, bound: Tensor | float) -> str | None:
    """More than ``bound`` (broadcast) apart, or not finite where the other is, in fp64."""
    if got.shape != want.shape:
        return f"{what}: {tuple(got.shape)}, want {tuple(want.shape)}"
    x, y = got.double(), want.double()
    same = (x == y) | (x.isnan() & y.isnan())
    return _where(what, ~(same | ((x - y).abs() <= bound)), got, want)


def dissimilar(what: str, got: Tensor, want: Tensor, most: float) -> str | None:
    """``1 - 2<x, y> / (<x, x> + <y, y>)`` of the finite part is over ``most``, or other places are finite."""
    x, y = got.double(), want.double()
    finite = y.isfinite()
    off_mask = _where(f"{what}, finite or not", x.isfinite() != finite, got, want)
    if off_mask:
        return off_mask
    off = dissimilarity(x[finite], y[finite])
    return f"{what}: off by {off:.3g}, over {most:.3g}" if not off <= most else None


def dissimilarity(x: Tensor, y: Tensor) -> float:
    """DeepGEMM's measure, 0 for equal vectors."""
    x, y = x.double().flatten(), y.double().flatten()
    size = float(x @ x + y @ y)
    return 1 - 2 * float(x @ y) / size if size else 0.0


def _where(what: str, wrong: Tensor, got: Tensor, want: Tensor) -> str | None:
    if not bool(wrong.any()):
        return None
    at = tuple(wrong.nonzero()[0].tolist())
    values = [x.float()[at].item() if x.is_floating_point() else x[at].item() for x in (got, want)]
    return f"{what}: {int(wrong.sum())} of {wrong.numel()} differ; first at {list(at)}: got {values[0]!r}, want {values[1]!r}"
