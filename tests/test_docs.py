"""README and docs: their Python runs, prints what they say it prints, and the files they name are there."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
# add-a-selector.md has a test of its own, which looks at what its blocks define.
PAGES = sorted({ROOT / "README.md", *(ROOT / "docs").glob("*.md")} - {ROOT / "docs" / "add-a-selector.md"})
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?:    .*\n|\n(?=    ))+")
"""Block after a blank line, indented by four."""


def code_blocks(text: str) -> list[tuple[int, str, str | None]]:
    """``(first line, code, what it should print or None)`` of every Python block of a page, in order.

    Python is what a ```python fence holds, and an indented block that starts with an import. What it prints is in the ```text fence, or the
    table, that follows with nothing but blank lines between.
    """
    found = []
    for match in FENCE.finditer(text):
        if match[1] == "python":
            rest = text[match.end() :].lstrip("\n")
            table = re.match(r"(\|.*\n)+", rest)
            fence = FENCE.match(rest)
            expected = fence[2] if fence and fence[1] == "text" else table[0] if table else None
            found.append((match.start(2), match[2], expected))
    prose = FENCE.sub(lambda m: "\n" + " " * (len(m[0]) - 2) + "\n" if len(m[0]) > 1 else m[0], text)
    for match in INDENTED.finditer(prose):
        code = re.sub(r"^    ", "", match[0], flags=re.MULTILINE)
        if re.match(r"\s*(from \S+ import|import) ", code):
            found.append((match.start(), code, None))
    return [(text[:start].count("\n"), code, expected) for start, code, expected in sorted(found)]


def run_page(page: Path) -> None:
    """Run a page's blocks in one namespace; an error carries the page's own line number."""
    # Dataclasses look their module up by name, so the page needs one.
    module = types.ModuleType("page_" + page.stem.replace("-", "_"))
    sys.modules[module.__name__] = module
    try:
        with torch.random.fork_rng(devices=[]):
            for line, code, expected in code_blocks(page.read_text()):
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(compile("\n" * line + code, str(page), "exec"), vars(module))
                if expected is not None:
                    assert printed.getvalue() == expected, f"{page.name}:{line + 1} prints something else than the page says"
    finally:
        del sys.modules[module.__name__]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page):
    run_page(page)


def test_pages_that_must_have_code_have_it():
    counts = {page.name: len(code_blocks(page.read_text())) for page in PAGES}
    assert {name for name, count in counts.items() if count} >= {"README.md", "formats.md", "numerics.md"}


def named_paths(page: Path) -> list[str]:
    """Files and folders that a page names: link targets, code spans that look like one, and the names of a layout tree."""
    text = page.read_text()
    links = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    spans = re.findall(r"`([\w.-]+(?:/[\w.-]+)+/?|[\w-]+/|[\w-]+\.(?:py|md|toml))`", FENCE.sub("", text))
    # Runs are what the program writes, not part of the project.
    return links + [span for span in spans if not span.startswith("runs/")] + tree_paths(text)


def tree_paths(text: str) -> list[str]:
    """Paths of the indented blocks whose first line is a folder: a name or several, then two spaces and what it is."""
    found = []
    for block in INDENTED.findall(FENCE.sub("", text)):
        lines = [line for line in block.splitlines() if line]
        if lines and re.match(r" +[\w/]+/( |$)", lines[0]):
            parents: list[tuple[int, str]] = []
            for line in lines:
                depth = len(line) - len(line.lstrip())
                parents = [parent for parent in parents if parent[0] < depth]
                base = parents[-1][1] if parents else ""
                names = re.split(r"  +", line.strip())[0].split(", ")
                found += [base + name for name in names]
                parents.append((depth, base + names[0]))
    return found


def is_there(name: str, page: Path) -> bool:
    """A path from the root, the page's folder or the package; a bare ``name.py`` may stand anywhere in the project."""
    if any((base / name).exists() for base in (ROOT, page.parent, ROOT / "src" / "thresher")):
        return True
    return "/" not in name and any(any((ROOT / top).rglob(name)) for top in ("src", "tests"))


@pytest.mark.parametrize("page", sorted({*PAGES, ROOT / "docs" / "add-a-selector.md"}), ids=lambda page: page.name)
def test_the_files_a_page_names_exist(page):
    assert [name for name in named_paths(page) if not is_there(name, page)] == []


def test_paths_are_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("See [a](gone.md), `gone/x.py`, `gone.py`, `runs/demo/`, `a / b`.\n\n    src/gone/\n      x.py, y.py   two\n\nEnd.\n")
    names = ["gone.md", "gone/x.py", "gone.py", "src/gone/", "src/gone/x.py", "src/gone/y.py"]
    assert sorted(named_paths(page)) == sorted(names)
    assert not any(is_there(name, page) for name in names)


HOMES = (
    "ops", "ops.sparse_attend.compiled", "cache", "selectors", "selectors.compiled", "distributed", "distributed.group", "models.decoder",
    "models.dsa_decoder", "models.indexer", "eval.probe", "eval.recall", "integrations",
)  # fmt: skip
SIGNATURE = re.compile(r"(?<![\w.])(\.?\w+)\(((?:[^()]|\([^()]*\))*)\)")
FACTORY = "<factory>"


def signature(target: Any, written: list[str]) -> list[str]:
    """Parameters as ``name`` or ``name=default``; those with a default made afresh may be left out."""
    out = []
    for p in inspect.signature(target).parameters.values():
        made = repr(p.default) == FACTORY
        if p.name != "self" and not (made and p.name not in written):
            out.append(p.name if made or p.default is p.empty else f"{p.name}={p.default!r}".replace("'", '"'))
    return out


def test_the_signatures_of_the_design_page_are_the_code_s():
    """In indented blocks: ``name(...)`` is found by its name, ``.name(...)`` belongs to the class last named."""
    known = {name: value for home in HOMES for name, value in vars(importlib.import_module(f"thresher.{home}")).items()}
    wrong, seen, owner = [], 0, None
    for line in (ROOT / "docs" / "design.md").read_text().splitlines():
        if not line.startswith("    "):
            continue
        owner = known.get(line.strip(), owner)
        calls = re.sub(r"\[[^\]]*\]", "", re.sub(r"-> \(.*?\)", "", line))  # without shapes and results
        for name, arguments in SIGNATURE.findall(calls):
            target = getattr(owner, name[1:], None) if name.startswith(".") else known.get(name)
            if target is None:
                wrong.append(f"{name} does not exist")
                continue
            owner = target if isinstance(target, type) else owner
            written = [part.strip() for part in arguments.split(",") if part.strip()]
            actual = signature(target, written)
            seen += 1
            if written != actual:
                wrong.append(f"{name}({', '.join(written)}) is {name}({', '.join(actual)})")
    assert wrong == []
    assert seen > 50
