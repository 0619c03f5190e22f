"""Processes as ranks, over gloo: the bits of one process that simulates them, and an end in time where one is lost."""

from __future__ import annotations

import json

import pytest
import torch

from thresher.distributed import IDSA, Alone, Shard, Single, run, run_on_rank, share_heads
from thresher.distributed.collectives import rounded
from thresher.distributed.group import agree, started, world_size
from thresher.errors import ThresherError
from thresher.ops.merge import merge
from thresher.selectors import DSA
from thresher.types import PartialAttention

from .cases import ATTN_HEADS, Layer
from .launch import launch

WORKER = "tests.distributed.worker"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_have_the_bits_of_one_that_simulates_them(ranks, tmp_path):
    for process in launch(WORKER, ranks, "steps", tmp_path):
        said = process.communicate(timeout=240)[1]
        assert process.returncode == 0, said
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)] == [[]] * ranks


def test_ranks_that_were_told_different_things_are_refused(tmp_path):
    for process in launch(WORKER, 3, "disagree", tmp_path):
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 0, said
    said = {(tmp_path / f"{rank}.json").read_text() for rank in range(3)}
    assert said == {json.dumps("all ranks must have the same m; got 300 on rank 0, 301 on rank 2; start all alike")}


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_lost_rank_ends_the_others_in_time(how, tmp_path):
    """All wait 4 s for one another."""
    processes = launch(WORKER, 3, how, tmp_path)
    try:
        for process in processes[:2]:
            said = process.communicate(timeout=90)[1]
            assert process.returncode == 2
            lines = [line for line in said.splitlines() if line.startswith("thresher: ")]
            assert len(lines) == 1, said
            assert "thresher: every rank must " in lines[0]
        assert processes[2].poll() == (9 if how == "dies" else None)
    finally:
        processes[2].kill()
        processes[2].communicate()


def test_one_rank_alone():
    layer = Layer([40, 3], queries=6)
    for over in (Single(DSA(8)), IDSA(DSA(8), 1)):
        (shard,) = layer.shards(over.placement)
        got, picked = run_on_rank(over, layer.query, shard, Alone(), [ATTN_HEADS])
        want, _ = run(over, layer.query, [shard])
        assert torch.equal(got.out, want.out)
        assert torch.equal(got.lse, want.lse)
        assert picked.space == "local"
    part = PartialAttention(torch.randn(3, 4, 5), torch.randn(3, 4))
    assert torch.equal(Alone().merge_heads(part, [4]).out, merge([rounded(part)]).out)
    assert torch.equal(Alone().gather_heads(part.out, [4]), part.out)
    assert torch.equal(Alone().gather(part.lse), part.lse[None])
    agree(Alone(), {"k": 1})
    assert world_size() == 1


def test_heads_are_shared_out():
    for heads in range(20):
        for ranks in range(1, 9):
            shares = share_heads(heads, ranks)
            assert (len(shares), sum(shares)) == (ranks, heads)
            assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: run_on_rank(IDSA(DSA(8), 2), Layer([9]).query, Shard(Layer([9]).keys), Alone(), [4]), "for the 1 ranks there are; got 2"),
        (lambda: Alone().gather_heads(torch.zeros(2, 3, 4), [4]), "rank 0 must pass its own 4 heads; got 3"),
        (lambda: Alone().gather_heads(torch.zeros(2, 3, 4), [2, 1]), "a share of the heads for each of the 1 ranks; got 2"),
        (lambda: Alone().merge_heads(PartialAttention(torch.zeros(2, 3, 4), torch.zeros(2, 3)), [4]), "must be of all 4 heads; got 3"),
        (lambda: started("cpu", 0.0).__enter__(), "timeout_s must be positive"),
    ],
)
def test_mistakes_are_one_clear_line(call, words):
    with pytest.raises(ThresherError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
