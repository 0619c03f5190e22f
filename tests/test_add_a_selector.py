"""The steps of docs/add-a-selector.md, run as they stand."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "add-a-selector.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def page():
    """The names the page defines, after running its blocks in order."""
    text = PAGE.read_text()
    # Dataclasses look their module up by name, so the page needs one.
    module = types.ModuleType("add_a_selector_page")
    sys.modules[module.__name__] = module
    try:
        with torch.random.fork_rng():
            for match in BLOCK.finditer(text):
                line = text[: match.start(1)].count("\n")
                exec(compile("\n" * line + match[1], str(PAGE), "exec"), vars(module))
        yield module
    finally:
        del sys.modules[module.__name__]


def test_the_page_has_five_steps_each_with_code():
    steps = re.split(r"^## \d+\. ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    assert len(steps) == 5
    assert all(len(BLOCK.findall(step)) == 1 for step in steps)


def test_the_page_runs(page):
    assert page.picked.topk == 8


def test_the_new_selector_does_what_it_says(page):
    for every, recent, topk in [(1, 1, 1), (5, 3, 8), (4, 2, 4), (3, 6, 6)]:
        selection = page.Strided(every, recent, topk).select(page.prefill, page.keys)
        for position, row in enumerate(selection.indices.tolist()):
            tokens = list(range(position + 1))
            far = tokens[:-recent][::every]
            far = far[max(len(far) - (topk - recent), 0) :]
            expected = far + tokens[-recent:]
            assert row == expected + [-1] * (topk - len(expected))
