"""The planner's fits: planted coefficients come back, and an error is of cases that were not fitted."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from thresher.bench.cases import parse_case
from thresher.bench.plan_fit import (
    PARTS,
    SELECTORS,
    features,
    fit,
    fit_parts,
    gpu_named,
    layer_errors,
    load_records,
    non_negative,
    points_of,
    step_of,
    usable,
)
from thresher.bench.record import append
from thresher.errors import ThresherError

from .test_record import ALONE, make

GPU = "NVIDIA H200"
PLANTED = {
    "store": (3.0, 4.0), "select dsa": (10.0, 0.25, 0.05), "select misa": (8.0,), "select hisa": (20.0, 0.2, 0.1), "to_slots": (1.2, 1.6),
    "attend": (11.0, 3.0), "topk": (16.0, 0.6, 0.02, 0.5),
}  # fmt: skip
SIZES = ("1x128k", "1x1m", "8x128k", "32x128k", "128x16k")
PROPOSED = ("1x4k", "8x8k", "32x16k", "128x8k", "1x32k", "8x64k")
ATTENDED = ("mla-decode-1-h128", "mla-decode-8-h64", "mla-decode-32-h128", "mla-decode-128-h64")


def timed(case, op, us, selector=None, **changes):
    settings = {**(asdict(SELECTORS[selector]) if selector else {}), "timing": "graph", "steps": 16, **changes.pop("settings", {})}
    times = {"p20": us, "p50": us, "p80": us}
    return make(**{"case": case, "op": op, "selector": selector, "settings": settings, "time_us": times, **ALONE, **changes})


def planted(part, record):
    """What a record's part takes with the planted coefficients."""
    us = sum(c * x for c, x in zip(PLANTED[part], features(part, step_of(record)), strict=False))
    return us + (planted("select dsa", record) if part == "select misa" else 0.0)


def synthetic():
    """Records of every part, exact."""
    blank = [timed(f"layer-{size}-h64", op, 1.0, "dsa") for size in SIZES for op in ("store", "to_slots")]
    blank += [timed(f"decode-{size}-h64", "select", 1.0, name) for size in SIZES for name in SELECTORS]
    blank += [timed(case, "sparse_attend_mla_fp8", 1.0) for case in ATTENDED]
    blank += [timed(f"decode-{size}-h64", "keep_best", 1.0) for size in PROPOSED]
    named = {op: part for part, (op, _) in PARTS.items()}
    return [
        timed(r.case, r.op, planted(f"select {r.selector}" if r.op == "select" else named[r.op], r), r.selector, commit="a") for r in blank
    ]


def test_planted_coefficients_come_back():
    fits = fit_parts(synthetic(), GPU, list(SELECTORS))
    assert set(fits) == set(PLANTED)
    for part, want in PLANTED.items():
        np.testing.assert_allclose(fits[part].coefficients, want, rtol=1e-6, err_msg=part)
        assert all(abs(error.relative) < 1e-6 for error in fits[part].held_out()), part


def test_coefficients_are_never_negative_and_the_best_of_those():
    rows, times = [(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)], [3.0, 2.0, 1.0]
    found = non_negative(rows, times)
    assert found[1] == 0.0
    mean = sum(1 / t for t in times) / sum(1 / t**2 for t in times)  # least relative squares of a constant
    assert found[0] == pytest.approx(mean)
    assert non_negative([(1.0, 0.0), (1.0, 0.0)], [2.0, 2.0]) == pytest.approx((2.0, 0.0)), "a term that is never there"


def test_the_error_is_of_cases_that_were_not_fitted():
    """An outlier shows whole when it is left out; fitted to, it hides part of itself."""
    records = synthetic()
    at = next(i for i, r in enumerate(records) if r.case == "decode-1x1m-h64" and r.op == "select" and r.selector == "dsa")
    records[at] = timed(records[at].case, "select", 2 * records[at].time_us["p50"], "dsa", commit="a")
    points = points_of("select dsa", usable(records, GPU))
    fitted = fit("select dsa", points)
    (odd,) = (error for error in fitted.held_out() if error.case == "decode-1x1m-h64")
    assert odd.relative == pytest.approx(-0.5, abs=1e-6), "the others are exact, so the prediction is the planted time"
    within = fitted.time_us(next(p.step for p in points if p.case == odd.case)) / odd.time_us - 1
    assert -0.47 < within < -0.1, "part of the error is hidden, not all of it"


def test_a_case_of_the_same_sizes_is_left_out_too():
    records = [timed(f"{kind}-1x1m-h64", "select", us, "dsa") for kind, us in (("decode", 40.0), ("layer", 44.0))]
    fitted = fit("select dsa", points_of("select dsa", usable(records, GPU)))
    assert len(fitted.points) == 2
    assert fitted.held_out() == [], "nothing of another size is left"


