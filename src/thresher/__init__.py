"""Thresher decides which tokens of a long context a DSA model attends to.

The public names are resolved on first use (PEP 562), so importing the package costs nothing beyond Python's own machinery
and touches no GPU.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thresher.distributed import IDSA, ExactMerge
    from thresher.eval.recall import recall
    from thresher.integrations import use
    from thresher.ops import sparse_attend
    from thresher.selectors import DSA, HISA, MISA, Dense, LayerPlan, MISARerank
    from thresher.types import IndexKeys, IndexQuery, PartialAttention, Selection

__version__ = "0.1.0"

_HOME = {
    "IndexQuery": "thresher.types",
    "IndexKeys": "thresher.types",
    "Selection": "thresher.types",
    "PartialAttention": "thresher.types",
    "Dense": "thresher.selectors",
    "DSA": "thresher.selectors",
    "MISA": "thresher.selectors",
    "MISARerank": "thresher.selectors",
    "HISA": "thresher.selectors",
    "LayerPlan": "thresher.selectors",
    "IDSA": "thresher.distributed",
    "ExactMerge": "thresher.distributed",
    "sparse_attend": "thresher.ops",
    "recall": "thresher.eval.recall",
    "use": "thresher.integrations",
}

__all__ = [
    "DSA",
    "HISA",
    "IDSA",
    "MISA",
    "Dense",
    "ExactMerge",
    "IndexKeys",
    "IndexQuery",
    "LayerPlan",
    "MISARerank",
    "PartialAttention",
    "Selection",
    "recall",
    "sparse_attend",
    "use",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'thresher' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
