"""``thresher info``: what is here, and what can run on it."""

from __future__ import annotations

import os
import platform

import torch
import torch.distributed as dist

import thresher
from thresher.bench.peers import PEERS, peer_reason
from thresher.bench.record import module_versions
from thresher.distributed.reach import unreadable
from thresher.ops.dispatch import TABLE, VLLM_OPS, absent, implementations, interpreting, preferred, reason

# Module -> what it is for.
OPTIONAL = {
    "triton": "kernels",
    "deep_gemm": "kernels, a peer",
    "flash_mla": "kernels, a peer",
    "flashinfer": "kernels, a peer",
    "vllm": "kernels, a peer",
    "transformers": "a reference in tests",
    "gguf": "the demo",
    "tokenizers": "the demo",
    "matplotlib": "the demo's pictures",
    "lm_eval": "task scores",
}


def info() -> str:
    """Versions, devices, optional packages, and for each operation what each implementation can do here; touches no device's memory."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [
        f"thresher {thresher.__version__}, Python {platform.python_version()}",
        f"torch {torch.__version__}",
        f"triton {_version('triton')}" + (", interpreting on the CPU" if interpreting() else ""),
        "devices:",
        *(f"  {line}" for line in _devices()),
        "optional packages:",
        *(f"  {module}: {_version(module)} ({what})" for module, what in OPTIONAL.items()),
        f"operations, for tensors on {device.type} (* is what auto takes):",
        *(f"  {line}" for operation in TABLE for line in _operation(operation, device)),
        "exchanges between ranks on this host (* is what torchrun's processes take with --device cuda):",
        *(f"  {line}" for line in _exchanges()),
        "peers of thresher bench:",
        *(f"  {name}: {peer_reason(name, device) or 'ok'}" for name in PEERS),
    ]
    return "\n".join(lines)


def _devices() -> list[str]:
    lines = [f"cpu: {platform.machine()}, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(index)
        lines.append(f"cuda:{index}: {card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability {card.major}.{card.minor}")
    return lines


def _version(module: str) -> str:
    if absent(module) is not None:
        return "not installed"
    if module == "vllm" and os.environ.get(VLLM_OPS):
        return f"the object file that {VLLM_OPS} names"
    return ", ".join(f"{dist} {number}" if dist != module else number for dist, number in module_versions(module).items()) or "installed"


def _exchanges() -> list[str]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    built = "PyTorch was built without it"
    reasons = {
        "gloo": None if dist.is_gloo_available() else built,
        "nccl": (None if dist.is_nccl_available() else built) if count > 1 else f"needs 2 GPUs, has {count}",
        "symmetric memory": unreadable(count),
    }
    taken = next((name for name in ("symmetric memory", "nccl") if reasons[name] is None), None)
    return [f"{name}{'*' if name == taken else ''}: {why or 'ok'}" for name, why in reasons.items()]


def _operation(operation: str, device: torch.device) -> list[str]:
    taken = preferred(operation, device)
    return [
        f"{operation:<22}{'*' if name == taken else ' '} {name}: {reason(operation, name, device) or 'ok'}"
        for name in implementations(operation)
    ]
