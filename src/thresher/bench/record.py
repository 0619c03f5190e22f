"""One measurement as one line of JSON, in a file that is only ever appended to."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

import torch

from thresher.errors import ThresherError, require
from thresher.eval.source import source_state

RESULTS = Path("benchmarks/results")
QUANTILES = {"p20", "p50", "p80"}
# Settings that do not make it another figure. All but these, "timing" and those over ranks are the selector's options.
HOW = ("copies", "steps", "repeats", "peer_kernel", "ceilings")
OVER_RANKS = ("way", "others", "cache_bytes", "exchange", "m")


@dataclass(frozen=True)
class Record:
    """The fields of a line, in this order.

    Attributes:
        case, op, selector, settings, inputs, seed, impl: what ran; settings are the selector's options, how it was timed, and
            ``peer_kernel``, which kernel a peer with several took, and ``ceilings``, what the card did in that process in bytes and FLOPs a
            second. Of a case over ranks also the ``way`` that the times are of, ``others``: the times of every further way in the run,
            ``cache_bytes``: what a rank holds of index keys and latents in each way, ``exchange``: what carried ours, ``m``: tokens that
            IDSA keeps on a rank, and ``peer_kernel`` by way.
        peer: what ran beside it, or None.
        time_us, peer_time_us: quantiles p20, p50, p80 of one run.
        ratio: peer / ours, of the p50: over 1 is faster than the peer.
        useful_flops, useful_bytes: what the definition asks for, each byte once.
        floor_us: the longer of both at these ceilings, shared out over the ranks; None on a CPU.
        peak_bytes: most device memory allocated during a run beyond its inputs; None on a CPU.
        rows_redone: rows that a fused kernel had to select again in one run over the first copy, of as many as the case has; None where no
            kernel that does so ran.
        ranks: devices that shared the work.
        gpu, torch, triton, peer_versions: what it ran on.
        commit, dirty: of the source; None outside a repository.
        date: UTC, year-month-day.
    """

    case: str
    op: str
    selector: str | None
    settings: dict[str, Any]
    inputs: str
    seed: int
    impl: str
    peer: str | None
    time_us: dict[str, float]
    peer_time_us: dict[str, float] | None
    ratio: float | None
    useful_flops: float
    useful_bytes: float
    floor_us: float | None
    peak_bytes: int | None
    rows_redone: int | None
    ranks: int
    gpu: str
    torch: str
    triton: str | None
    peer_versions: dict[str, str]
    commit: str | None
    dirty: bool | None
    date: str

    def __post_init__(self) -> None:
        for name, times in (("time_us", self.time_us), ("peer_time_us", self.peer_time_us)):
            ok = times is None or (set(times) == QUANTILES and 0 < times["p20"] <= times["p50"] <= times["p80"])
            require(ok, f"{name} must hold ascending p20, p50, p80", times, "time it again")
        want = ratio_of(self.time_us, self.peer_time_us)
        require(self.ratio == want, f"ratio must be {want}, the peer's p50 over ours", self.ratio, "do not edit records")
        require((self.peer is None) == (self.peer_time_us is None), "a peer and its times come together", self.peer, "record both")

    @property
    def options(self) -> dict[str, Any]:
        """The selector's options, of the settings."""
        return {name: value for name, value in self.settings.items() if name not in (*HOW, *OVER_RANKS, "timing")}

    @property
    def beside(self) -> dict[str, dict[str, float]]:
        """Name -> times of what was timed beside: the peer, and over ranks all other ways."""
        peer = {self.peer: self.peer_time_us} if self.peer is not None and self.peer_time_us is not None else {}
        return {**peer, **self.settings.get("others", {})}

    @property
    def ways(self) -> dict[str, float]:
        """Way -> its median, of a case over ranks: the record's own first."""
        return {way: times["p50"] for way, times in {self.settings["way"]: self.time_us, **self.beside}.items()}


def ratio_of(time_us: dict[str, float], peer_time_us: dict[str, float] | None) -> float | None:
    """Peer / ours, of the p50, to four places."""
    return None if peer_time_us is None else round(peer_time_us["p50"] / time_us["p50"], 4)


def append(path: Path, record: Record) -> None:
    """Add one line. One write in append mode, so that lines of two processes do not mix and what is there is never rewritten.

    Raises:
        ThresherError: the file cannot be written.
    """
    line = json.dumps(asdict(record), allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, line.encode())
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise ThresherError(f"records must be writable; got {path} ({error.strerror}); pass --out FILE") from error


def read(path: Path) -> list[Record]:
    """The records of a file, every one checked.

    Raises:
        ThresherError: a line that is not a record, with the line's number.
    """
    records = []
    names = {field.name for field in fields(Record)}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path.name}:{number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ThresherError(f"{where} must be one JSON object; got {error.msg}; remove the broken line") from None
        odd = sorted(set(value) ^ names) if isinstance(value, dict) else [line]
        require(not odd, f"{where} must hold the fields of a record, no more and no less", ", ".join(odd), "record it again")
        try:
            records.append(Record(**value))
        except ThresherError as error:
            raise ThresherError(f"{where}: {error}") from None
    return records


def ran_on(device: torch.device) -> dict[str, Any]:
    """The fields that say what ran where and when, but for peers' versions."""
    commit, dirty = source_state()
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}",
        "torch": torch.__version__,
        "triton": next(iter(module_versions("triton").values()), None),
        "commit": commit,
        "dirty": dirty,
        "date": today(),
    }


def module_versions(module: str) -> dict[str, str]:
    """Distribution -> version of whatever provides an importable module; the names often differ."""
    found = {}
    for dist in packages_distributions().get(module, []):
        try:
            found[dist] = version(dist)
        except PackageNotFoundError:
            continue
    return found


def results_path(gpu: str, date: str) -> Path:
    """``benchmarks/results/<gpu>-<date>.jsonl``, the GPU's name in lower case with dashes."""
    plain = "-".join(gpu.lower().replace("nvidia", " ").split())
    return RESULTS / f"{plain}-{date}.jsonl"


def today() -> str:
    """UTC, year-month-day."""
    return datetime.now(UTC).strftime("%Y-%m-%d")
