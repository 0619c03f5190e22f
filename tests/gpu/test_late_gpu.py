"""Over NCCL nothing on the host waits for other ranks; a GPU that does so in vain ends its process all the same."""

from __future__ import annotations

import time

import pytest
import torch

from ..distributed.launch import launch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_gpu_that_never_answers_ends_its_process():
    (process,) = launch("tests.gpu.late_gpu", 1)
    began = time.monotonic()
    try:
        said = process.communicate(timeout=100)[1]
        assert process.returncode == 2, said[-2000:]
        (line,) = [line for line in said.splitlines() if line.startswith("thresher: ")]
        assert "every rank must answer within 3 s; got: rank 0 of 1 heard from one no more" in line
        assert time.monotonic() - began < 60
    finally:
        process.kill()
        process.communicate()
