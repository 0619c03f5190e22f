"""Which command lines compile kernels, and which interpret them (tests/conftest.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import names_gpu_tests_alone

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("line", "alone"),
    [
        ("tests/gpu", True),
        ("tests/gpu -n 4 -x", True),
        ("-q tests/gpu/test_select.py::test_slots tests/gpu/test_graphs.py", True),
        ("", False),
        ("tests", False),
        (".", False),
        ("-k gpu", False),
        ("tests/gpu tests/triton", False),
        ("tests/triton/test_select.py", False),
        ("tests/gpu_that_is_not_there", False),
    ],
)
def test_only_tests_gpu_by_itself_compiles(line, alone, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert names_gpu_tests_alone(line.split()) == alone


def test_from_another_folder(monkeypatch):
    monkeypatch.chdir(ROOT / "tests")
    assert names_gpu_tests_alone(["gpu/test_select.py"])
    assert not names_gpu_tests_alone(["triton"])
