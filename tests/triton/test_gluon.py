"""The Gluon kernels compiled for Hopper. They cannot be interpreted: tests/gpu checks what they compute."""

from __future__ import annotations

import re
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from thresher.cache import LatentCache

public, attend, gluon = (import_module(f"thresher.ops.sparse_attend{name}") for name in ("", ".triton", ".gluon"))

SHARED_LIMIT = 227 * 1024

DECODE = """
import torch
from importlib import import_module
from thresher.cache import LatentCache
kernels = import_module("thresher.ops.sparse_attend.triton")
kernels._hopper = lambda q: import_module("thresher.ops.sparse_attend.gluon")
for num, heads, topk, pages, page_size in CASES:
    q, slots = torch.zeros(num, heads, 576).bfloat16(), torch.zeros(num, topk, dtype=torch.int32)
    kernels.sparse_attend_mla_fp8(q, LatentCache(pages, page_size).data, slots, 0.1)
q, slots, counts = torch.zeros(8, 128, 576).bfloat16(), torch.zeros(8, 2048, dtype=torch.int32), torch.zeros(8, dtype=torch.int64)
kernels.attend_in_shares(q, LatentCache(33).data, slots, 0.1, counts)
"""

COUNTED = r"cp\.async\.mbarrier\.arrive\.shared\.b64((?!mbarrier).)*\sbar\.sync\s((?!mbarrier).)*@%p\d+ mbarrier\.arrive"


def test_decode_compiles(compile_for_hopper):
    """64 and 128 heads in shares and in one; odd pages; and arguments of 1, which are constants to the compiler."""
    cases = [(1, 64, 2048, 33, 64), (8, 128, 2048, 33, 64), (140, 16, 2048, 33, 64), (2, 100, 65, 5, 61), (1, 1, 1, 1, 1)]
    found = compile_for_hopper(DECODE.replace("CASES", str(cases)))
    assert {kernel.name for kernel in found} == {"decode_kernel", "combine_kernel"}
    assert all("griddepcontrol.wait" in kernel.ptx for kernel in found), "each may start while the launch ahead of it still runs"
    decode = [kernel for kernel in found if kernel.name == "decode_kernel"]
    assert len(decode) >= 4
    for kernel in decode:
        assert "wgmma.mma_async" in kernel.ptx
        assert kernel.shared <= SHARED_LIMIT
        assert re.search(COUNTED, kernel.ptx, re.DOTALL), "the arrival that lets a phase end comes once every thread's copies are counted"
        assert getattr(kernel, "stack", 0) <= 24
        # Scalars: two of the lead's uses of local memory are in a common turn.
        assert getattr(kernel, "hot_spills", 0) <= 6


@pytest.mark.parametrize("early", [True, False])
def test_decode_begins_early_where_it_may(early, monkeypatch):
    """From the public function down to the launch."""
    launched = []
    monkeypatch.setattr(public, "kernel_over_fp8", lambda *given: attend.sparse_attend_mla_fp8)
    monkeypatch.setattr(gluon, "decode_kernel", {(2,): lambda *given, **options: launched.append(options["launch_pdl"])})
    q, slots = torch.zeros(1, 64, 576).bfloat16(), torch.zeros(1, 64, dtype=torch.int32)
    monkeypatch.setattr(attend, "_hopper", lambda q: SimpleNamespace(HEADS=64, TILE=32, launcher=gluon.launcher))
    public.sparse_attend_mla_fp8(q, LatentCache(3).data, slots, 0.1, early=early)
    assert launched == [early]


PREFILL = """
import torch
from importlib import import_module
from types import SimpleNamespace
from thresher.cache import pack_keys
from thresher.types import IndexQuery
gluon = import_module("thresher.ops.index_score.gluon")
torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
num, length, at = 70, 300, torch.zeros(70, dtype=torch.int64)
for heads in HEADS:
    q, weights = torch.zeros(num, heads, DIM).to(torch.float8_e4m3fn), torch.zeros(num, heads)
    k, scales, out = torch.zeros(length, DIM).to(torch.float8_e4m3fn), torch.ones(length), torch.zeros(num, length)
    gluon.index_score(q, weights, k, scales, at, at, out)
    gluon.paged_index_score(IndexQuery(q, weights, at, at), pack_keys([(k, scales)]), length, out)
"""


FORMS = [((5, 16), "prefill_kernel", 52), ((20, 32), "prefill_kernel", 52), ((64,), "prefill_quads_kernel", 80)]


@pytest.mark.parametrize(("heads", "kernel", "spills", "dim"), [*((*form, 128) for form in FORMS), (*FORMS[1], 64), (*FORMS[2], 64)])
def test_prefill_compiles(compile_for_hopper, heads, kernel, spills, dim):
    """Ragged and paged. 32 padded heads have two sets of rows, with ranges and addresses of their own, and spill more than 64."""
    found = compile_for_hopper(PREFILL.replace("DIM", str(dim)).replace("HEADS", str(heads)))
    assert [made.name for made in found] == [kernel] * 2 * len(heads)
    for kernel in found:
        assert "wgmma.mma_async" in kernel.ptx
        assert "cp.async.bulk.tensor" in kernel.ptx
        assert kernel.shared <= SHARED_LIMIT
        assert getattr(kernel, "hot_spills", 0) <= spills
        assert kernel.name == "prefill_kernel" or getattr(kernel, "hot_crowded", 0) <= 8, "weights stand apart from products and sums"


COLLECT = """
import torch
from importlib import import_module
from types import SimpleNamespace
from thresher.cache import pack_keys
from thresher.types import IndexQuery
fused = import_module("thresher.ops.score_select.triton")
torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
at = torch.full((70,), 30000)
for heads in HEADS:
    query = IndexQuery(torch.zeros(70, heads, DIM).to(torch.float8_e4m3fn), torch.zeros(70, heads), at, at * 0)
    keys = pack_keys([(torch.zeros(30000, DIM).to(torch.float8_e4m3fn), torch.ones(30000))])
    plan = fused.make_plan(70, heads, 30016, 2048, 132)
    levels, found = torch.zeros(70), torch.zeros(70, plan.row, dtype=torch.int64)
    fused.collect(query, keys, levels, levels.int(), found, torch.zeros(70, plan.lists, dtype=torch.int32), plan, 132)
"""


@pytest.mark.parametrize(("dim", "heads"), [(64, (24, 64)), (128, (5, 16, 24, 64))])
def test_collect_compiles(compile_for_hopper, dim, heads):
    """8, 16, 32 and 64 padded heads, three of them not full."""
    found = compile_for_hopper(COLLECT.replace("DIM", str(dim)).replace("HEADS", str(heads)))
    assert [kernel.name for kernel in found] == ["collect_kernel"] * (len(heads) - 1) + ["collect_quads_kernel"]
    for kernel in found:
        assert "wgmma.mma_async" in kernel.ptx
        assert "cp.async.bulk.tensor" in kernel.ptx
        assert kernel.shared <= SHARED_LIMIT
        # Scalars, outside of what a common turn executes: where a tile is looked at closely, or a wait goes on.
        assert getattr(kernel, "hot_spills", 0) <= 45
        assert getattr(kernel, "hot_crowded", 0) <= 8, "weights stand apart from products and sums"
