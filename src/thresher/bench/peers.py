"""What we are timed against: public kernels, and our own other ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from types import MappingProxyType

import torch

from thresher.bench.timing import Step
from thresher.bench.work import Work
from thresher.errors import ThresherError, require
from thresher.ops.dispatch import installed


@dataclass(frozen=True)
class Peer:
    """Another way to do the same work.

    Attributes:
        what: one line.
        modules: what it imports -> what to install for it.
        ops: what it can be timed on.
        ranks: devices it needs, at least.
        prepare: makes the step to time from our copy's inputs, without timing the conversion; None where this package cannot call it.
    """

    what: str
    modules: Mapping[str, str]
    ops: tuple[str, ...]
    ranks: int = 1
    prepare: Callable[[Work], Step] | None = None


_DEEP_GEMM = {"deep_gemm": "sgl-deep-gemm==0.1.4"}
_VLLM = {"vllm": "vllm"}
_FLASH_MLA = {"flash_mla": "tokenspeed-flashmla==1.0.0.post20260615"}
_FLASHINFER = {"flashinfer": "flashinfer-python==0.6.12"}
_ALL = {**_DEEP_GEMM, **_VLLM, **_FLASH_MLA, **_FLASHINFER}

PEERS: Mapping[str, Peer] = MappingProxyType(
    {
        "deep_gemm+vllm": Peer("DeepGEMM's logits and the better of vLLM's top-k kernels", {**_DEEP_GEMM, **_VLLM}, ("select",)),
        "deep_gemm": Peer("DeepGEMM's logits", _DEEP_GEMM, ("index_score",)),
        "flashinfer": Peer("FlashInfer's top-k", _FLASHINFER, ("select_topk",)),
        "flash_mla": Peer("FlashMLA's sparse decode", _FLASH_MLA, ("sparse_attend_mla",)),
        "public_replicated": Peer("a layer from public parts, keys on every rank", _ALL, ("layer",), ranks=2),
        "public_exact": Peer("a layer from public parts, exact merge over ranks", _ALL, ("layer",), ranks=2),
        "replicated": Peer("our own layer, keys on every rank", {}, ("layer",), ranks=2),
        "exact": Peer("our own layer, exact merge over ranks", {}, ("layer",), ranks=2),
    }
)


def peer_reason(name: str, device: torch.device, peers: Mapping[str, Peer] = PEERS) -> str | None:
    """Why a peer cannot be timed here, in one line, or None."""
    peer = peers[name]
    absent = [f"{module} (pip install {how})" for module, how in peer.modules.items() if not installed(module)]
    if absent:
        return f"not installed: {', '.join(absent)}"
    if peer.modules and device.type != "cuda":
        return "it needs a CUDA device"
    if peer.ranks > 1:
        return f"it needs at least {peer.ranks} ranks, and this command runs one"
    return None if peer.prepare is not None else "this package has no call for it"


def find_peer(name: str, op: str, device: torch.device, peers: Mapping[str, Peer] = PEERS) -> Callable[[Work], Step]:
    """What makes a peer's step.

    Raises:
        ThresherError: an unknown peer, one that does other work, or one that cannot run here, with the reason.
    """
    require(name in peers, f"a peer must be one of {', '.join(peers)}", repr(name), "check the spelling")
    peer = peers[name]
    require(op in peer.ops, f"{name} is timed on {', '.join(peer.ops)}", op, "choose the op with --op, or another peer")
    why = peer_reason(name, device, peers)
    if why is not None or peer.prepare is None:
        raise ThresherError(f"peer {name} must be able to run; got: {why}; leave out --peer or install it")
    return peer.prepare


def versions(name: str | None, peers: Mapping[str, Peer] = PEERS) -> dict[str, str]:
    """Installed distribution -> version, of what a peer imports."""
    return {} if name is None else {dist: number for module in peers[name].modules for dist, number in module_versions(module).items()}


def module_versions(module: str) -> dict[str, str]:
    """Distribution -> version of whatever provides an importable module; the names often differ."""
    found = {}
    for dist in packages_distributions().get(module, []):
        try:
            found[dist] = version(dist)
        except PackageNotFoundError:
            continue
    return found