def test_whole_layers_are_predicted_from_parts_of_other_sizes():
    records = synthetic()
    whole = timed("layer-8x128k-h64", "layer", 1.0, "dsa")
    parts = sum(planted(part, whole) for part in ("store", "select dsa", "attend"))
    records.append(timed("layer-8x128k-h64", "layer", 1.25 * parts, "dsa"))
    spoilt = [
        replace(r, time_us={"p20": 500.0, "p50": 500.0, "p80": 500.0}) if "8x128k" in r.case and r.op != "layer" else r for r in records
    ]
    for taken in (records, spoilt):
        (error,) = layer_errors(taken, GPU, fit_parts(taken, GPU, ["dsa"]))
        assert error.case == "layer-8x128k-h64 dsa"
        assert error.relative == pytest.approx(-0.2, abs=1e-6), "parts of its own sizes have no say"


def test_the_newest_record_of_the_fastest_kernel_is_taken():
    old, new = timed("decode-1x1m-h64", "select", 50.0, "dsa", date="2026-01-01"), timed("decode-1x1m-h64", "select", 40.0, "dsa")
    slow = timed("decode-1x1m-h64", "select", 70.0, "dsa", impl="cuda")
    assert usable([old, slow, new], GPU) == [new]
    assert usable([new, slow, old], GPU) == [old], "newest is the last: load_records sorts by date"


def test_records_of_a_kernel_replaced_since_are_left_out():
    before = [timed(f"decode-{size}-h64", "select", us, "dsa", commit="a") for size, us in (("1x1m", 50.0), ("8x64k", 30.0))]
    after = timed("decode-1x1m-h64", "select", 40.0, "dsa", commit="b")
    assert usable([*before, after], GPU) == [after], "a's kernel is 25 % slower than b's, so its 8x64k is another kernel's"
    same = replace(after, time_us={"p20": 49.0, "p50": 49.0, "p80": 49.0})
    assert {r.case for r in usable([*before, same], GPU)} == {"decode-1x1m-h64", "decode-8x64k-h64"}


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": "cruel-plateaus"}, {"ranks": 2}, {"impl": "reference"}, {"settings": {"timing": "events"}}, {"settings": {"steps": 3}},
        {"settings": {"topk": 1024}}, {"gpu": "another"}, {"case": "decode-8x128k-h64-q4"}, {"case": "decode-8x2k-h64"},
        {"case": "prefill-1024x128k-h64"}, {"case": "decode-8x128k-h64-d64"},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_comparable_is_left_out(changes):
    good = {"case": "decode-8x128k-h64"}
    assert len(usable([timed(op="select", us=40.0, selector="dsa", **good)], GPU)) == 1
    assert usable([timed(op="select", us=40.0, selector="dsa", **{**good, **changes})], GPU) == []


def test_records_are_found_in_folders_and_files(tmp_path):
    with pytest.raises(ThresherError, match="--records must name"):
        load_records(tmp_path)
    (tmp_path / "deep").mkdir()
    append(tmp_path / "deep" / "a.jsonl", make(date="2026-02-02"))
    append(tmp_path / "b.jsonl", make(date="2026-01-01"))
    assert [r.date for r in load_records(tmp_path)] == ["2026-01-01", "2026-02-02"]
    assert len(load_records(tmp_path / "b.jsonl")) == 1


def test_a_gpu_is_named_by_part_of_its_name():
    records = [make(gpu="NVIDIA H100 80GB HBM3"), make(gpu=GPU)]
    assert gpu_named(records, "h200") == GPU
    for asked, names in (("b200", "NVIDIA H100 80GB HBM3, NVIDIA H200"), ("nvidia", "NVIDIA H100 80GB HBM3, NVIDIA H200")):
        with pytest.raises(ThresherError, match=f"named '{asked}'; got {names};"):
            gpu_named(records, asked)


def test_a_part_without_records_is_named_with_the_ops_that_there_are():
    records = [r for r in synthetic() if r.op not in ("to_slots", "keep_best")]
    with pytest.raises(ThresherError, match=r"must hold to_slots .*; got select, sparse_attend_mla_fp8, store; take them with"):
        fit_parts(records, GPU, ["dsa"])
    other = [replace(r, gpu="NVIDIA H100") for r in synthetic() if r.op == "keep_best"]
    fits = fit_parts([*synthetic()[: -len(PROPOSED)], *other], GPU, ["dsa"])
    assert {point.gpu for point in fits["topk"].points} == {"NVIDIA H100"}, "the second top-k alone may be another GPU's"


def test_heads_are_counted_as_the_kernel_pads_them():
    step = step_of(timed("mla-decode-8-h64", "sparse_attend_mla_fp8", 1.0))
    per_head = 2e-9 * (576 + 512) * 2048 * 8
    for heads, padded in ((1, 64), (16, 64), (64, 64), (65, 128), (128, 128)):
        assert features("attend", replace(step, attention_heads=heads))[1] == pytest.approx(padded * per_head)


def test_steps_have_the_case_s_own_lengths():
    mixed = timed("decode-32xmixed-h64", "select", 1.0, "dsa")
    assert list(step_of(mixed).lengths) == parse_case(mixed.case).lengths(0)
