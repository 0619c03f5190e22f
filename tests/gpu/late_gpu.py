"""The one rank of ``test_late_gpu.py``: a GPU that is busy for longer than ranks wait."""

from __future__ import annotations

import time

import torch

from thresher.distributed.collectives import ProcessGroup
from thresher.distributed.group import started

from ..distributed.launch import as_a_rank


def main() -> None:
    with started("cuda", 3.0) as ranks:
        assert isinstance(ranks, ProcessGroup), "what is chosen for one GPU"
        ranks.gather(torch.zeros(2, device="cuda")).sum().item()
        torch.cuda._sleep(2**36)  # half a minute
        ranks.gather(torch.zeros(2, device="cuda"))
        time.sleep(60)


if __name__ == "__main__":
    as_a_rank(main)
