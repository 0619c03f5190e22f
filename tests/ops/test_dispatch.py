"""Which implementation runs: the table, named implementations that never fall back, and the reasons they give."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from thresher import ops
from thresher.cache import IndexKeyCache, LatentCache, pack_keys
from thresher.errors import ThresherError
from thresher.ops import dispatch
from thresher.ops.sparse_attend import flash_mla
from thresher.types import IndexKeys, IndexQuery, PartialAttention

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def not_interpreting(monkeypatch):
    """Other tests of the same process set it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def calls():
    """operation -> a call of its public function on small CPU tensors, as ``call(impl=...)``."""
    torch.manual_seed(0)
    (k, k_scales), (q, _), weights = ops.quantize_fp8(torch.randn(70, 64)), ops.quantize_fp8(torch.randn(2, 3, 64)), torch.randn(2, 3)
    query = IndexQuery(q, weights, torch.tensor([69, 40]), torch.zeros(2, dtype=torch.int64))
    keys, means = pack_keys([(k, k_scales)]), [ops.pool_keys(k, k_scales, 16)]
    zeros, ends = torch.zeros(2, dtype=torch.int64), torch.tensor([70, 41])
    slots = torch.tensor([[0, 3, -1], [-1, -1, -1]], dtype=torch.int32)
    parts = [PartialAttention(torch.randn(2, 3, 4), torch.randn(2, 3)) for _ in range(2)]
    positions = torch.tensor([0, 70])
    arguments = {
        "index_score": (q, weights, k, k_scales, zeros, ends),
        "paged_index_score": (query, keys),
        "gathered_index_score": (query, keys, torch.tensor([[0, 5, -1], [1, 2, 3]])),
        "block_index_score": (query, keys, torch.tensor([[0, 3], [1, -1]], dtype=torch.int32), 16),
        "select_topk": (torch.randn(2, 9), 4),
        "select_topk_slots": (torch.randn(2, 9), 4, torch.tensor([[3, -1]], dtype=torch.int32), zeros, 5),
        "select_topk_in_blocks": (torch.randn(2, 10), 4, torch.tensor([[0, 3], [1, -1]], dtype=torch.int32), 5),
        "select_blocks": (torch.randn(2, 5), 3, query, keys, 16),
        "to_slots": (torch.tensor([[0, 5, -1], [1, 2, 3]], dtype=torch.int32), keys.page_table, zeros, 64),
        "keep_best": (torch.randn(2, 2, 3), torch.tensor([[0, 5, -1], [1, 2, 3]], dtype=torch.int32).expand(2, 2, 3), 1, 4),
        "score_select": (query, keys, 4),
        "pool_keys": (k, k_scales, 16),
        "pool_blocks": (keys, 16),
        "grow_means": (keys, ops.pool_blocks(keys, 16), torch.tensor([20]), torch.zeros(1, dtype=torch.int32), 16),
        "hisa_select": (query, keys, ops.pool_blocks(keys, 16), 3, 16, 4),
        "partial_means": (k, k_scales, 16, torch.tensor([3, 69])),
        "head_mass": (query, means, keys, 16),
        "route_heads": (torch.rand(2, 6), 2),
        "routed_query": (query, means, keys, 16, 2),
        "sparse_attend": (torch.randn(2, 4, 8), torch.randn(6, 2, 8), torch.randn(6, 2, 8), slots, 0.3),
        "sparse_attend_mla": (torch.randn(2, 4, 576), torch.randn(6, 576), slots, 0.05),
        "sparse_attend_mla_fp8": (torch.randn(2, 4, 576).bfloat16(), LatentCache(2, 3).data, slots, 0.05),
        "store_index_keys": (IndexKeyCache(2, 64, 3).pages, torch.tensor([0, 5]), torch.randn(2, 64), positions, 1e4, 32, "half"),
        "quantize_queries": (torch.randn(2, 3, 64), torch.randn(2, 3), positions, 1e4, 32, "half"),
        "store_latents": (LatentCache(2, 3).data, torch.tensor([0, 5]), torch.randn(2, 512), torch.randn(2, 64), positions),
        "store_step": (
            IndexKeyCache(2, 64, 3).pages, LatentCache(2, 3).data, torch.tensor([0, 5]), torch.randn(2, 64), torch.randn(2, 512),
            torch.randn(2, 64), torch.randn(2, 3, 64), torch.randn(2, 3), positions, 1e4, 32, "half",
        ),
        "merge": (parts,),
    }
    return {name: (getattr(ops, name), given) for name, given in arguments.items()}


