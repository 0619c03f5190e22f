"""Exchanges among GPUs: the bits that one process computes, over symmetric memory and NCCL, eager and in a graph."""

from __future__ import annotations

import json

import pytest
import torch

from ..distributed.launch import launch

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


RANKS = 2
WORKER = "tests.gpu.two_gpus"


def test_exchanges(tmp_path, record_property):
    processes = launch(WORKER, RANKS, "exchanges", tmp_path)
    try:
        for process in processes:
            said = process.communicate(timeout=300)[1]
            assert process.returncode == 0, said[-2000:]
    finally:
        for process in processes:
            process.kill()
    for rank in range(RANKS):
        found, measured = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == {"symmetric": [], "nccl": [], "graph": [], "selections": []}
        record_property("measured", f"rank {rank}: us of an exchange {measured}")


@pytest.mark.parametrize("how", ["dies", "hangs", "dies-nccl", "hangs-nccl", "dies-selection", "hangs-selection"])
def test_a_lost_rank_ends_the_other_in_time(how, tmp_path):
    """It waits 5 s."""
    first, last = launch(WORKER, RANKS, how, tmp_path)
    try:
        said = first.communicate(timeout=90)[1]
        assert first.returncode == 2, said[-2000:]
        lines = [line for line in said.splitlines() if line.startswith("thresher: ")]
        assert len(lines) == 1, said[-2000:]
        assert "every rank must answer within 5 s; got: rank 0 of 2 heard from one no more" in lines[0]
        assert last.poll() == (9 if how.startswith("dies") else None)
    finally:
        last.kill()
        last.communicate()
