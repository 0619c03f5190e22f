"""Which rows the kernels did again, for whoever wants to know: to a caller it shows in the time alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_kept: ContextVar[list[Tensor] | None] = ContextVar("kept", default=None)


@contextmanager
def keeping_marks() -> Iterator[list[Tensor]]:
    """Inside, every run of the kernels adds its marks to the list: int32 ``[Q]``, 1 where a row was done again. None ran, none is added."""
    kept: list[Tensor] = []
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)


def keep(marks: Tensor) -> None:
    """Add a run's marks to the list that is kept, if any is."""
    kept = _kept.get()
    if kept is not None:
        kept.append(marks)
