"""What we are timed against: public kernels, and our own other ways."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from thresher.bench import peer_steps, rank_peers
from thresher.bench.cases import Case
from thresher.bench.rank_steps import our_steps
from thresher.bench.record import module_versions
from thresher.bench.timing import Prepared
from thresher.errors import ThresherError, require
from thresher.ops.dispatch import VLLM_OPS, absent, reason

Prepare = Callable[..., Prepared]  # of every copy's ``Work``, or ``RankWork`` where it needs ranks


@dataclass(frozen=True)
class Peer:
    """Another way to do the same work.

    Attributes:
        what: one line.
        modules: what it imports -> what to install for it.
        ops: what it can be timed on.
        ranks: devices it needs, at least.
        prepare: makes the steps to time, one for each of our copies, without timing the conversion, and raises when the result is not
            ours; None where this package cannot call it.
        fits: ``fits(case, op)``: why it cannot take a case, in one line, or None.
    """

    what: str
    modules: Mapping[str, str]
    ops: tuple[str, ...]
    ranks: int = 1
    prepare: Prepare | None = None
    fits: Callable[[Case, str], str | None] = lambda case, op: None


_DEEP_GEMM = {"deep_gemm": "sgl-deep-gemm==0.1.4"}
_VLLM = {"vllm": f"vllm, or name its object file in {VLLM_OPS}"}
_FLASH_MLA = {"flash_mla": "tokenspeed-flashmla==1.0.0.post20260615"}
_FLASHINFER = {"flashinfer": "flashinfer-python==0.6.12"}
_LAYER = {**_DEEP_GEMM, **_VLLM, **_FLASH_MLA}

# module -> an operation that it implements (ops/dispatch.py), to ask there whether it can run.
_IMPLEMENTS = {
    "deep_gemm": "index_score",
    "vllm": "select_topk",
    "flashinfer": "select_topk",
    "flash_mla": "sparse_attend_mla_fp8",
}

PEERS: Mapping[str, Peer] = MappingProxyType(
    {
        "deep_gemm+vllm": Peer(
            "DSA by DeepGEMM's logits and the better of vLLM's top-k kernels",
            {**_DEEP_GEMM, **_VLLM},
            ("select",),
            prepare=peer_steps.deep_gemm_vllm_steps,
            fits=peer_steps.deep_gemm_vllm_fits,
        ),
        "deep_gemm": Peer(
            "DeepGEMM's logits", _DEEP_GEMM, ("index_score",), prepare=peer_steps.deep_gemm_steps, fits=peer_steps.deep_gemm_fits
        ),
        "vllm": Peer(
            "the better of vLLM's top-k kernels", _VLLM, ("select_topk",), prepare=peer_steps.vllm_steps, fits=peer_steps.vllm_fits
        ),
        "flashinfer": Peer(
            "FlashInfer's top-k", _FLASHINFER, ("select_topk",), prepare=peer_steps.flashinfer_steps, fits=peer_steps.flashinfer_fits
        ),
        "flash_mla": Peer(
            "FlashMLA's sparse decode over the FP8 cache, or its sparse prefill over bf16",
            _FLASH_MLA,
            ("sparse_attend_mla_fp8", "sparse_attend_mla"),
            prepare=peer_steps.flash_mla_steps,
            fits=peer_steps.flash_mla_fits,
        ),
        "public_replicated": Peer(
            "a layer from public parts, keys on every rank",
            _LAYER,
            ("layer",),
            ranks=2,
            prepare=rank_peers.public_replicated_steps,
            fits=rank_peers.public_replicated_fits,
        ),
        "public_exact": Peer(
            "a layer from public parts, exact merge over ranks",
            _LAYER,
            ("layer",),
            ranks=2,
            prepare=rank_peers.public_exact_steps,
            fits=rank_peers.public_exact_fits,
        ),
        "replicated": Peer("our own layer, keys on every rank", {}, ("layer",), ranks=2, prepare=our_steps),
        "exact": Peer("our own layer, exact merge over ranks", {}, ("layer",), ranks=2, prepare=our_steps),
        "idsa": Peer("our own layer, each rank's best", {}, ("layer",), ranks=2, prepare=our_steps),
    }
)


def peer_reason(name: str, device: torch.device, peers: Mapping[str, Peer] = PEERS, ranks: int = 1) -> str | None:
    """Why a peer cannot be timed here by so many ranks, in one line, or None. What depends on the case is left to ``find_peer``."""
    peer = peers[name]
    missing = [f"{module} (pip install {how})" for module, how in peer.modules.items() if absent(module) is not None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if peer.modules and device.type != "cuda":
        return "it needs a CUDA device"
    if peer.ranks > ranks:
        return f"it needs at least {peer.ranks} ranks: torchrun, and a case such as layer-1x1m-h64-r{peer.ranks}"
    if ranks > 1 and peer.ranks == 1:
        return f"it runs on one device, not on {ranks}"
    if peer.prepare is None:
        return "this package has no call for it"
    whys = (reason(_IMPLEMENTS[module], module, device) for module in peer.modules if module in _IMPLEMENTS)
    return next((why for why in whys if why is not None), None)


def find_peer(name: str, case: Case, op: str, device: torch.device, peers: Mapping[str, Peer] = PEERS) -> Prepare:
    """What makes a peer's steps.

    Raises:
        ThresherError: an unknown peer, one that does other work, or one that cannot run here or take the case, with the reason.
    """
    require(name in peers, f"a peer must be one of {', '.join(peers)}", repr(name), "check the spelling")
    peer = peers[name]
    require(op in peer.ops, f"{name} is timed on {', '.join(peer.ops)}", op, "choose the op with --op, or another peer")
    why = peer_reason(name, device, peers, case.ranks)
    if why is not None or peer.prepare is None:
        raise ThresherError(f"peer {name} must be able to run; got: {why}; leave out --peer or install it")
    why = peer.fits(case, op)
    if why is not None:
        raise ThresherError(f"peer {name} must be able to take {case.name}; got: {why}; leave out --peer for this case")
    return peer.prepare


def versions(name: str | None, peers: Mapping[str, Peer] = PEERS, kernel: str | None = None) -> dict[str, str]:
    """Installed distribution -> version, of what a peer imports, and of FlashInfer where its kernel was taken; an object file in place of a
    package goes by its checksum."""
    found: dict[str, str] = {}
    for module in (*(() if name is None else peers[name].modules), *(("flashinfer",) if kernel and "flashinfer" in kernel else ())):
        path = os.environ.get(VLLM_OPS) if module == "vllm" else None
        if path:
            found["vllm object"] = "sha256:" + hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
        else:
            found.update(module_versions(module))
    return found
