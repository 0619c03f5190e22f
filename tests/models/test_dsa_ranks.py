"""A DSA model over ranks, processes over gloo: shares of the weights and of the tokens, beside the whole model on one device."""

from __future__ import annotations

import json

import pytest
import torch

from thresher.bench.record import read
from thresher.errors import ThresherError
from thresher.models.dsa_layers import DsaModel

from ..distributed.launch import launch
from .dsa_peer import FAMILIES, tiny_model

WORKER = "tests.models.dsa_worker"


def told(ranks, families, folder):
    for process in launch(WORKER, ranks, families, folder):
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 0, said
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def agree(runs, count):
    """Where sums of ranks are rounded otherwise, FP8 keys of later layers may go to a neighbour; layer 0 is given the same."""
    assert len(runs) == count
    for what, (off, first, odd) in runs.items():
        assert off < 0.004, what
        assert first == 0, what
        assert odd < 0.1, what


@pytest.mark.slow
def test_three_ranks_attend_and_compute_as_one(tmp_path):
    found = told(3, FAMILIES[0], tmp_path)
    agree(found[0]["runs"], 3)
    assert found[1] == found[2] == found[0]


@pytest.mark.slow
def test_two_ranks_that_share_heads_layers_and_a_checkpoint(tmp_path):
    """GLM's layers that share; fp32, the loader, what is refused, and the bench of a model."""
    found = told(2, FAMILIES[1], tmp_path)
    agree(found[0]["runs"], 6)
    assert [seen["others"] for seen in found] == [[], []]
    must = "the placement must be for the 2 ranks there are"
    refused = ["tokens that are dealt out must be fp8; got fp32; pass placement='replicated'"]
    refused += [f"{must}; got {count}; start as many processes" for count in (7, 1)]
    assert [seen["refused"] for seen in found] == [refused, refused]
    records = read(tmp_path / "a.jsonl")
    cases = [(way, name) for way in ("replicated", "exact", "idsa") for name in ("dense", "dsa")]
    assert [(r.settings["placement"], r.selector) for r in records] == cases
    lines = found[0]["bench"]["right"]
    assert found[1]["bench"]["right"] == [], "rank 0 alone writes"
    for record, line, (way, name) in zip(records, lines, cases, strict=True):
        assert (record.case, record.ranks, record.settings["exchange"]) == ("model-deepseek-v3.2-1x96-r2", 2, "gloo")
        assert line.startswith(f"model-deepseek-v3.2-1x96-r2 {name} {way}: a layer's attention ")
        held, planned = record.settings["bytes"], record.settings["planned_bytes"]
        assert held["weights"] == pytest.approx(planned["weights"], rel=0.05)
        assert held["caches"] == 2 * 64 * (656 + 132) * (1 if way != "replicated" else 2), "48 tokens are one page, 96 two"
    for seen in found:
        (attention,) = seen["bench"]["attention"]
        assert "a step by dsa must agree with one device; got: " in attention
        assert attention.endswith("no time is taken on a red check")
        assert seen["bench"]["placement"] == ["a placement must be for the 2 ranks there are; got 'idsa:ranks=5'; leave out how many"]


def test_more_ranks_than_heads():
    class Ten:
        rank, ranks = 3, 10

    with pytest.raises(ThresherError, match="ranks must be at most the model's 4 attention heads; got 10"):
        DsaModel(tiny_model(FAMILIES[0]).config, torch.float32, Ten())
