"""Kernels run in Triton's interpreter here, on a CPU.

The flag that says so is set in tests/conftest.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from ..interpreter import mend

mend()


@pytest.fixture(scope="session")
def compile_for_hopper():
    """``compile_for_hopper(code)``: the kernels that ``code`` would launch, compiled for sm_90 (see compile.py).

    Each has name, shared (bytes), num_warps, ptx and, where cuobjdump is at hand, registers and stack (bytes a thread).
    """

    def run(code: str) -> list[SimpleNamespace]:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        script = Path(__file__).with_name("compile.py")
        done = subprocess.run([sys.executable, str(script)], input=code, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-4000:]
        return [SimpleNamespace(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]

    return run
