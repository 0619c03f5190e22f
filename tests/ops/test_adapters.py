"""Adapters to other packages, over stand-ins that insist on what the originals insist on (vendors.py): conversions, reasons, results."""

from __future__ import annotations

import sys

import pytest
import torch

from thresher import ops
from thresher.cache import LatentCache, pack_keys
from thresher.errors import ThresherError
from thresher.ops import dispatch
from thresher.ops.index_score import deep_gemm
from thresher.ops.select import vllm
from thresher.ops.sparse_attend import flash_mla
from thresher.types import IndexKeys, IndexQuery

from .vendors import DeepGemm, FlashInfer, FlashMla, VllmOps, install

FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def no_gpu_needed(monkeypatch):
    """The stand-ins run on a CPU, and the packages count as installed."""
    torch.manual_seed(0)
    monkeypatch.delenv(dispatch.VLLM_OPS, raising=False)
    monkeypatch.setattr(dispatch, "absent", lambda package: None)
    monkeypatch.setattr(dispatch, "wrong_device", lambda impl, device: None)


@pytest.fixture
def gemm(monkeypatch):
    return install(monkeypatch, DeepGemm())


@pytest.fixture
def mla(monkeypatch):
    return install(monkeypatch, FlashMla())


@pytest.fixture
def vllm_ops():
    made = VllmOps()
    yield made
    made.close()


def fp8(*shape):
    return ops.quantize_fp8(torch.randn(*shape))


