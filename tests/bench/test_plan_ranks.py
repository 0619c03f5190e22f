"""Layers over several GPUs, predicted and beside their records: what is counted of each, and which records count."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from thresher.bench.plan_exchange import Exchange
from thresher.bench.plan_fit import SELECTORS, fit_parts
from thresher.bench.plan_rows import rank_errors

from .test_plan_fit import GPU, synthetic, timed
from .test_record import over_ranks

LAYER = "layer-8x128k-h64-r2"


def layer_over_ranks(case=LAYER, settings=None, **changes):
    """A record of a case over ranks, 16 steps in a graph, with 100, 200 and 400 us."""
    record = over_ranks(case, idsa=100.0, exact=200.0, replicated=400.0, public_exact=800.0)
    return replace(record, settings=record.settings | {"steps": 16} | (settings or {}), **changes)


def said(records, fits):
    """Way -> ``(case, measured, predicted)`` of every layer over ranks."""
    found = rank_errors(records, GPU, fits)
    return {way: [(error.case, error.time_us, error.predicted_us) for error in errors] for way, errors in found.items()}


def planted_layer(way, kind="symmetric"):
    """us of ``LAYER`` with the coefficients of ``PLANTED``, by hand: 8 requests of 128k over 2 ranks, all heads over half of the tokens, or
    half of the heads over all."""
    m = 1112
    sizes = {"replicated": (2**17, 64, 2048, 2048), "exact": (2**16, 128, 2048, m), "idsa": (2**16, 128, m, m)}
    held, heads, columns, attended = sizes[way]
    store = 8 * (2 * (128 + 576 + 64 * 128 + 64) + 132 + 656 + 64 * (128 + 4))
    select = 8 * (132 * held + 64 * (128 + 4) + 4 * columns)
    us = (3.0 + 4.0 * 1e-6 * store) + (10.0 + 0.25 * 1e-6 * select + 0.05 * 8)
    us += 11.0 + 3.0 * 2e-9 * heads * (576 + 512) * attended * 8
    exchange = Exchange(2, kind=kind)
    if way == "exact":
        us += 1.2 + 1.6 * 1e-6 * 8 * 8 * columns
        us += 16.0 + 0.6 * 1e-6 * (8 * 8 * 4096 + 8 * 8 * 2048) + 0.02 * 8 + 0.5 * 4.096
        us += exchange.time_us("candidates", 8 * 2048 * 8)
    if way != "replicated":
        us += exchange.time_us("merge", 8 * 64 * 1028)
        us += exchange.time_us("gather", 8 * 64 * 1152) if kind == "nccl" else 0.0  # else it is over before tokens are selected
    return us


def test_layers_over_ranks_by_hand():
    fits = fit_parts(synthetic(), GPU, ["dsa"])
    for kind, called in (("symmetric", "symmetric memory"), ("nccl", "NCCL")):
        found = said([layer_over_ranks(settings={"exchange": called})], fits)
        for way, us in (("idsa", 100.0), ("exact", 200.0), ("replicated", 400.0)):
            assert found.pop(way) == [(f"{LAYER} dsa {kind}", us, pytest.approx(planted_layer(way, kind)))]
        assert found == {}, "public ways are not predicted"


def test_a_layer_over_ranks_is_predicted_without_the_records_of_its_sizes():
    """What 8 x 128k was selected in is twice what is planted: replicated, of that size, does not see it, and idsa does. Of store there is
    no other size, so it is taken as it is."""
    records = [r for r in synthetic() if r.op != "store" or r.case == "layer-8x128k-h64"]
    at = next(i for i, r in enumerate(records) if (r.case, r.op, r.selector) == ("decode-8x128k-h64", "select", "dsa"))
    records[at] = timed("decode-8x128k-h64", "select", 2 * records[at].time_us["p50"], "dsa", commit="a")
    found = said([layer_over_ranks()], fit_parts(records, GPU, ["dsa"]))
    assert found["replicated"][0][2] == pytest.approx(planted_layer("replicated"))
    assert found["idsa"][0][2] != pytest.approx(planted_layer("idsa"), rel=1e-3)


def test_the_newest_record_over_ranks_counts():
    """Of each case and exchange; what was not timed or has no fit is left out."""
    fits = fit_parts(synthetic(), GPU, ["dsa"])
    new, old = layer_over_ranks(), layer_over_ranks(time_us={"p20": 50.0, "p50": 50.0, "p80": 50.0}, ratio=4.0)
    other = layer_over_ranks(settings={"exchange": "NCCL"})
    assert [us for _, us, _ in said([old, new, other], fits)["idsa"]] == [100.0, 100.0]
    assert set(said([new], {part: fitted for part, fitted in fits.items() if part != "topk"})) == {"idsa", "replicated"}
    alone = replace(new, settings={**new.settings, "others": {}}, peer=None, peer_time_us=None, ratio=None)
    assert set(said([alone], fits)) == {"idsa"}
    assert len(said([layer_over_ranks("layer-8x128k-h32-r2")], fits)["idsa"]) == 1, "two models have these heads"


@pytest.mark.parametrize(
    "changes",
    [
        {"gpu": "NVIDIA H100"}, {"inputs": "cruel-plateaus"}, {"impl": "reference"}, {"op": "select"}, {"case": "layer-8x128k-h16-r2"},
        {"case": "layer-8xmixed-h64-r2"}, {"case": "layer-8x128k-h64-q2-r2"}, {"case": "layer-8x2k-h64-r2"},
        {"case": "layer-8x128k-h64-r4"}, {"case": "layer-8x128k-h64", "ranks": 1},
        {"selector": "hisa", "settings": asdict(SELECTORS["hisa"])}, {"selector": "hisa"},
        {"settings": {"timing": "events"}}, {"settings": {"topk": 1024}}, {"settings": {"steps": 3}}, {"settings": {"exchange": "gloo"}},
    ],
    ids=str,
)  # fmt: skip
def test_other_records_over_ranks_are_left_out(changes):
    assert said([layer_over_ranks(**changes)], fit_parts(synthetic(), GPU, ["dsa"])) == {}