CALLS = calls()
TRITON = [name for name in CALLS if name != "hisa_select"]  # which has no such kernel


def bits(result):
    """Every tensor in a result, for comparing."""
    if isinstance(result, torch.Tensor):
        return [result.view(torch.uint8) if result.element_size() == 1 else result]
    parts = result if isinstance(result, tuple) else [x for x in vars(result).values() if isinstance(x, torch.Tensor)]
    return [b for part in parts for b in bits(part)]


def outcome(function, given, **options):
    """What a call returns; a function that writes to its first argument has that for a result."""
    given = copy.deepcopy(given)
    result = function(*given, **options)
    return given[0] if result is None else result


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(bits(one), bits(two), strict=True))


def test_the_table_has_every_operation_that_takes_impl():
    taking = {name for name in ops.__all__ if "impl" in inspect.signature(getattr(ops, name)).parameters}
    assert taking == set(dispatch.TABLE) == set(CALLS)
    for operation, row in dispatch.TABLE.items():
        assert row[-1] == "reference", "auto always ends where everything runs"
        names = dispatch.implementations(operation)
        assert len(set(names)) == len(names)
        for name in set(names) - {"reference"}:
            assert name in dispatch.CARDS
            # Read, not imported: kernels keep the TRITON_INTERPRET that stands when they are imported.
            module = importlib.util.find_spec(f"thresher.ops.{dispatch.FOLDERS.get(operation, operation)}.{name}")
            assert f"\ndef {operation}(" in Path(module.origin).read_text()
        assert inspect.signature(getattr(ops, operation)).parameters["impl"].default == "auto"
        assert importlib.util.find_spec(f"thresher.ops.{dispatch.FOLDERS.get(operation, operation)}") is not None


@pytest.mark.parametrize("operation", TRITON)
def test_auto_takes_no_kernel_for_tensors_on_a_cpu(operation, kernel, monkeypatch):
    """Interpreting or not; a name may."""
    function, given = CALLS[operation]
    want = outcome(function, given, impl="reference")
    seen = kernel(operation, unsupported=able)
    for interpret in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        assert dispatch.preferred(operation, CPU) == "reference"
        assert equal(outcome(function, given), want)
        assert equal(outcome(function, given, impl="auto"), want)
    assert seen == []
    function(*given, impl="triton")
    assert len(seen) == 1


@pytest.fixture
def card(monkeypatch):
    """``card(capability, *packages)``: a CUDA device of that kind with these packages, all of which load."""

    def make(capability, *packages):
        monkeypatch.delenv(dispatch.VLLM_OPS, raising=False)
        monkeypatch.setattr(dispatch, "capability", lambda device: capability)
        monkeypatch.setattr(dispatch, "installed", lambda name: name.startswith("thresher.") or name in packages)
        everything = SimpleNamespace(**dict.fromkeys([*dispatch.TABLE, "load"], lambda *a: None))
        monkeypatch.setattr(dispatch, "import_module", lambda path: everything)

    return make


GPU = torch.device("cuda")
VENDORS = ("deep_gemm", "flash_mla", "flashinfer", "vllm")


