"""The CUDA C++ kernels compile for Hopper, with the runtime compiler that a GPU machine uses or with nvcc, whichever is at hand."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from thresher.cuda import launch
from thresher.ops.dispatch import installed

FOLDER = Path(launch.__file__).parent
KERNELS = ((128, 64, 2, 0), (128, 64, 1, 1), (64, 16, 1, 0), (128, 32, 2, 1))
STEPS = [("step", tuple(f"STEP_{key}={x}" for key, x in zip(("DIM", "HEADS", "TEAMS", "HISA"), sizes, strict=True))) for sizes in KERNELS]
SOURCES = [(path.stem, ()) for path in sorted(FOLDER.glob("*.cu")) if path.stem != "step"] + STEPS
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.mark.skipif(not installed("cuda.bindings"), reason="needs cuda-bindings")
@pytest.mark.parametrize(("source", "defines"), SOURCES)
def test_the_runtime_compiler_takes_them(source, defines):
    assert launch.compile_source(source, "sm_90a", defines).startswith(b"\x7fELF")


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize(("source", "defines"), SOURCES)
def test_registers_suffice(source, defines, tmp_path):
    """Next to nothing is kept in local memory for want of registers, at as many rows a multiprocessor as each kernel is launched for."""
    target = ["-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
    macros = [f"-D{define}" for define in defines]
    command = [NVCC, "-std=c++17", *target, *macros, f"-I{FOLDER}", "-cubin", "-o", tmp_path / "out", FOLDER / f"{source}.cu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spilt = [int(num) for num in re.findall(r"(\d+) bytes spill stores", done.stderr)]
    assert spilt
    assert max(spilt) <= 64