def apart(x):
    """The same numbers, no dim of them contiguous with the next."""
    wide = torch.zeros(*(2 * size for size in x.shape), dtype=x.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    view.view(torch.uint8).copy_(x.view(torch.uint8)) if x.dtype == FP8 else view.copy_(x)
    return view


class TestDeepGemm:
    @pytest.mark.parametrize(("heads", "dim"), [(32, 64), (64, 128)])
    def test_ragged(self, gemm, heads, dim):
        (q, _), (k, scales), weights = fp8(6, heads, dim), fp8(300, dim), torch.randn(6, heads)
        starts, ends = torch.tensor([0, 5, 299, 100, 300, 7]), torch.tensor([300, 200, 300, 100, 300, 3])
        want = ops.index_score(q, weights, k, scales, starts, ends, impl="reference")
        assert (want[3:] == -torch.inf).all(), "empty and negative ranges"
        got = ops.index_score(apart(q), apart(weights), apart(k), apart(scales), starts, ends, impl="deep_gemm")
        assert torch.equal(got, want)
        assert gemm.calls == 1

    def test_paged(self, gemm):
        keys = pack_keys([fp8(130, 64), fp8(1, 64), fp8(64, 64)])
        table = torch.full((3, 5), -1, dtype=torch.int32)
        table[:, : keys.page_table.shape[1]] = keys.page_table
        keys = IndexKeys(keys.pages, table, keys.lengths)
        requests, positions = torch.tensor([2, 0, 1, 0, 0, 2]), torch.tensor([63, 129, 40, -1, 64, 0])
        query = IndexQuery(apart(fp8(6, 32, 64)[0]), apart(torch.randn(6, 32)), positions, requests)
        want = ops.paged_index_score(query, keys, impl="reference")
        assert torch.equal(ops.paged_index_score(query, keys, impl="deep_gemm"), want)
        wide = deep_gemm.paged_index_score(query, keys, width=320)
        assert torch.equal(wide[:, :130], want)
        assert (wide[:, 130:] == -torch.inf).all()

    def test_a_schedule_serves_more_than_one_call(self, gemm):
        keys = pack_keys([fp8(130, 64)])
        query = IndexQuery(fp8(2, 32, 64)[0], torch.randn(2, 32), torch.tensor([129, 60]), torch.zeros(2, dtype=torch.int64))
        inputs = deep_gemm.paged_inputs(query, keys, 130)
        first, second = deep_gemm.paged_logits(inputs), deep_gemm.paged_logits(inputs)
        assert torch.equal(first[0], second[0])
        assert len(gemm.schedules) == 1

    def test_nothing_to_score_calls_nothing(self, gemm):
        keys = pack_keys([fp8(0, 64)])
        none, zero = torch.zeros(0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        q, weights = fp8(2, 32, 64)[0], torch.randn(2, 32)
        assert ops.paged_index_score(IndexQuery(q, weights, zero, zero), keys, impl="deep_gemm").shape == (2, 0)
        assert ops.paged_index_score(IndexQuery(q[:0], weights[:0], none, none), keys, impl="deep_gemm").shape == (0, 0)
        got = ops.index_score(q, weights, *fp8(0, 64), zero, zero, impl="deep_gemm")
        assert got.shape == (2, 0)
        assert gemm.calls == 0

    def test_reasons(self, gemm):
        keys = pack_keys([fp8(10, 64)])
        zero = torch.zeros(1, dtype=torch.int64)

        def refused(words, q, keys=keys):
            with pytest.raises(ThresherError, match=words) as caught:
                ops.paged_index_score(IndexQuery(q, torch.randn(q.shape[:2]), zero, zero), keys, impl="deep_gemm")
            assert "\n" not in str(caught.value)

        refused("needs 32 or 64 heads, not 16", fp8(1, 16, 64)[0])
        refused("needs float8_e4m3fn queries", torch.randn(1, 32, 64))
        refused("a head_dim of 32, 64 or 128, not 36", fp8(1, 32, 36)[0], pack_keys([fp8(10, 36)]))
        refused("pages of 64 tokens; got 32", fp8(1, 32, 64)[0], pack_keys([fp8(10, 64)], page_size=32))
        spread = torch.zeros(2, 64, 1, 68, dtype=torch.uint8)[::2]
        query = IndexQuery(fp8(1, 32, 64)[0], torch.randn(1, 32), zero, zero)
        with pytest.raises(ThresherError, match="DeepGEMM needs contiguous pages"):
            deep_gemm.paged_index_score(query, IndexKeys(spread.expand(2, -1, -1, -1), keys.page_table, keys.lengths))
        assert deep_gemm.unsupported(FP8, FP8, 32, 64, 2**30) == "needs fewer than 2**30 keys, not 1073741824"
        with pytest.raises(ThresherError, match="impl must be one of auto, triton, reference"):
            ops.gathered_index_score(IndexQuery(fp8(1, 32, 64)[0], torch.randn(1, 32), zero, zero), keys, zero[None], impl="deep_gemm")
        assert gemm.calls == 0

    def test_compressed_logits_of_another_version_are_refused(self, gemm, monkeypatch):
        (k, scales), (q, _) = fp8(300, 64), fp8(2, 32, 64)
        right = gemm.fp8_mqa_logits
        monkeypatch.setattr(gemm, "fp8_mqa_logits", lambda *a, **k: right(*a, **k)[:, :256])
        with pytest.raises(ThresherError, match=r"must return float32 \[2, 300\]"):
            ops.index_score(q, torch.randn(2, 32), k, scales, torch.tensor([0, 0]), torch.tensor([9, 9]), impl="deep_gemm")

    def test_a_tensor_of_the_packages_own_kind(self, gemm, monkeypatch):
        class Foreign:
            def __init__(self, tensor):
                self.tensor = tensor

            def __dlpack__(self, **options):
                return self.tensor.__dlpack__(**options)

            def __dlpack_device__(self):
                return self.tensor.__dlpack_device__()

        (k, scales), (q, _), weights = fp8(300, 64), fp8(2, 32, 64), torch.randn(2, 32)
        given = q, weights, k, scales, torch.tensor([0, 4]), torch.tensor([9, 300])
        right = gemm.fp8_mqa_logits
        monkeypatch.setattr(gemm, "fp8_mqa_logits", lambda *a, **k: Foreign(right(*a, **k)))
        assert torch.equal(ops.index_score(*given, impl="deep_gemm"), ops.index_score(*given, impl="reference"))


def hard_scores(num=5, width=700):
    """Ties, more -inf than room, a row without candidates."""
    scores = torch.randn(num, width)
    scores[1] = torch.randint(0, 4, (width,)).float()
    scores[2, 100:] = -torch.inf
    scores[3] = -torch.inf
    return scores


def equal(got, want):
    return (
        all(torch.equal(getattr(got, name), getattr(want, name)) for name in ("indices", "lengths", "scores")) and got.space == want.space
    )


class TestFlashInfer:
    @pytest.mark.parametrize("topk", [1, 64, 600, 700, 2048])
    def test_ties_go_to_the_smaller_position(self, monkeypatch, topk):
        package, scores = install(monkeypatch, FlashInfer()), hard_scores()
        assert equal(ops.select_topk(scores, topk, impl="flashinfer"), ops.select_topk(scores, topk, impl="reference"))
        assert package.tie_breaks == [1]

    def test_given_positions_and_strided_rows(self, monkeypatch):
        install(monkeypatch, FlashInfer())
        scores = torch.randn(5, 80).repeat_interleave(2, 1)[:, ::2]
        positions = torch.arange(5, 85).repeat(5, 1).int()
        positions[:, 60:] = -1
        given = scores, 64, "local", positions
        assert equal(ops.select_topk(*given, impl="flashinfer"), ops.select_topk(*given, impl="reference"))

    def test_empty_and_refused(self, monkeypatch):
        install(monkeypatch, FlashInfer())
        for shape in ((0, 9), (3, 0)):
            assert equal(
                ops.select_topk(torch.randn(shape), 4, impl="flashinfer"), ops.select_topk(torch.randn(shape), 4, impl="reference")
            )
        with pytest.raises(ThresherError, match=r'impl="flashinfer" of select_topk .* topk is at most 2048, got 2049'):
            ops.select_topk(torch.randn(2, 9), 2049, impl="flashinfer")


def rows_with_ends():
    """Distinct scores, the best of them past the ends."""
    ends = torch.tensor([700, 600, 513, 512, 100])
    return torch.where(torch.arange(700) < ends[:, None], torch.randn(5, 700), 99.0), ends


@pytest.mark.parametrize("impl", ["flashinfer", "vllm"])
def test_what_stands_past_a_row_s_end_is_not_selected(monkeypatch, vllm_ops, impl):
    install(monkeypatch, FlashInfer())
    scores, ends = rows_with_ends()
    for dtype in (torch.int32, torch.int64):
        given = {"ends": ends.to(dtype)}
        assert equal(ops.select_topk(scores, 512, impl=impl, **given), ops.select_topk(scores, 512, impl="reference", **given))


class TestVllm:
    @pytest.mark.parametrize(
        ("shape", "topk", "kernel"),
        [
            ((5, 700), 512, "cooperative_topk"),
            ((64, 700), 1024, "cooperative_topk"),
            ((65, 700), 512, "persistent_topk"),
            ((5, 701), 2048, "persistent_topk"),
            ((5, 700), 100, "top_k_per_row_decode"),
        ],
    )
    def test_the_kernel_follows_the_rule_and_the_result_is_ordered(self, vllm_ops, shape, topk, kernel):
        scores = torch.randn(shape)
        scores[1, 50:] = -torch.inf
        scores[2] = -torch.inf
        assert equal(ops.select_topk(scores, topk, impl="vllm"), ops.select_topk(scores, topk, impl="reference"))
        assert vllm_ops.called == [kernel]

    @pytest.mark.parametrize("kernel", vllm.KERNELS)
    def test_every_kernel_by_name(self, vllm_ops, kernel):
        scores = torch.randn(3, 600)
        assert equal(vllm.select_topk(scores, 512, kernel=kernel), ops.select_topk(scores, 512, impl="reference"))
        assert vllm_ops.called == [kernel]

    def test_ties_are_any_but_their_scores_are_the_best(self, vllm_ops):
        scores = hard_scores()
        got, want = ops.select_topk(scores, 512, impl="vllm"), ops.select_topk(scores, 512, impl="reference")
        assert torch.equal(got.lengths, want.lengths)
        assert torch.equal(got.scores.sort(1).values, want.scores.sort(1).values)
        assert not torch.equal(got.indices, want.indices), "the stand-in breaks ties to the larger position"
        for row, length in zip(got.indices.tolist(), got.lengths.tolist(), strict=True):
            assert row[:length] == sorted(set(row[:length]))
            assert row[length:] == [-1] * (512 - length)

    def test_what_fits(self):
        assert vllm.fitting(torch.zeros(1, 2**20), 2048) == vllm.KERNELS[1::-1] + vllm.KERNELS[2:], "long rows: persistent first"
        assert vllm.fitting(torch.zeros(4, 8), 2048) == vllm.KERNELS
        assert vllm.fitting(torch.zeros(4, 9)[:, :8], 2048) == vllm.KERNELS[1:]
        assert vllm.fitting(torch.zeros(4, 12)[:, 1:9], 2048) == vllm.KERNELS[2:], "a row that begins off 16 bytes is not read by fours"
        assert vllm.fitting(torch.zeros(4, 8), 2047) == vllm.KERNELS[2:]
        with pytest.raises(ThresherError, match="kernel must be one of"):
            vllm.top_k("topk", torch.zeros(1, 8), torch.ones(1).int(), vllm.make_buffers(1, 4, torch.device("cpu")), 8)

    def test_empty_and_refused(self, vllm_ops):
        for shape in ((0, 9), (3, 0)):
            assert equal(ops.select_topk(torch.randn(shape), 4, impl="vllm"), ops.select_topk(torch.randn(shape), 4, impl="reference"))
        assert vllm_ops.called == []
        with pytest.raises(ThresherError, match="topk is at most 2048, got 4096"):
            ops.select_topk(torch.randn(2, 9), 4096, impl="vllm")

    def test_the_object_file_is_loaded_once_and_must_hold_the_kernels(self, monkeypatch, request):
        loaded = []
        monkeypatch.setenv(dispatch.VLLM_OPS, "/somewhere/ops.so")
        monkeypatch.setattr(torch.ops, "load_library", loaded.append)
        with pytest.raises(ThresherError, match=r"cannot be loaded .*ops.so holds no persistent_topk"):
            ops.select_topk(torch.randn(2, 9), 4, impl="vllm")
        assert loaded == ["/somewhere/ops.so"]
        request.getfixturevalue("vllm_ops")
        ops.select_topk(torch.randn(2, 9), 4, impl="vllm")
        assert len(loaded) == 1

    def test_without_an_object_file_the_package_is_imported(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "vllm", None)
        with pytest.raises(ThresherError, match="its package cannot be loaded"):
            ops.select_topk(torch.randn(2, 9), 4, impl="vllm")


def attention(heads=64, width=128, page_size=61, num=3):
    """Queries, an FP8 cache, slots with holes and an empty row."""
    cache = LatentCache(4, page_size=page_size)
    tokens = 4 * page_size
    cache.store(torch.arange(tokens), torch.randn(tokens, 512), torch.randn(tokens, 64))
    slots = torch.stack([torch.randperm(tokens)[:width] for _ in range(num)]).int()
    slots[0, 5:20] = -1
    slots[1] = -1
    return torch.randn(num, heads, 576).bfloat16(), cache.data, slots, 576**-0.5


def close(got, want):
    assert (got.out.dtype, got.lse.dtype) == (torch.float32, torch.float32)
    assert torch.equal(got.lse, want.lse)
    assert torch.equal(got.out, want.out.bfloat16().float()), "the package rounds outputs to bf16"


class TestFlashMla:
    @pytest.mark.parametrize(("heads", "width", "page_size"), [(64, 128, 61), (128, 64, 64), (64, 64, 69)])
    def test_over_the_fp8_cache(self, mla, heads, width, page_size):
        given = attention(heads, width, page_size)
        got = ops.sparse_attend_mla_fp8(*given, impl="flash_mla")
        close(got, ops.sparse_attend_mla_fp8(*given, impl="reference"))
        assert (got.lse[1] == -torch.inf).all()
        assert mla.schedules == 1

    def test_pages_apart_and_strided_queries(self, mla):
        q, data, slots, scale = attention()
        spread = torch.zeros(8, *data.shape[1:], dtype=torch.uint8)
        spread[::2] = data
        got = ops.sparse_attend_mla_fp8(apart(q), spread[::2], apart(slots), scale, impl="flash_mla")
        close(got, ops.sparse_attend_mla_fp8(q, data, slots, scale, impl="reference"))

    def test_over_bf16_latents(self, mla):
        q, _, slots, scale = attention()
        latents = torch.randn(244, 576).bfloat16()
        want = ops.sparse_attend_mla(q, latents, slots, scale, impl="reference")
        close(ops.sparse_attend_mla(apart(q), latents, slots, scale, impl="flash_mla"), want)
        wide = torch.zeros(244, 640).bfloat16()
        wide[:, :576] = latents
        close(ops.sparse_attend_mla(q, wide[:, :576], slots, scale, impl="flash_mla"), want)

    def test_garbage_slots_are_absent(self, mla):
        q, data, slots, scale = attention()
        latents = torch.randn(244, 576).bfloat16()
        bad = slots.clone()
        bad[slots < 0] = torch.tensor([-(2**31), -2, 244, 2**31 - 1]).int().repeat(40)[: int((slots < 0).sum())]
        close(flash_mla.sparse_attend_mla_fp8(q, data, bad, scale), ops.sparse_attend_mla_fp8(q, data, slots, scale, impl="reference"))
        close(flash_mla.sparse_attend_mla(q, latents, bad, scale), ops.sparse_attend_mla(q, latents, slots, scale, impl="reference"))

    def test_a_schedule_serves_more_than_one_call(self, mla):
        q, data, slots, scale = attention()
        inputs = flash_mla.decode_inputs(q, data, slots)
        assert torch.equal(flash_mla.decode(inputs, scale)[0], flash_mla.decode(inputs, scale)[0])
        assert mla.schedules == 1

    def test_no_query_or_no_cache_calls_nothing(self, mla):
        q, data, slots, scale = attention()
        none = flash_mla.sparse_attend_mla_fp8(q[:0], data, slots[:0], scale)
        assert (none.out.shape, none.lse.shape) == ((0, 64, 512), (0, 64))
        for part in (
            flash_mla.sparse_attend_mla_fp8(q, data[:0], slots, scale),
            flash_mla.sparse_attend_mla(q, torch.zeros(0, 576).bfloat16(), slots, scale),
        ):
            assert not part.out.any()
            assert (part.lse == -torch.inf).all()
        assert mla.schedules == 0

    def test_reasons(self, mla):
        q, data, slots, scale = attention()
        latents = torch.randn(244, 576).bfloat16()

        def refused(words, function, *given):
            with pytest.raises(ThresherError, match=words) as caught:
                function(*given, scale, impl="flash_mla")
            assert "\n" not in str(caught.value)

        fp8_, bf16 = ops.sparse_attend_mla_fp8, ops.sparse_attend_mla
        refused("needs 64 or 128 heads, not 16", fp8_, q[:, :16], data, slots)
        refused("needs 64 or 128 heads, not 16", bf16, q[:, :16], latents, slots)
        refused("needs a multiple of 64 slots a query, not 100", fp8_, q, data, slots[:, :100])
        refused("needs a multiple of 64 slots a query, not 0", fp8_, q, data, slots[:, :0])
        refused("needs a multiple of 128 slots a query, not 64", bf16, q, latents, slots[:, :64])
        assert "needs bfloat16 queries and a uint8 cache" in flash_mla.unsupported_mla_fp8(q.float(), data, slots)
        assert "needs q [num_queries, heads, 576] and a cache" in flash_mla.unsupported_mla_fp8(q, data[..., :640], slots)
        refused("needs bfloat16 queries and latents", bf16, q, latents.float(), slots)
        refused("no gradient", fp8_, q.clone().requires_grad_(), data, slots)
        spread = torch.zeros(4, 61, 1, 672, dtype=torch.uint8)[..., :656]
        refused("the tokens of a page one after the other", fp8_, q, spread, slots)
        refused("multiples of 16 bytes", bf16, q, torch.randn(244, 580).bfloat16()[:, :576], slots)
        assert mla.schedules == 0


def test_auto_goes_past_flash_mla_by_shape(mla, monkeypatch):
    """The FP8 row's reasons depend on slots, so the public function hands them over."""
    monkeypatch.setattr(dispatch, "_candidates", lambda operation, device: ("flash_mla", "reference"))
    q, data, slots, scale = attention()
    close(ops.sparse_attend_mla_fp8(q, data, slots, scale), ops.sparse_attend_mla_fp8(q, data, slots, scale, impl="reference"))
    assert mla.schedules == 1
    odd = ops.sparse_attend_mla_fp8(q, data, slots[:, :100], scale)
    assert torch.equal(odd.out, ops.sparse_attend_mla_fp8(q, data, slots[:, :100], scale, impl="reference").out)
    assert mla.schedules == 1
