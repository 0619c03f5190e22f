"""Trained indexers on disk: one safetensors file, and a JSON record beside it that holds its checksum and how it was made."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thresher.errors import ThresherError, require
from thresher.models.indexer import Indexer, IndexerConfig, indexer_at

SHIPPED = Path(__file__).parent / "weights" / "smollm2-135m-indexers.safetensors"
"""The indexers for SmolLM2-135M-Instruct that come with the package."""


def save_indexers(path: Path, indexers: nn.ModuleList, record: dict[str, Any]) -> None:
    """Write the weights in bf16 to ``path`` and ``record`` with sizes and checksum to the ``.json`` beside it.

    Each file is written under a temporary name and renamed, the record last, so a reader never sees a half-written pair as good.
    """
    from safetensors.torch import save_file

    tensors = {name: p.detach().to(torch.bfloat16).cpu().contiguous() for name, p in indexers.named_parameters()}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.replace(path)
    record = {"sha256": _sha256(path), "num_layers": len(indexers), "indexer": asdict(indexer_at(indexers, 0).config), **record}
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path.with_suffix(".json"))


def load_record(path: Path = SHIPPED) -> dict[str, Any]:
    """The record beside the weights file ``path``."""
    beside = path.with_suffix(".json")
    require(
        path.is_file() and beside.is_file(), "the weights file and its .json record must exist", path, "train them: thresher train warmup"
    )
    try:
        record = json.loads(beside.read_text())
    except ValueError as error:
        raise ThresherError(f"the record must be JSON; got {beside} ({error}); fetch the weights again") from None
    require(
        isinstance(record, dict) and {"sha256", "num_layers", "indexer"} <= record.keys(),
        "the record must name sha256, num_layers and indexer",
        beside,
        "fetch the weights again",
    )
    return record


def load_indexers(path: Path = SHIPPED, device: str | torch.device = "cpu") -> nn.ModuleList:
    """Indexers in fp32 on ``device``, frozen.

    Raises:
        ThresherError: a missing file, a checksum that does not fit, or tensors of other names or shapes than the record's sizes say.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    record = load_record(path)
    got = _sha256(path)
    require(
        got == record["sha256"],
        f"the weights file {path.name} must have sha256 {record['sha256'][:16]}...",
        f"{got[:16]}...",
        "it is corrupt: fetch it again",
    )
    try:
        with torch.device("meta"):
            indexers = nn.ModuleList(Indexer(IndexerConfig(**record["indexer"])) for _ in range(record["num_layers"]))
        tensors = {name: tensor.float() for name, tensor in load_file(path, device=str(device)).items()}
        indexers.load_state_dict(tensors, strict=True, assign=True)
    except (RuntimeError, TypeError, SafetensorError) as error:
        raise ThresherError(
            f"the weights must fit the record's sizes; got {str(error).splitlines()[-1].strip()}; fetch them again"
        ) from None
    return indexers.requires_grad_(False).eval()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
