"""Exchanges among GPUs: the bits that one process computes, over symmetric memory and NCCL, eager and in a graph."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


RANKS = 2


def launch(task: str, folder: Path) -> list[subprocess.Popen]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS)}
    command = [sys.executable, "-m", "tests.gpu.two_gpus", task, str(folder)]
    mine = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(RANKS)]
    return [subprocess.Popen(command, cwd=ROOT, env=os.environ | meeting | own, stderr=subprocess.PIPE, text=True) for own in mine]


def test_exchanges(tmp_path, record_property):
    processes = launch("exchanges", tmp_path)
    try:
        for process in processes:
            said = process.communicate(timeout=300)[1]
            assert process.returncode == 0, said[-2000:]
    finally:
        for process in processes:
            process.kill()
    for rank in range(RANKS):
        found, measured = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == {"symmetric": [], "nccl": [], "graph": []}
        record_property("measured", f"rank {rank}: us of an exchange {measured}")


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_lost_rank_ends_the_other_in_time(how, tmp_path):
    """It waits 5 s."""
    first, last = launch(how, tmp_path)
    try:
        said = first.communicate(timeout=90)[1]
        assert first.returncode == 2, said[-2000:]
        lines = [line for line in said.splitlines() if line.startswith("thresher: ")]
        assert len(lines) == 1, said[-2000:]
        assert "every rank must answer within 5 s; got: rank 0 of 2 heard from one no more" in lines[0]
        assert last.poll() == (9 if how == "dies" else None)
    finally:
        last.kill()
        last.communicate()
