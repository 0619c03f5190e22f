"""Modules run as ranks, each a process with the environment that ``torchrun`` gives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from thresher.errors import ThresherError

ROOT = Path(__file__).resolve().parents[2]


def launch(module: str, ranks: int, *arguments: object) -> list[subprocess.Popen]:
    """``python -m MODULE ARGUMENTS`` for each rank."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    mine = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return [subprocess.Popen(command, cwd=ROOT, env=os.environ | meeting | own, stderr=subprocess.PIPE, text=True) for own in mine]


def as_a_rank(main: Callable[..., None]) -> None:
    """What such a module ends with: a mistake is one line, and ends the process at once."""
    try:
        main(*sys.argv[1:])
    except ThresherError as failure:
        print(f"thresher: {failure}", file=sys.stderr)
        os._exit(2)
