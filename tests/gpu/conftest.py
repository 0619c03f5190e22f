"""Tests of the compiled kernels on one Hopper GPU: ``pytest tests/gpu``, with ``-n 4`` for pytest-xdist where it is installed.

THRESHER_GPU_TESTS=interpret runs them on the CPU in Triton's interpreter, at smaller sizes: a test of the tests.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from ..interpreter import mend
from .machine import DEVICE, INTERPRET

if INTERPRET:
    mend()


def why_not() -> str | None:
    """Why these tests cannot run here, or None."""
    if os.environ.get("THRESHER_GPU_TESTS") == "interpret":
        return None if INTERPRET else "THRESHER_GPU_TESTS=interpret, but TRITON_INTERPRET=0"
    if INTERPRET:
        return "Triton is interpreting: run these by themselves, pytest tests/gpu"
    return None if torch.cuda.is_available() else "needs a CUDA device"


def pytest_collection_modifyitems(items):
    why = why_not()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if why:
                item.add_marker(pytest.mark.skip(reason=why))


GUARD, GUARD_BYTES = 0x5A, 256


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel is given to fill holds 0xFF, NaN or -1 in every type, and behind its end a guard that must stay."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    guards = []

    def poison(made):
        if not made.numel() or made.is_meta:
            return made
        size = made.numel() * made.element_size()
        whole = empty(size + GUARD_BYTES, dtype=torch.uint8, device=made.device)
        whole[:size].fill_(0xFF)
        guards.append(whole[size:].fill_(GUARD))
        return whole[:size].view(made.dtype).view(made.shape)

    monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: poison(empty(*size, **kwargs)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size, **kwargs: poison(new_empty(self, *size, **kwargs)))
    yield
    assert all(bool((guard == GUARD).all()) for guard in guards), "a kernel wrote past the end of its memory"


@pytest.fixture(autouse=True)
def context_outlives_the_test(request):
    """A bad access ends a process's CUDA context, and with it every later test: a worker of xdist ends too, and is replaced."""
    yield
    if DEVICE.type != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{request.node.nodeid} broke the CUDA context: {error}", file=sys.stderr, flush=True)
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(70)
        pytest.exit("the CUDA context is lost; with pytest-xdist, -n 1 goes on", returncode=1)


def pytest_terminal_summary(terminalreporter):
    """What tests measured: ``record_property("measured", text)``."""
    reports = [report for name in ("passed", "failed") for report in terminalreporter.stats.get(name, ())]
    lines = sorted(str(value) for report in reports for name, value in report.user_properties if name == "measured")
    if lines:
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.write_line(line)