@pytest.mark.parametrize("operation", TRITON)
def test_what_auto_takes_on_a_gpu(operation, card):
    """The documented table. No vendor but FlashMLA, and that for the FP8 cache alone."""
    card((9, 0), "triton", *VENDORS)
    assert dispatch.preferred(operation, GPU) == ("flash_mla" if operation == "sparse_attend_mla_fp8" else "triton")
    card((9, 0), "triton")
    assert dispatch.preferred(operation, GPU) == "triton"
    for old in ((8, 9), (12, 0)):
        card(old, "triton", *VENDORS)
        assert dispatch.preferred(operation, GPU) == "triton"
    card((8, 6), "triton", *VENDORS)
    assert dispatch.preferred(operation, GPU) == "reference"
    assert dispatch.reason(operation, "triton", GPU) == "it needs compute capability 8.9 or newer, and this card has 8.6"
    card((9, 0), *VENDORS[2:])
    assert dispatch.preferred(operation, GPU) == "reference"
    card(None, "triton", *VENDORS)
    assert dispatch.reason(operation, "triton", GPU) == "no CUDA device is here"


def test_what_has_to_be_named(card):
    card((9, 0), "triton", "cuda", *VENDORS)
    names = {operation: set(dispatch.implementations(operation)) - {"triton", "reference"} for operation in dispatch.TABLE}
    assert {operation: vendors for operation, vendors in names.items() if vendors} == {
        "index_score": {"deep_gemm"},
        "paged_index_score": {"deep_gemm"},
        "select_topk": {"flashinfer", "vllm"},
        "score_select": {"cuda"},
        "hisa_select": {"cuda"},
        "sparse_attend_mla": {"flash_mla"},
        "sparse_attend_mla_fp8": {"flash_mla"},
    }
    for operation, vendors in names.items():
        for vendor in vendors:
            assert dispatch.reason(operation, vendor, GPU) is None
            assert dispatch.reason(operation, vendor, CPU) == f"the tensors are on cpu; {vendor} needs a CUDA device"
    card((12, 0), *VENDORS)
    assert dispatch.reason("index_score", "deep_gemm", GPU) == "it needs compute capability 9.0 or 10.x, and this card has 12.0"
    card((9, 0))
    assert dispatch.reason("index_score", "deep_gemm", GPU) == "the package deep_gemm is not installed"


def test_vllm_is_a_package_or_one_object_file(card, monkeypatch, tmp_path):
    card((9, 0))
    assert dispatch.reason("select_topk", "vllm", GPU).startswith("the package vllm is not installed, nor does THRESHER_VLLM_OPS name")
    monkeypatch.setenv(dispatch.VLLM_OPS, str(tmp_path / "ops.so"))
    assert "must name a file" in dispatch.reason("select_topk", "vllm", GPU)
    (tmp_path / "ops.so").touch()
    assert dispatch.reason("select_topk", "vllm", GPU) is None
    assert dispatch.reason("index_score", "deep_gemm", GPU) is not None


def test_a_package_that_does_not_load_is_a_reason(card, monkeypatch):
    card((9, 0), *VENDORS)

    def load():
        raise OSError("libcuda.so.1: cannot open\nshared object file")

    monkeypatch.setattr(dispatch, "import_module", lambda path: SimpleNamespace(sparse_attend_mla_fp8=None, load=load))
    why = dispatch.reason("sparse_attend_mla_fp8", "flash_mla", GPU)
    assert why == "its package cannot be loaded (libcuda.so.1: cannot open shared object file)"
    with pytest.raises(ThresherError, match="cannot be loaded"):
        dispatch.choose("sparse_attend_mla_fp8", "flash_mla", GPU)


@pytest.mark.parametrize("operation", CALLS)
@pytest.mark.parametrize("name", ["", "Triton", "cutlass", "merge"])
def test_an_unknown_name_lists_the_known_ones(operation, name):
    function, given = CALLS[operation]
    known = ", ".join(("auto", *dispatch.implementations(operation)))
    with pytest.raises(ThresherError, match=f"impl must be one of {known}; got '{name}'"):
        function(*given, impl=name)
    if operation == "route_heads":
        with pytest.raises(ThresherError, match="impl must be one of auto, triton, reference; got 'deep_gemm'"):
            function(*given, impl="deep_gemm")


