"""The CUDA C++ kernels on a CPU, compiled by the C++ compiler at hand: see turns.h."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

from thresher.cuda import launch

HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
FAILURES = {1: "threads wait for each other forever", 2: "shared memory does not suffice", 3: "it does not come to an end"}


@cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "kernels.so"
        options = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]
        options.append("-U_FORTIFY_SOURCE")  # jumps between stacks
        folders = [f"-I{HERE}", f"-I{Path(launch.__file__).parent}"]
        done = subprocess.run([COMPILER, *options, *folders, "-o", built, HERE / "host.cpp"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        assert not done.stderr, done.stderr[-4000:]
        return ctypes.CDLL(str(built))


def in_order(order: int):
    """What takes the place of ``launch.launch``; ``order`` 0: threads in order, 1: backwards, else shuffled by it."""

    def run(source, name, arguments, grid, threads, shared, device, together=False, defines=()) -> None:
        kernel = "_".join([name, *(define.split("=")[1] for define in defines if "HISA" not in define)])
        failed = getattr(library(), f"run_{kernel}")(grid, threads, shared, order, ctypes.byref(arguments))
        assert not failed, FAILURES[failed]

    return run
