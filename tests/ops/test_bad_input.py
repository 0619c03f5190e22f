"""Every argument of every public function, wrong in every way: one line that names it, and nothing has run."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys

import pytest
import torch
from torch import Tensor

from thresher import ops
from thresher.cache import LatentCache, fp8, pack_keys
from thresher.errors import ThresherError
from thresher.types import IndexKeys, IndexQuery, PartialAttention

from .arguments import good

GOOD = good()
NAN, INF = float("nan"), float("inf")
COUNT = [None, "4", 0, -1, 1.5, True]
REAL = [None, "x", NAN, INF, True, torch.tensor(1.0)]

# What each number or text must not be.
PLAIN = {
    "topk": COUNT,
    "page_size": COUNT,
    "granularity": [*COUNT, 2**30],
    "rank": [None, "1", -1, 2, 1.0, True],
    "block_size": COUNT,
    "num_blocks": [*COUNT, 1],
    "width": ["4", -1, 1.5, True],
    "active_heads": [*COUNT, 4],
    "value_dim": [*COUNT, 577],
    "rotary_dim": [None, "4", -2, 3, 66, 2.0],
    "theta": [*REAL, 0.0, -1.0],
    "scale": REAL,
    "factor": REAL,
    "style": [None, "neox", 3],
    "filled": [None, 1, "no"],
    "with_scores": [None, 1, "no"],
    "early": [None, 1, "no"],
    "scratch": [1, "some", torch.zeros(9)],
    "space": [None, "page", 3],
}
# Tensors whose sizes follow from the arguments before them: one row too many is a mistake of theirs.
SIZED = {
    "apply_rope": ["positions"],
    "dequantize_fp8": ["scales"],
    "index_score": ["weights", "k_scales", "starts", "ends"],
    "gathered_index_score": ["positions"],
    "block_index_score": ["blocks"],
    "select_topk_in_blocks": ["scores"],
    "select_blocks": ["scores"],
    "select_topk": ["positions", "ends"],
    "select_topk_slots": ["positions", "requests", "ends"],
    "pool_keys": ["scales"],
    "partial_means": ["scales"],
    "sparse_attend": ["v", "slots"],
    "sparse_attend_mla": ["slots"],
    "sparse_attend_mla_fp8": ["slots"],
    "grow_means": ["pooled", "tickets"],
    "to_slots": ["requests"],
    "keep_best": ["positions"],
    "store_index_keys": ["slots", "positions"],
    "quantize_queries": ["weights", "positions"],
    "store_latents": ["slots", "rope", "positions"],
    "store_step": ["slots", "key", "latent", "rope", "weights", "positions"],
}
# Last dims that must fit.
WIDE = {
    "index_score": ["weights", "k"],
    "sparse_attend": ["q"],
    "sparse_attend_mla": ["q"],
    "sparse_attend_mla_fp8": ["q", "cache_data"],
    "store_index_keys": ["x"],
    "store_latents": ["data", "latent", "rope"],
    "store_step": ["data", "key", "latent", "rope", "q", "weights"],
}


def i32(*rows):
    return torch.tensor(rows, dtype=torch.int32)


MEANS, PARTS = GOOD["head_mass"]["means"], GOOD["merge"]["parts"]
(VALUES, SCALES), PART = MEANS[0], PARTS[0]


def meta(x):
    return torch.empty_like(x, device="meta")


def part(out, lse):
    return PartialAttention(out, lse)


ROUTES = ("head_mass", "routed_query")
PAGED = ("store_index_keys", "store_step")
# (function, argument, value): what the rules above do not make.
MORE = [
    *((name, "means", x) for name in ROUTES for x in (None, VALUES, [], MEANS * 2, [None])),
    *((name, "means", x) for name in ROUTES for x in ([(VALUES,)], [(VALUES, None)], [(None, SCALES)])),
    *((name, "means", [x]) for name in ROUTES for x in ((VALUES.float(), SCALES), (VALUES, SCALES.double()), (VALUES, SCALES[:1]))),
    *((name, "means", [x]) for name in ROUTES for x in ((VALUES[:, :8], SCALES), (VALUES[0], SCALES), (VALUES[:3], SCALES[:3]))),
    *((name, "means", [x]) for name in ROUTES for x in ((meta(VALUES), SCALES), (VALUES, meta(SCALES)))),
    *((name, "means", x) for name in ROUTES for x in (pack_keys(MEANS * 2), pack_keys([(VALUES[:, :8], SCALES)]))),
    *((name, "means", pack_keys([(VALUES[:3], SCALES[:3])])) for name in ROUTES),
    *((name, "means", x) for name in ("grow_means", "hisa_select") for x in (None, [], VALUES, MEANS, pack_keys(MEANS * 2))),
    *((name, "means", pack_keys([(VALUES[:, :8], SCALES)])) for name in ("grow_means", "hisa_select")),
    ("grow_means", "means", pack_keys(MEANS, 32)),
    *(("merge", "parts", x) for x in (None, [], PART, PART.out, [None], [PART.out], [PART, (PART.out, PART.lse)])),
    *(("merge", "parts", [PART, part(*x)]) for x in ((None, PART.lse), (PART.out, None), (PART.out.double(), PART.lse))),
    *(("merge", "parts", [PART, part(*x)]) for x in ((PART.out, PART.lse.half()), (PART.out[:1], PART.lse), (PART.out, PART.lse[0]))),
    *(("merge", "parts", [PART, part(*x)]) for x in ((meta(PART.out), PART.lse), (PART.out, meta(PART.lse)))),
    ("merge", "parts", [PART, part(PART.out, PART.lse + INF)]),
    *((name, noun, x) for name in GOOD for noun in ("query", "keys") if noun in GOOD[name] for x in (None, [], torch.zeros(2))),
    # values out of bounds, and sizes
    ("index_score", "starts", torch.tensor([-1, 0])),
    ("index_score", "ends", torch.tensor([71, 0])),
    ("select_topk", "positions", torch.tensor([[5, 4, -1], [1, 2, 3]])),
    ("select_topk_in_blocks", "blocks", i32([4, 0], [2, -1])),
    ("select_topk_in_blocks", "blocks", i32([-1, 0], [2, -1])),
    ("select_topk_slots", "positions", torch.tensor([[1, -1, 2], [1, 2, 3]])),
    *((name, "ends", torch.tensor(x)) for name in ("select_topk", "select_topk_slots") for x in ([-1, 3], [0, 4])),
    *((name, "requests", torch.tensor(x)) for name in ("select_topk_slots", "to_slots") for x in ([0, 1], [-1, 0])),
    *(("keep_best", "positions", i32([x, [1, 2, 9]], [[-1, -1, -1]] * 2)) for x in ([5, 0, -1], [-1, 0, 1], [3, 3, -1], [0, 1, -2])),
    ("keep_best", "positions", i32([[0, 1, 2**30 - 2**22], [1, 2, 9]], [[-1, -1, -1]] * 2)),
    ("partial_means", "positions", torch.tensor([-2, 0])),
    ("partial_means", "positions", torch.tensor([70, 0])),
    *((name, "slots", i32([0, 6, 1], [-1, -1, -1])) for name in GOOD if name.startswith("sparse_attend")),
    *((name, "slots", i32([0, -2, 1], [-1, -1, -1])) for name in GOOD if name.startswith("sparse_attend")),
    *((name, "slots", i32([0, x, 1], [-1, -1, -1])) for name in GOOD if name.startswith("sparse_attend") for x in (-(2**31), 2**31 - 1)),
    *((name, "slots", torch.tensor([0, x])) for name in GOOD if name.startswith("store_") for x in (6, -2, 2**62)),
    ("hadamard", "x", torch.zeros(2, 12)),
    ("hadamard", "x", torch.zeros(2, 0)),
    ("quantize_fp8", "x", torch.zeros(2, 0)),
    ("quantize_fp8", "x", torch.tensor([[NAN, 1.0]])),
    ("quantize_queries", "x", torch.zeros(2, 3, 48)),
    ("quantize_queries", "x", torch.zeros(2, 3, 64).double()),
    ("quantize_queries", "x", torch.zeros(2, 3, 64).to(torch.float8_e4m3fn)),
    ("pool_keys", "values", torch.zeros(70, 0).to(torch.float8_e4m3fn)),
    ("route_heads", "mass", torch.zeros(2, 3).to(torch.float8_e4m3fn)),
    ("sparse_attend", "k", torch.zeros(6, 0, 8)),
    ("sparse_attend", "q", torch.zeros(2, 3, 8)),
    ("sparse_attend_mla_fp8", "q", torch.zeros(2, 4, 576)),
    ("sparse_attend_mla_fp8", "cache_data", torch.zeros(2, 0, 1, 656, dtype=torch.uint8)),
    ("sparse_attend_mla_fp8", "cache_data", LatentCache(2, 3, fp8=False).data),
    *((name, "pages", torch.zeros(2, *x, dtype=torch.uint8)) for name in PAGED for x in ((0, 1, 68), (3, 1, 67), (3, 2, 68))),
    *((name, "pages", torch.zeros(2, 3, 1, 136, dtype=torch.uint8)[..., ::2]) for name in PAGED),
    *((name, "data", torch.zeros(2, 0, 1, 656, dtype=torch.uint8)) for name in ("store_latents", "store_step")),
    *((name, "data", torch.zeros(2, 3, 1, 672, dtype=torch.uint8)[..., :656]) for name in ("store_latents", "store_step")),
    ("store_step", "slots", torch.tensor([0, 5])),  # which the latents lack
]


def made():
    """``(function, argument, what is wrong, value)`` for everything."""
    for name, given in GOOD.items():
        tensors = [argument for argument, value in given.items() if isinstance(value, Tensor)]
        for argument in tensors:
            value = given[argument]
            optional = inspect.signature(getattr(ops, name)).parameters[argument].default is None
            yield from () if optional else [(name, argument, "None", None)]
            yield name, argument, "list", value.tolist()
            yield name, argument, "number", 3
            yield name, argument, "bool", torch.zeros(value.shape, dtype=torch.bool)
            yield name, argument, "scalar", torch.zeros((), dtype=value.dtype)
            if argument in SIZED.get(name, []):
                yield name, argument, "longer", torch.zeros(value.shape[0] + 1, *value.shape[1:]).to(value.dtype)
            if argument in WIDE.get(name, []):
                yield name, argument, "wider", torch.zeros(*value.shape[:-1], value.shape[-1] + 1).to(value.dtype)
            if len(tensors) > 1 or "query" in given:
                yield name, argument, "meta", meta(value)
        for argument in given:
            for value in PLAIN.get(argument, []):
                yield name, argument, str(value), value
        if "impl" in inspect.signature(getattr(ops, name)).parameters:
            for value in (None, "cutlass", 3, torch.zeros(2)):
                yield name, "impl", type(value).__name__, value
    for i, (name, argument, value) in enumerate(MORE):
        yield name, argument, f"more{i}", value


CASES = list(made())


@pytest.fixture
def nothing_runs(monkeypatch):
    """No kernel is chosen and no reference called; with ``impl`` wrong, choosing is what must fail."""

    def patch(argument):
        for module in [m for name, m in sys.modules.items() if re.fullmatch(r"thresher\.ops\.\w+", name)]:
            for name in vars(module):
                if name.endswith("_reference") or name in ("ragged_scores", "paged_scores", "gathered_scores"):
                    monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("a reference ran"))
                elif name == "choose" and argument != "impl" and not module.__name__.endswith("dispatch"):
                    monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("an implementation was chosen"))
        for name in ("fp8_scale", "decode_e4m3"):
            monkeypatch.setattr(fp8, name, lambda *a, **k: pytest.fail("it was computed"))

    return patch


def refused(call, argument):
    with pytest.raises(ThresherError) as caught:
        call()
    message = str(caught.value)
    assert re.search(rf"\b{argument}\b", message), message
    assert "\n" not in message
    assert re.search(r" must .*; got .*; ", message), message


@pytest.mark.parametrize(("name", "argument", "wrong", "value"), CASES, ids=[f"{a}-{b}-{c}" for a, b, c, _ in CASES])
def test_a_wrong_argument_is_named_and_nothing_runs(name, argument, wrong, value, nothing_runs):
    given = good()[name]
    before = [x.clone() for x in given.values() if isinstance(x, Tensor)]
    nothing_runs(argument)
    refused(lambda: getattr(ops, name)(**(given | {argument: value})), argument)
    assert all(torch.equal(b.float(), x.float()) for b, x in zip(before, [x for x in given.values() if isinstance(x, Tensor)], strict=True))


@pytest.mark.parametrize("name", GOOD)
def test_the_good_arguments_are_good(name):
    getattr(ops, name)(**good()[name])


def test_every_argument_of_every_function_is_here():
    assert set(GOOD) == set(ops.__all__)
    for name, given in GOOD.items():
        parameters = inspect.signature(getattr(ops, name)).parameters
        assert set(given) == set(parameters) - {"impl"}
        for argument in parameters:
            count = sum(case[:2] == (name, argument) for case in CASES)
            assert count >= 3, f"{argument} of {name}"


@pytest.mark.parametrize("name", GOOD)
def test_a_missing_argument_is_named(name):
    for argument, parameter in inspect.signature(getattr(ops, name)).parameters.items():
        if parameter.default is parameter.empty:
            given = {key: value for key, value in GOOD[name].items() if key != argument}
            with pytest.raises(TypeError, match=f"'{argument}'"):
                getattr(ops, name)(**given)


NOUNS = {"query": IndexQuery, "keys": IndexKeys}
FIELDS = [
    (name, noun, field.name) for name in GOOD for noun, kind in NOUNS.items() if noun in GOOD[name] for field in dataclasses.fields(kind)
]


@pytest.mark.parametrize(("name", "noun", "field"), FIELDS)
def test_a_wrong_tensor_inside_a_noun_is_named(name, noun, field, nothing_runs):
    given = good()[name]
    value = getattr(given[noun], field)
    nothing_runs(field)

    def call(wrong):
        return getattr(ops, name)(**(given | {noun: dataclasses.replace(given[noun], **{field: wrong})}))

    wrong_size = torch.zeros(value.shape[0] + 1, *value.shape[1:]).to(value.dtype) if field not in ("q", "pages", "page_table") else None
    for wrong in (None, value.tolist(), torch.zeros(value.shape, dtype=torch.bool), torch.zeros((), dtype=value.dtype), wrong_size):
        refused(lambda wrong=wrong: call(wrong), field)
    refused(lambda: call(meta(value)), "query" if field == "q" else field)


@pytest.mark.parametrize("name", [name for name in GOOD if "keys" in GOOD[name]])
@pytest.mark.parametrize(
    ("noun", "change", "argument"),
    [
        ("query", {"requests": torch.tensor([0, 1])}, "requests"),
        ("query", {"requests": torch.tensor([-1, 0])}, "requests"),
        ("query", {"q": torch.zeros(2, 3, 32)}, "head dim"),
        ("keys", {"lengths": torch.tensor([-1])}, "lengths"),
        ("keys", {"lengths": torch.tensor([129])}, "lengths"),
        ("keys", {"pages": torch.zeros(2, 0, 1, 68, dtype=torch.uint8)}, "page_size"),
        ("keys", {"pages": torch.zeros(2, 64, 1, 66, dtype=torch.uint8)}, "head_dim"),
        ("keys", {"pages": torch.zeros(4, 64, 1, 68, dtype=torch.uint8)[::2]}, "pages"),
    ],
)
def test_queries_and_keys_that_do_not_fit(name, noun, change, argument, nothing_runs):
    given = good()[name]
    if noun not in given:
        pytest.skip(f"{name} takes no {noun}")
    nothing_runs(argument)
    refused(lambda: getattr(ops, name)(**(given | {noun: dataclasses.replace(given[noun], **change)})), argument)


def test_what_can_be_read_only_later_is_not_read_while_a_graph_is_recorded(monkeypatch):
    """The same wrong values pass then: kernels take them as absent."""
    monkeypatch.setattr("thresher.ops.arguments.checks_values", lambda device: False)
    keys = pack_keys([(VALUES, SCALES)])
    query = dataclasses.replace(GOOD["head_mass"]["query"], requests=torch.tensor([0, 9]))
    monkeypatch.setattr(sys.modules["thresher.ops.index_score"], "choose", lambda *a: lambda *given, **_: given)
    assert ops.paged_index_score(query, keys)[0] is query
