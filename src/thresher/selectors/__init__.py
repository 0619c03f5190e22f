"""Selectors: which tokens each query attends to. One method, one file."""

from thresher.selectors.base import Selector
from thresher.selectors.dense import Dense
from thresher.selectors.dsa import DSA
from thresher.selectors.hisa import HISA
from thresher.selectors.misa import MISA
from thresher.selectors.misa_controls import MISARandom, MISAStatic
from thresher.selectors.misa_rerank import MISARerank
from thresher.selectors.oracle import Oracle
from thresher.selectors.parse import SELECTORS, parse, to_text
from thresher.selectors.plan import LayerPlan
from thresher.selectors.random import Random
from thresher.selectors.shared import Shared
from thresher.selectors.window import Window

__all__ = [
    "DSA",
    "HISA",
    "MISA",
    "SELECTORS",
    "Dense",
    "LayerPlan",
    "MISARandom",
    "MISARerank",
    "MISAStatic",
    "Oracle",
    "Random",
    "Selector",
    "Shared",
    "Window",
    "parse",
    "to_text",
]