@pytest.fixture
def kernel(monkeypatch):
    """``kernel(operation, **names)``: a stand-in for the operation's Triton module, which records how it was called."""

    def make(operation, **names):
        seen = []
        for other in ("unsupported_mla", "unsupported_mla_fp8", "unsupported_blocks"):
            names.setdefault(other, names.get("unsupported"))
        module = SimpleNamespace(**{operation: lambda *a, **k: seen.append((a, k)) or "from the kernel", **names})
        path = f"thresher.ops.{dispatch.FOLDERS.get(operation, operation)}.triton"
        monkeypatch.setattr(dispatch, "installed", lambda package: package in ("triton", path))
        monkeypatch.setattr(dispatch, "import_module", lambda wanted: {path: module}[wanted])
        return seen

    return make


def able(*_, **__):
    return None


@pytest.mark.parametrize("operation", TRITON)
def test_a_named_kernel_gets_the_public_arguments(operation, kernel, monkeypatch):
    function, given = CALLS[operation]
    seen = kernel(operation, unsupported=able)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    silent = operation in ("store_index_keys", "store_latents", "grow_means")
    assert function(*given, impl="triton") == (None if silent else "from the kernel")
    (positional, _) = seen[0]
    for mine, theirs in zip(given, positional, strict=False):
        assert mine is theirs


@pytest.mark.parametrize("operation", TRITON)
def test_a_named_kernel_that_cannot_run_says_why_and_nothing_runs(operation, kernel, monkeypatch):
    function, given = CALLS[operation]

    def refused(words):
        with pytest.raises(ThresherError, match=words) as caught:
            function(*given, impl="triton")
        assert str(caught.value).startswith(f'impl="triton" of {operation} must be able to run; got: ')
        assert "\n" not in str(caught.value)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    seen = kernel(operation, unsupported=lambda *a, **k: "head_dim is 65")
    if operation not in ("route_heads", "merge", "to_slots", "keep_best"):  # these kernels take all that the public functions take
        refused("head_dim is 65")
    monkeypatch.delenv("TRITON_INTERPRET")
    seen += kernel(operation, unsupported=able)
    refused("the tensors are on cpu; Triton needs a CUDA device, or TRITON_INTERPRET=1")
    monkeypatch.setattr(dispatch, "import_module", lambda wanted: SimpleNamespace())
    refused(f"{operation} has no triton kernel")

    def broken(wanted):
        raise ImportError("no\nlibdevice")

    monkeypatch.setattr(dispatch, "import_module", broken)
    refused(r"its module cannot be imported \(no libdevice\)")
    monkeypatch.setattr(dispatch, "installed", lambda package: package != "triton")
    refused("the package triton is not installed")
    monkeypatch.setattr(dispatch, "installed", lambda package: False)
    refused(f"{operation} has no triton kernel")
    assert seen == []


def test_auto_goes_down_the_row_past_what_cannot_run(monkeypatch):
    """Packages that are missing, and arguments that a kernel does not take."""
    takes = {"flash_mla": None, "triton": None}
    modules = {name: SimpleNamespace(sparse_attend_mla_fp8=f"by {name}", name=name) for name in takes}
    monkeypatch.setattr(dispatch, "reason", lambda operation, name, device: missing.get(name))
    monkeypatch.setattr(dispatch, "_module", lambda operation, name: modules[name])

    def chosen():
        return dispatch.choose("sparse_attend_mla_fp8", "auto", GPU, lambda module: takes[module.name])

    missing = {}
    assert chosen() == "by flash_mla"
    missing = {"flash_mla": "not installed"}
    assert chosen() == "by triton"
    missing, takes["flash_mla"] = {}, "needs 64 or 128 heads"
    assert chosen() == "by triton"
    takes["triton"] = "too many heads"
    assert chosen() is None
    with pytest.raises(ThresherError, match="must be able to run; got: needs 64 or 128 heads"):
        dispatch.choose("sparse_attend_mla_fp8", "flash_mla", GPU, lambda module: takes[module.name])


