"""The package's outer promises: imports point one way, importing is cheap and touches no GPU, the public names are few."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import thresher

ROOT = Path(thresher.__file__).parent
# A module may import from its own level or a lower one; two neighbours of one level are listed together.
LEVELS = (
    ("errors",),
    ("checks", "cuda"),
    ("types",),
    ("cache",),
    ("ops",),
    ("selectors",),
    ("distributed",),
    ("models",),
    ("train", "integrations", "eval", "bench"),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imported_parts(path: Path, root: Path) -> set[str]:
    """First-level parts of ``thresher`` that a file imports, wherever in the file the import stands."""
    package = ("thresher", *path.relative_to(root).parent.parts)
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names += [f"{module}.{alias.name}" for alias in node.names] if module == "thresher" else [module]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            names += [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return {name.split(".")[1] for name in names if name.startswith("thresher.")}


def wrong_imports(path: Path, root: Path) -> list[str]:
    own = path.relative_to(root).parts[0].removesuffix(".py")
    assert own in LEVEL, f"{own} has no level in this test: decide which parts it may import"
    return [f"{path.relative_to(root)} imports {part}" for part in imported_parts(path, root) if LEVEL.get(part, 99) > LEVEL[own]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    assert wrong_imports(path, ROOT) == []


@pytest.mark.parametrize(
    "line",
    [
        "import thresher.ops.merge",
        "from thresher.selectors import DSA",
        "from thresher import models",
        "from ..ops import merge",
        "def f():\n    from thresher import eval",
        "import_module('thresher.train.warmup')",
    ],
)
def test_a_wrong_import_is_seen(tmp_path, line):
    path = tmp_path / "cache" / "pages.py"
    path.parent.mkdir()
    path.write_text(f"from thresher.errors import require\n{line}\n")
    assert len(wrong_imports(path, tmp_path)) == 1


def test_public_names_are_few_and_resolve_to_objects():
    assert len(thresher.__all__) <= 15
    assert set(thresher.__all__) <= set(dir(thresher))
    for name in thresher.__all__:
        value = getattr(thresher, name)
        assert not isinstance(value, ModuleType), f"thresher.{name} is a module: the name of a folder hides the function"
    with pytest.raises(AttributeError, match="nothing_like_this"):
        thresher.nothing_like_this  # noqa: B018


PROBE = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import thresher
seconds = time.perf_counter() - start
new = [name for name in set(sys.modules) - before if name.startswith("thresher.")]
print(json.dumps({"seconds": seconds, "cuda": torch.cuda.is_initialized(), "loaded": new}))
"""


def test_import_is_cheap_lazy_and_leaves_the_gpu_alone():
    runs = [json.loads(subprocess.run([sys.executable, "-c", PROBE], capture_output=True, check=True, text=True).stdout) for _ in range(3)]
    assert sorted(run["seconds"] for run in runs)[1] <= 0.2
    assert not any(run["cuda"] for run in runs)
    assert all(run["loaded"] == [] for run in runs), "a public name was resolved before anyone asked for it"
