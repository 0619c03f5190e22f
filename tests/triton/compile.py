"""Compile for an H100, without one, every kernel that a piece of Python would launch.

    python compile.py < code

The code runs with ordinary CPU tensors and calls the kernels' own Python functions, so a kernel is compiled for the very arguments,
alignments and launch parameters it would have on a GPU; nothing is launched. Prints one JSON object a kernel.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread; bytes of local memory a thread (spilled registers, run-time indexed arrays); and of the innermost loops around a
    matrix product how many instructions touch that memory, and how many wait because all they read is in one bank of registers."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    if not os.path.exists(tool):
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", "-sass", file.name], capture_output=True, text=True).stdout
    found = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    if "reg" not in found:
        return {}
    hot = hot_code(text)
    spills, crowded = sum("LDL" in what or "STL" in what for what in hot), sum(map(is_crowded, hot))
    return {"registers": found["reg"], "stack": found["stack"], "hot_spills": spills, "hot_crowded": crowded}


def is_crowded(what: str) -> bool:
    """Whether an instruction multiplies and adds three registers whose numbers are all even or all odd."""
    read = re.match(r"FFMA\S* R\d+, -?R(\d+)(?:\.reuse)?, -?R(\d+)(?:\.reuse)?, -?R(\d+)", what)
    return read is not None and len({int(number) % 2 for number in read.groups()}) == 1


def hot_code(sass: str) -> list[str]:
    """The instructions inside the innermost loops that hold a matrix instruction."""
    code = [(int(at, 16), what) for at, what in re.findall(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(.*?);", sass, re.MULTILINE)]
    jumps = [(int(to.group(1), 16), at) for at, what in code if (to := re.search(r"BRA.*?0x([0-9a-f]+)", what))]
    loops = [(to, at) for to, at in jumps if to < at and any(to <= pos <= at and "GMMA" in what for pos, what in code)]
    inner = [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
    return [what for pos, what in code if any(a <= pos <= b for a, b in inner)]


def main() -> None:
    driver.set_active(Hopper())
    run, records, seen = JITFunction.run, [], set()

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            asm, meta = kernel.asm, kernel.metadata
            record = {"name": meta.name, "shared": meta.shared, "num_warps": meta.num_warps, "ptx": asm["ptx"]}
            records.append(record | resources(asm["cubin"]))
        return kernel

    JITFunction.run = compile_only
    exec(compile(sys.stdin.read(), "<code>", "exec"), {})
    for record in records:
        print(json.dumps(record))


if __name__ == "__main__":
    main()
