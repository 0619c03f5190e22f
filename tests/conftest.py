"""How Triton runs is settled here, before anything imports it (transformers does).

Interpreted, on the CPU; but compiled where nothing else than tests of tests/gpu is asked for (``pytest tests/gpu``), unless
THRESHER_GPU_TESTS=interpret. A TRITON_INTERPRET that is set already stays.
"""

import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


def names_gpu_tests_alone(arguments: list[str]) -> bool:
    """Whether tests are named on a command line, and all of them in tests/gpu."""
    paths = [Path(argument.split("::")[0]).resolve() for argument in arguments if not argument.startswith("-")]
    named = [path for path in paths if path.exists() and path.is_relative_to(TESTS)]
    return bool(named) and all(path.is_relative_to(TESTS / "gpu") for path in named)


# Workers of pytest-xdist see another command line, but inherit the variable.
compiled = names_gpu_tests_alone(sys.argv[1:]) and os.environ.get("THRESHER_GPU_TESTS") != "interpret"
os.environ.setdefault("TRITON_INTERPRET", "0" if compiled else "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # a core is each worker's own; more threads than cores would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: one that came last would keep one worker busy while the others have nothing left."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
