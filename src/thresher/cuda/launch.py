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
    source: str,
    name: str,
    arguments: ctypes.Structure,
    grid: int,
    threads: int,
    shared: int,
    device: torch.device,
    together: bool = False,
    defines: tuple[str, ...] = (),
) -> None:
    """Launch kernel ``name`` of ``source``.cu, whose one parameter is a structure, on the device's current stream.

    Memory that the arguments point to is the caller's to keep.

    Args:
        grid: thread blocks.
        shared: bytes of shared memory for each.
        together: whether all thread blocks must be at work at once, as they wait for one another. Such a kernel may begin before the
            launch ahead of it has ended, and calls ``overlap_launches`` before it reads or writes what that does.
        defines: what the source is compiled with, "STEP_DIM=128" say, where that makes one of many kernels.

    Raises:
        ThresherError: it does not compile, or CUDA refuses the launch.
    """
    from cuda.bindings import driver

    pointer = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    stream = torch.cuda.current_stream(device).cuda_stream
    function = _function(source, name, device, defines)
    with torch.cuda.device(device):
        if not together:
            _check(driver.cuLaunchKernel(function, grid, 1, 1, threads, 1, 1, shared, stream, ctypes.addressof(pointer), 0))
            return
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ, config.blockDimX, config.blockDimY, config.blockDimZ = grid, 1, 1, threads, 1, 1
        config.sharedMemBytes, config.hStream = shared, stream
        config.attrs = _together()
        config.numAttrs = len(config.attrs)
        _check(driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointer), 0))


@lru_cache(maxsize=256)
def tile_map(pages: int, num_pages: int, page_bytes: int, dim: int) -> ctypes.Array[ctypes.c_ubyte]:
    """What the copy engine reads tiles of 64 keys by, one a page: ``pages`` is an address, a key ``dim`` bytes, 64 or 128.

    The driver wants it at a multiple of 128 bytes, where cuda-bindings does not put it: so it is called by itself.

    Raises:
        ThresherError: CUDA refuses it.
    """
    memory = ctypes.create_string_buffer(256)
    at = ctypes.addressof(memory) + 127 & ~127
    bytes_, no_interleave, swizzle, from_l2, zeros = 0, 0, 3 if dim == 128 else 2, 2, 0  # of cuda.h's enumerations
    status = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled(
        ctypes.c_void_p(at), bytes_, 3, ctypes.c_void_p(pages), (ctypes.c_uint64 * 3)(dim, 64, num_pages),
        (ctypes.c_uint64 * 2)(dim, page_bytes), (ctypes.c_uint32 * 3)(dim, 64, 1), (ctypes.c_uint32 * 3)(1, 1, 1),
        no_interleave, swizzle, from_l2, zeros,
    )  # fmt: skip
    if status:
        raise ThresherError(f"CUDA must accept a map of thresher's; got CUresult {status}; report it, with the card's name")
    return (ctypes.c_ubyte * 128).from_buffer_copy(ctypes.string_at(at, 128))


def compile_source(source: str, arch: str, defines: tuple[str, ...] = ()) -> bytes:
    """Machine code of ``source``.cu for an architecture, "sm_90a" say, with macros defined. Needs no GPU.

    Raises:
        ThresherError: it does not compile.
    """
    from cuda.bindings import nvrtc

    headers = sorted(_FOLDER.glob("*.cuh"))
    texts, names = [path.read_bytes() for path in headers], [path.name.encode() for path in headers]
    program = _check(nvrtc.nvrtcCreateProgram((_FOLDER / f"{source}.cu").read_bytes(), f"{source}.cu".encode(), len(texts), texts, names))
    try:
        options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17", b"-default-device"]
        options += [f"--define-macro={define}".encode() for define in defines]
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
def _together() -> list[Any]:
    """Attributes of a launch whose blocks are all at work at once, and which may begin while the one ahead still runs."""
    from cuda.bindings import driver

    made = []
    for name, field in (("COOPERATIVE", "cooperative"), ("PROGRAMMATIC_STREAM_SERIALIZATION", "programmaticStreamSerializationAllowed")):
        attribute, value = driver.CUlaunchAttribute(), driver.CUlaunchAttributeValue()
        setattr(value, field, 1)
        attribute.id, attribute.value = getattr(driver.CUlaunchAttributeID, f"CU_LAUNCH_ATTRIBUTE_{name}"), value
        made.append(attribute)
    return made


@cache
def _function(source: str, name: str, device: torch.device, defines: tuple[str, ...]) -> Any:
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    code = compile_source(source, f"sm_{major}{minor}a", defines)
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
