"""A folder of safetensors shards as checkpoints are published: ``config.json``, ``model.safetensors.index.json`` and the files it names.

Nothing but JSON and safetensors is opened, and no file outside the folder is named.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from thresher.errors import ThresherError, require

INDEX = "model.safetensors.index.json"
FETCH = "fetch the checkpoint again"


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies and what its file says of it; dtypes are safetensors' names."""

    shard: str
    dtype: str
    shape: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ThresherError: no such file, or no JSON object in it.
    """
    require(path.is_file(), f"the folder must hold {path.name}", path, "pass the folder of a published checkpoint")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ThresherError(f"{path.name} must be JSON; got {error}; {FETCH}") from None
    require(isinstance(data, dict), f"{path.name} must hold a JSON object", type(data).__name__, FETCH)
    return data


def read_entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of the checkpoint by its name, from the shards' own headers.

    Raises:
        ThresherError: an index that names a file elsewhere or none, a shard that is missing, cut short or no safetensors file, or one that
            holds other tensors than the index says.
    """
    placed = read_json(folder / INDEX).get("weight_map")
    require(isinstance(placed, dict) and bool(placed), f"{INDEX} must have a weight_map", type(placed).__name__, FETCH)
    assert isinstance(placed, dict)
    names: dict[str, set[str]] = {}
    for name, shard in placed.items():
        plain = isinstance(shard, str) and shard.endswith(".safetensors") and not set(shard) & {"/", "\\", ":", "\0"}
        require(plain, f"the index must put {name} in a .safetensors file of the folder", repr(shard), FETCH)
        names.setdefault(shard, set()).add(name)
    found: dict[str, Entry] = {}
    for shard, expected in sorted(names.items()):
        with open_shard(folder, shard) as file:
            held = set(file.keys())
            missing, extra = sorted(expected - held), sorted(held - expected)
            require(not missing, f"{shard} must hold what the index puts there", f"no {missing[:1]}", FETCH)
            require(not extra, f"{shard} must hold nothing but what the index puts there", f"{extra[:1]} too", FETCH)
            for name in held:
                tensor = file.get_slice(name)
                found[name] = Entry(shard, tensor.get_dtype(), tuple(tensor.get_shape()))
    return found


@contextmanager
def open_shard(folder: Path, shard: str) -> Iterator[Any]:
    """A shard, mapped into memory until the end of the block.

    Raises:
        ThresherError: it is missing, cut short or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    require((folder / shard).is_file(), f"the folder must hold the shard {shard}", "no such file", FETCH)
    try:
        file = safe_open(folder / shard, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ThresherError(f"{shard} must be a whole safetensors file; got {error}; {FETCH}") from None
    with file:
        yield file


def read_tensors(folder: Path, entries: dict[str, Entry], names: dict[str, str | None]) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Tensors and their scales, shard after shard, with one shard in memory; a scale that lies in another shard is read out of that.

    Args:
        folder: of the checkpoint.
        entries: from ``read_entries``.
        names: of the tensors wanted -> the name of its scale, or None.
    """
    by_shard: dict[str, list[str]] = {}
    for name in names:
        by_shard.setdefault(entries[name].shard, []).append(name)
    for shard, held in sorted(by_shard.items()):
        with open_shard(folder, shard) as file:
            for name in held:
                scale = names[name]
                if scale is None:
                    yield name, file.get_tensor(name), None
                elif entries[scale].shard == shard:
                    yield name, file.get_tensor(name), file.get_tensor(scale)
                else:
                    with open_shard(folder, entries[scale].shard) as other:
                        yield name, file.get_tensor(name), other.get_tensor(scale).clone()
