"""Placements as text, for command lines: ``idsa:ranks=4``, ``exact:ranks=4,granularity=64``, ``replicated:ranks=2``, ``single``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from thresher.distributed.exact import ExactMerge
from thresher.distributed.idsa import IDSA
from thresher.distributed.simulate import OverRanks
from thresher.distributed.single import Replicated, Single
from thresher.selectors.base import Selector
from thresher.selectors.parse import parse_named

PLACEMENTS: Mapping[str, type[Any]] = MappingProxyType({"single": Single, "replicated": Replicated, "idsa": IDSA, "exact": ExactMerge})


def place(text: str, selectors: Iterable[Selector], ranks: int | None = None) -> list[OverRanks]:
    """Each of ``selectors`` (one a layer) in the placement that ``text`` describes, over ``ranks`` where it does not say how many.

    Raises:
        ThresherError: an unknown placement or option, or a value it refuses (such as ``local_topk * ranks < topk``).
    """
    defaults = {} if ranks is None else {"ranks": ranks}
    return [parse_named(text, PLACEMENTS, "a placement", {"selector": selector}, defaults) for selector in selectors]
