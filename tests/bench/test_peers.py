"""Peers' steps over stand-ins: conversions happen before, results are held against ours, and the choice of a kernel is timed."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from thresher.bench import peer_steps, peers
from thresher.bench.cases import parse_case
from thresher.bench.peers import PEERS, find_peer, versions
from thresher.bench.run import Settings, run_bench
from thresher.bench.work import make_work, resolved
from thresher.errors import ThresherError
from thresher.ops import dispatch, select_topk
from thresher.ops.select import vllm
from thresher.selectors import DSA, MISA

from ..ops.vendors import DeepGemm, FlashInfer, FlashMla, VllmOps, install

CPU = torch.device("cpu")
DECODE, PREFILL, MIXED = "decode-3x700-h32-d64-k512", "prefill-6x700-h32-d64-k512", "decode-2xmixed-h32-d64-k512"
MLA = "mla-decode-2-h64-k128-n256"


@pytest.fixture(autouse=True)
def no_gpu_needed(monkeypatch):
    monkeypatch.delenv(dispatch.VLLM_OPS, raising=False)
    for module in (dispatch, peers):
        monkeypatch.setattr(module, "absent", lambda package: None)
    monkeypatch.setattr(dispatch, "wrong_device", lambda impl, device: None)


@pytest.fixture
def gemm(monkeypatch):
    return install(monkeypatch, DeepGemm())


@pytest.fixture
def vllm_ops():
    made = VllmOps()
    yield made
    made.close()


def works(name, op, inputs="normal", selector=None, copies=2):
    case = parse_case(name)
    return [make_work(case, op, selector or DSA(topk=case.topk), "auto", inputs, 0, CPU, None, copy) for copy in range(copies)]


def sets(indices):
    return [sorted(x for x in row if x >= 0) for row in indices.tolist()]


@pytest.mark.parametrize("name", [DECODE, PREFILL])
def test_dsa_by_deep_gemm_and_vllm(gemm, vllm_ops, name):
    ours = works(name, "select")
    made = peer_steps.deep_gemm_vllm_steps(ours)
    assert made.kernel in (vllm.COOPERATIVE, vllm.PERSISTENT)
    assert len(made.steps) == 2
    schedules, calls = len(gemm.schedules), gemm.calls
    assert schedules == (2 if name == DECODE else 0)
    for work, step in zip(ours, made.steps, strict=True):
        out = step()
        assert out.dtype == torch.int32
        assert sets(out) == sets(work.run().indices)
    assert len(gemm.schedules) == schedules, "the schedule is made before"
    assert gemm.calls == calls + 2, "one call a step"
    assert set(vllm_ops.called[-2:]) == {made.kernel}


def test_lengths_that_differ(gemm, vllm_ops, monkeypatch):
    monkeypatch.setattr("thresher.bench.cases.MIXED", (200, 700))
    (work,) = works(MIXED, "select", copies=1)
    (step,) = peer_steps.deep_gemm_vllm_steps([work]).steps
    assert sets(step()) == sets(work.run().indices)
    assert min(map(len, sets(step()))) == 200


def test_the_peer_is_dsa_whatever_ours_is(gemm, vllm_ops):
    (work,) = works(DECODE, "select", selector=MISA(active_heads=2, block_size=64, topk=512), copies=1)
    (step,) = peer_steps.deep_gemm_vllm_steps([work]).steps
    dsa = dataclasses.replace(work, selector=DSA(topk=512)).run()
    assert sets(step()) == sets(dsa.indices) != sets(work.run().indices)


@pytest.mark.parametrize("slow", [vllm.COOPERATIVE, vllm.PERSISTENT])
def test_the_faster_kernel_is_kept(gemm, vllm_ops, slow):
    vllm_ops.spoil[slow] = lambda out: time.sleep(0.1)  # a busy machine takes 0.02 s for the other too
    made = peer_steps.deep_gemm_vllm_steps(works(DECODE, "select"))
    assert made.kernel == ({vllm.COOPERATIVE, vllm.PERSISTENT} - {slow}).pop()


def lose_tokens(out):
    """Other tokens in place of 30 of the best, all distinct and in sight."""
    for row in out:
        rest = sorted(set(range(700)) - set(row.tolist()))
        row[:30] = torch.tensor(rest[:30])


def test_a_kernel_that_loses_tokens_is_passed_over(gemm, vllm_ops):
    vllm_ops.spoil[vllm.COOPERATIVE] = lose_tokens
    assert peer_steps.deep_gemm_vllm_steps(works(DECODE, "select")).kernel == vllm.PERSISTENT
    vllm_ops.spoil[vllm.PERSISTENT] = lose_tokens
    assert peer_steps.deep_gemm_vllm_steps(works(DECODE, "select")).kernel in (vllm.DECODE, vllm.PREFILL)
    vllm_ops.spoil.update(dict.fromkeys(vllm.KERNELS, lose_tokens))
    with pytest.raises(ThresherError, match=r"peer deep_gemm\+vllm must give our result; got: cooperative_topk: row 0: \d+ of 512 tokens"):
        peer_steps.deep_gemm_vllm_steps(works(DECODE, "select"))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda out: out[:, 0].copy_(out[:, 1]), "511 distinct tokens of 512, not 512 below 700"),
        (lambda out: out[:, 0].fill_(-1), "511 distinct tokens of 511, not 512"),
        (lambda out: out[:, 0].fill_(700), "512 distinct tokens of 512, not 512 below 700"),
    ],
)
def test_a_selection_that_is_none(vllm_ops, spoil, words):
    vllm_ops.spoil.update(dict.fromkeys(vllm.KERNELS, spoil))
    with pytest.raises(ThresherError, match=words):
        peer_steps.vllm_steps(works(DECODE, "select_topk"))


@pytest.mark.parametrize("inputs", ["normal", "cruel-plateaus", "cruel-ascending"])
@pytest.mark.parametrize("name", [DECODE, PREFILL])
def test_top_k_alone_on_our_scores(vllm_ops, monkeypatch, name, inputs):
    """Ties may fall either way: the stand-ins prefer the larger position."""
    package = install(monkeypatch, FlashInfer())
    ours = works(name, "select_topk", inputs)
    for make in (peer_steps.vllm_steps, peer_steps.flashinfer_steps):
        made = make(ours)
        for work, step in zip(ours, made.steps, strict=True):
            want = select_topk(work.scores, 512)
            got = work.scores.gather(1, step().clamp(min=0).long()).sort(1).values
            assert torch.equal(got, want.scores.sort(1).values)
    assert set(package.tie_breaks) == {0}, "its fastest mode"


@pytest.mark.parametrize("name", [DECODE, PREFILL])
def test_logits_alone(gemm, name):
    ours = works(name, "index_score")
    for work, step in zip(ours, peer_steps.deep_gemm_steps(ours).steps, strict=True):
        got, want = step(), work.run()
        assert got.shape == want.shape
        assert torch.equal(torch.where(want == -torch.inf, want, got), want)


def test_wrong_logits_are_refused(gemm, monkeypatch):
    right = gemm.fp8_paged_mqa_logits
    monkeypatch.setattr(gemm, "fp8_paged_mqa_logits", lambda q, *a, **k: right(q.flip(0), *a, **k))
    with pytest.raises(ThresherError, match="peer deep_gemm must give our result; got: scores are off"):
        peer_steps.deep_gemm_steps(works(DECODE, "index_score"))


@pytest.mark.parametrize("op", ["sparse_attend_mla_fp8", "sparse_attend_mla"])
def test_attention(monkeypatch, op):
    package = install(monkeypatch, FlashMla())
    ours = works(MLA, op)
    made = peer_steps.flash_mla_steps(ours)
    schedules = package.schedules
    for work, step in zip(ours, made.steps, strict=True):
        out, lse = step()
        want = work.run()
        torch.testing.assert_close(out.float().view(want.out.shape), want.out, rtol=0.02, atol=1e-3)
        torch.testing.assert_close(lse.view(want.lse.shape), want.lse)
    assert package.schedules == schedules == (2 if op == "sparse_attend_mla_fp8" else 0)
    name = "flash_mla_with_kvcache" if op == "sparse_attend_mla_fp8" else "flash_mla_sparse_fwd"
    right = getattr(package, name)
    monkeypatch.setattr(package, name, lambda q, *a, **k: right(q.flip(-2), *a, **k))
    with pytest.raises(ThresherError, match="peer flash_mla must give our result; got: lse is off"):
        peer_steps.flash_mla_steps(ours)


@pytest.mark.parametrize(
    ("peer", "case", "words"),
    [
        ("deep_gemm+vllm", "decode-1x1k-h16", "needs 32 or 64 heads, not 16"),
        ("deep_gemm+vllm", "decode-1x8k-h64-k4096", "topk is at most 2048, got 4096"),
        ("flash_mla", "mla-decode-1-h16", "needs 64 or 128 heads, not 16"),
        ("flash_mla", "mla-decode-1-h64-k100", "needs a multiple of 64 slots a query, not 100"),
    ],
)
def test_cases_that_a_peer_cannot_take(gemm, vllm_ops, monkeypatch, peer, case, words):
    install(monkeypatch, FlashMla())
    op = "select" if case.startswith("decode") else "sparse_attend_mla_fp8"
    with pytest.raises(ThresherError, match=words):
        find_peer(peer, parse_case(case), op, torch.device("cuda"))
    fine = "decode-1x8k-h64" if case.startswith("decode") else "mla-decode-1-h64"
    assert find_peer(peer, parse_case(fine), op, torch.device("cuda")) is PEERS[peer].prepare


def test_a_whole_run_records_which_kernel(gemm, vllm_ops):
    peer = dataclasses.replace(PEERS["deep_gemm+vllm"], modules={})
    settings = Settings((DECODE,), device="cpu", peer="deep_gemm+vllm", repeats=2)
    (record,) = run_bench(settings, lambda line: None, {"deep_gemm+vllm": peer})
    assert record.settings["peer_kernel"] in (vllm.COOPERATIVE, vllm.PERSISTENT)
    assert record.ratio > 0


def test_an_object_file_goes_by_its_checksum(monkeypatch, tmp_path):
    (tmp_path / "ops.so").write_bytes(b"kernels")
    monkeypatch.setenv(dispatch.VLLM_OPS, str(tmp_path / "ops.so"))
    assert versions("vllm") == {"vllm object": "sha256:e98f56f907c45b8a"}


def test_what_auto_stood_for_in_an_attention_over_the_fp8_cache(monkeypatch):
    """One name, by the shapes of the case."""
    (work,) = works(MLA, "sparse_attend_mla_fp8", copies=1)
    assert resolved(work) == "reference"
    assert resolved(dataclasses.replace(work, impl="triton")) == "triton"
    monkeypatch.setattr(dispatch, "_candidates", lambda operation, device: ("flash_mla", "reference"))
    install(monkeypatch, FlashMla())
    assert resolved(work) == "flash_mla"
    (few,) = works("mla-decode-2-h16-k128-n256", "sparse_attend_mla_fp8", copies=1)
    assert resolved(few) == "reference"
