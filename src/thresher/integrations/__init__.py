"""Selectors inside models of other libraries."""

from thresher.integrations.transformers import use

__all__ = ["use"]