def test_auto_goes_past_what_another_is_faster_than_and_a_name_does_not(monkeypatch):
    modules = {name: SimpleNamespace(sparse_attend_mla_fp8=f"by {name}", name=name) for name in ("flash_mla", "triton")}
    monkeypatch.setattr(dispatch, "reason", lambda operation, name, device: None)
    monkeypatch.setattr(dispatch, "_module", lambda operation, name: modules[name])

    def chosen(impl, worthwhile):
        return dispatch.choose("sparse_attend_mla_fp8", impl, GPU, worthwhile=worthwhile)

    assert chosen("auto", lambda module: True) == "by flash_mla"
    assert chosen("auto", lambda module: module.name != "flash_mla") == "by triton"
    assert chosen("flash_mla", lambda module: False) == "by flash_mla"


@pytest.mark.parametrize("ours", [True, False])
def test_flash_mla_stands_back_for_the_kernel_for_hopper(ours, monkeypatch):
    device = pytest.importorskip("thresher.cache.device")
    monkeypatch.setattr(device, "runs_gluon", lambda tensor: ours)
    assert flash_mla.worthwhile(torch.zeros(1, 64, 576)) is not ours


def test_arguments_are_checked_before_an_implementation_is_chosen(kernel, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    seen = kernel("select_topk", unsupported=able)
    with pytest.raises(ThresherError, match="scores must be float32"):
        ops.select_topk(torch.zeros(2, 3, dtype=torch.float64), 1, impl="triton")
    assert seen == []


@pytest.mark.parametrize("operation", ["sparse_attend", "sparse_attend_mla", "sparse_attend_mla_fp8", "merge"])
def test_a_kernel_is_not_used_where_a_gradient_is_wanted(operation, kernel, monkeypatch):
    function, given = CALLS[operation]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernel(operation, unsupported=able)
    if operation == "merge":
        given = ([PartialAttention(part.out.clone().requires_grad_(), part.lse) for part in given[0]],)
    else:
        given = (given[0].clone().requires_grad_(), *given[1:])
    with pytest.raises(ThresherError, match="no gradient"):
        function(*given, impl="triton")
    with torch.no_grad():
        assert function(*given, impl="triton") == "from the kernel"


def test_using_says_what_auto_means_and_is_undone():
    scores = torch.randn(2, 5)
    want = ops.select_topk(scores, 2)
    with dispatch.using("reference"):
        assert equal(ops.select_topk(scores, 2), want)
    with pytest.raises(ThresherError, match='impl="triton" of route_heads'), dispatch.using("triton"):
        ops.route_heads(torch.rand(2, 6), 2)
    assert ops.route_heads(torch.rand(2, 6), 2).shape == (2, 2)
    with dispatch.using("triton"):
        assert equal(ops.select_topk(scores, 2, impl="reference"), want), "a name in the call counts first"
        with dispatch.using("auto"):
            assert equal(ops.select_topk(scores, 2), want)
    with pytest.raises(ThresherError, match="impl must be one of"), dispatch.using("fast"):
        pass


def test_too_few_means_are_refused_for_a_kernel_too(kernel, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    seen = kernel("head_mass", unsupported=able)
    function, (query, means, keys, block_size) = CALLS["head_mass"]
    with pytest.raises(ThresherError, match="means of request 0 must cover its 4 full blocks; got 3"):
        function(query, [tuple(x[:3] for x in means[0])], keys, block_size, impl="triton")
    assert seen == []
    kernel("route_heads", unsupported=able)
    with pytest.raises(ThresherError, match="1024 heads"):
        ops.route_heads(torch.rand(1, 1025), 2, impl="triton")


def test_while_a_graph_is_recorded_no_value_is_read(kernel, monkeypatch):
    """Checks of values and widths from values would synchronise; shapes are checked all the same."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys.modules["thresher.ops.index_score"], "can_read", lambda device: False)
    for name in ("arguments", "pool_keys", "select", "keep_best", "route_heads", "merge"):
        monkeypatch.setattr(sys.modules[f"thresher.ops.{name}"], "checks_values", lambda device: False)
    for operation in TRITON:
        function, given = CALLS[operation]
        seen = kernel(operation, unsupported=able)
        with monkeypatch.context() as patch:
            for reader in ("tolist", "item", "__bool__", "__int__"):
                patch.setattr(torch.Tensor, reader, lambda *a, name=operation: pytest.fail(f"{name} reads a value"))
            function(*given, impl="triton")
        assert len(seen) == 1
        if operation == "paged_index_score":
            assert seen[0][1] == {"width": 128, "filled": True}


def test_values_on_a_gpu_are_checked_where_asked_for(monkeypatch):
    """A look would wait for the device; a CPU's values are always checked."""
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.delenv(dispatch.CHECK_VALUES, raising=False)
    assert [dispatch.checks_values(device) for device in (CPU, GPU)] == [True, False]
    assert dispatch.can_read(GPU)
    monkeypatch.setenv(dispatch.CHECK_VALUES, "1")
    assert [dispatch.checks_values(device) for device in (CPU, GPU)] == [True, True]
    capturing[0] = True
    assert [dispatch.checks_values(device) for device in (CPU, GPU)] == [True, False]
    assert not dispatch.can_read(GPU)


def test_the_reference_of_head_mass_stays_a_reference_inside_using():
    function, given = CALLS["head_mass"]
    with dispatch.using("triton"):
        assert equal(function(*given, impl="reference"), function(*given, impl="reference"))


def on_meta(operation, given):
    """The arguments with one tensor on the meta device, which stands in for a second one."""
    if operation in ("paged_index_score", "score_select", "hisa_select"):
        query = given[0]
        return IndexQuery(query.q.to("meta"), query.weights, query.positions, query.requests), *given[1:]
    if operation == "pool_blocks":
        return IndexKeys(given[0].pages.to("meta"), given[0].page_table, given[0].lengths), *given[1:]
    if operation in ("head_mass", "routed_query"):
        return given[0], [tuple(x.to("meta") for x in given[1][0])], *given[2:]
    if operation == "merge":
        return ([given[0][0], PartialAttention(given[0][1].out, given[0][1].lse.to("meta"))],)
    if operation == "select_topk":
        return *given, "logical", torch.arange(9, device="meta").expand(2, 9)
    last = max(i for i, value in enumerate(given) if isinstance(value, torch.Tensor))
    return *given[:last], given[last].to("meta"), *given[last + 1 :]


@pytest.mark.parametrize("operation", [name for name in CALLS if name != "route_heads"])
def test_tensors_on_two_devices_are_named(operation):
    function, given = CALLS[operation]
    with pytest.raises(ThresherError, match=r"\S+ must be on the device of \S+, (cpu|meta); got (cpu|meta); move it"):
        function(*on_meta(operation, given))


PROBE = """
import json, sys
from thresher import ops
from thresher.ops import dispatch
import torch
def loaded():
    return sorted(name for name in sys.modules if name.startswith("thresher") and name.endswith(".triton"))
before = loaded()
for operation in dispatch.TABLE:
    dispatch.preferred(operation, torch.device("cpu"))
print(json.dumps([before, loaded()]))
"""


def test_kernels_are_not_imported_until_asked_for():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, check=True, text=True)
    assert json.loads(done.stdout) == [[], []]


def test_a_part_of_a_package_that_is_not_there_is_not_installed():
    assert dispatch.installed("json.decoder")
    assert not dispatch.installed("json.no_such_part")
    assert not dispatch.installed("no_such_package.part")
