"""Whole models beside the CPU's references: the decoder of published checkpoints, and transformers' while a selector picks for them."""

from __future__ import annotations

import copy

import pytest
import torch

import thresher
from thresher import DSA, HISA
from thresher.models.dsa_decoder import DsaDecoder

from ..models.dsa_peer import FAMILIES, text, tiny_model
from .machine import DEVICE

LENGTH, STEPS, TOPK = 50, 4, 24


def run(model, selector):
    """Hidden states of a text, then of further tokens one by one; and what the last layer that selects took for the last."""
    decoder = DsaDecoder(model, LENGTH + STEPS)
    ids = text(LENGTH + STEPS).to(model.device)
    hidden = [decoder.run(ids[:LENGTH], selector)]
    hidden += [decoder.run(ids[at : at + 1], selector) for at in range(LENGTH, LENGTH + STEPS)]
    layer = max(model.config.index_layers)
    return torch.cat(hidden).float().cpu(), [set(row[row >= 0].tolist()) for row in decoder.selections[layer].indices.cpu()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("selector", [None, HISA(topk=TOPK, block_size=8, num_blocks=4)])
def test_the_decoder_of_checkpoints(family, selector):
    """Matrix products round otherwise, and so a key or two may be swapped: in few rows, which then are off."""
    want, taken = run(tiny_model(family), selector)
    got, picked = run(copy.deepcopy(tiny_model(family)).to(DEVICE), selector)
    off = (got - want).norm(dim=1) / want.norm(dim=1)
    assert float(off.median()) < 0.01
    assert float(off.max()) < 0.5
    assert all(len(mine & theirs) >= 0.9 * len(theirs) for mine, theirs in zip(picked, taken, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["model", "fp8"])
def test_models_of_transformers(family, precision):
    models = pytest.importorskip("tests.integrations.models")
    model, ids = models.make_model(family), models.make_ids(2, 30)
    there = copy.deepcopy(model).to(DEVICE)
    with torch.no_grad(), thresher.use(model, DSA(topk=models.TOPK), precision), thresher.use(there, DSA(topk=models.TOPK), precision):
        want, got = model(ids).logits, there(ids.to(DEVICE)).logits.cpu()
    assert float((got - want).norm() / want.norm()) < 0.02
