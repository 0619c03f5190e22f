"""Compile a kernel of this folder where it is first needed, with NVIDIA's runtime compiler, and launch it on PyTorch's stream.

``cuda-bindings``, which comes with PyTorch's CUDA builds, is imported by the first launch.
"""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from thresher.errors import ThresherError

SHARED = 227 * 1024  # bytes that a thread block may have on Hopper
_FOLDER = Path(__file__).parent


def launch(
    source: str, name: str, arguments: ctypes.Structure, grid: int, threads: int, shared: int, device: torch.device, together: bool = False
) -> None:
    """Launch kernel ``name`` of ``source``.cu, whose one parameter is a structure, on the device's current stream.

    Memory that the arguments point to is the caller's to keep.

    Args:
        grid: thread blocks.
        shared: bytes of shared memory for each.
        together: whether all thread blocks must be at work at once, as they wait for one another.

    Raises:
        ThresherError: it does not compile, or CUDA refuses the launch.
    """
    from cuda.bindings import driver

    pointer = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    stream = torch.cuda.current_stream(device).cuda_stream
    function = _function(source, name, device)
    with torch.cuda.device(device):
        sizes = (grid, 1, 1, threads, 1, 1, shared, stream, ctypes.addressof(pointer))
        _check(driver.cuLaunchCooperativeKernel(function, *sizes) if together else driver.cuLaunchKernel(function, *sizes, 0))


@lru_cache(maxsize=256)
def tile_map(pages: int, num_pages: int, page_bytes: int, dim: int) -> ctypes.Array[ctypes.c_ubyte]:
    """What the copy engine reads tiles of 64 keys by, one a page: ``pages`` is an address, a key ``dim`` bytes, 64 or 128.

    Raises:
        ThresherError: CUDA refuses it.
    """
    from cuda.bindings import driver

    sizes, strides, box, steps = (
        [kind(x) for x in values]
        for kind, values in (
            (driver.cuuint64_t, (dim, 64, num_pages)), (driver.cuuint64_t, (dim, page_bytes)), (driver.cuuint32_t, (dim, 64, 1)),
            (driver.cuuint32_t, (1, 1, 1)),
        )
    )  # fmt: skip
    swizzle = driver.CUtensorMapSwizzle
    made = _check(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, pages, sizes, strides, box, steps,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle.CU_TENSOR_MAP_SWIZZLE_128B if dim == 128 else swizzle.CU_TENSOR_MAP_SWIZZLE_64B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )  # fmt: skip
    return (ctypes.c_ubyte * 128).from_buffer_copy(ctypes.string_at(int(made.getPtr()), 128))


def compile_source(source: str, arch: str) -> bytes:
    """Machine code of ``source``.cu for an architecture, "sm_90a" say. Needs no GPU.

    Raises:
        ThresherError: it does not compile.
    """
    from cuda.bindings import nvrtc

    headers = sorted(_FOLDER.glob("*.cuh"))
    texts, names = [path.read_bytes() for path in headers], [path.name.encode() for path in headers]
    program = _check(nvrtc.nvrtcCreateProgram((_FOLDER / f"{source}.cu").read_bytes(), f"{source}.cu".encode(), len(texts), texts, names))
    try:
        options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17", b"-default-device"]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
            _check(nvrtc.nvrtcGetProgramLog(program, log))
            raise ThresherError(f"{source}.cu must compile for {arch}; got: {log.decode().strip()}; report it")
        code = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
        _check(nvrtc.nvrtcGetCUBIN(program, code))
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@cache
def _function(source: str, name: str, device: torch.device) -> Any:
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    code = compile_source(source, f"sm_{major}{minor}a")
    with torch.cuda.device(device):
        function = _check(driver.cuModuleGetFunction(_check(driver.cuModuleLoadData(code)), name.encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(function, attribute, SHARED))
    return function


def _check(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status) != 0:
        raise ThresherError(f"CUDA must accept a kernel of thresher's; got {status.name}; report it, with the card's name")
    return values[0] if len(values) == 1 else values
