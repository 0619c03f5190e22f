"""Source of Gluon functions run as plain Python on NumPy: for what they compute apart from layouts, threads and time."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np

REGION = 2**40  # bytes of address space that each array has to itself


class Array(np.ndarray):
    """NumPy's, with what Gluon's tensors have besides."""

    type = types.SimpleNamespace(layout=None)

    def to(self, kind: Any, bitcast: bool = False) -> Any:
        if isinstance(kind, PointerType):
            return Pointer(kind.memory, self, kind.dtype)
        return array(np.ascontiguousarray(self).view(kind).reshape(self.shape)) if bitcast else self.astype(kind)


def array(x: Any, kind: Any = None) -> Array:
    return np.asarray(x, kind).view(Array)


class PointerType:
    def __init__(self, memory: list[np.ndarray], dtype: Any) -> None:
        self.memory, self.dtype = memory, dtype


class Pointer:
    """Addresses of elements; an array's first byte is at its number times REGION."""

    def __init__(self, memory: list[np.ndarray], at: Any, dtype: Any) -> None:
        self.memory, self.at, self.dtype = memory, array(at, np.int64), np.dtype(dtype)

    def __add__(self, count: Any) -> Pointer:
        return Pointer(self.memory, self.at + np.asarray(count, np.int64) * self.dtype.itemsize, self.dtype)

    def __getitem__(self, key: Any) -> Pointer:
        return Pointer(self.memory, np.asarray(self.at)[key], self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.at.shape

    def to(self, kind: Any) -> Array:
        assert kind is np.int64
        return self.at

    def where(self) -> tuple[np.ndarray, np.ndarray]:
        (region,) = set((self.at // REGION).flatten().tolist())
        return self.memory[region].reshape(-1).view(self.dtype), np.asarray(self.at % REGION // self.dtype.itemsize)


def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Array:
    values, at = pointer.where()
    mask = np.broadcast_to(True if mask is None else mask, at.shape)
    assert ((at < len(values)) | ~mask).all(), "read past the end"
    return array(np.where(mask, values[np.where(mask, at, 0)], np.asarray(other, values.dtype)))


def store(pointer: Pointer, value: Any, mask: Any = True) -> None:
    shape = np.broadcast_shapes(pointer.at.shape, np.shape(value), np.shape(mask))
    mask = np.broadcast_to(mask, shape)
    if mask.any():
        values, at = Pointer(pointer.memory, np.broadcast_to(pointer.at, shape)[mask], pointer.dtype).where()
        assert len(set(at.tolist())) == len(at), "two threads write to one place"
        values[at] = np.broadcast_to(value, shape)[mask]


def fma(a: Any, b: Any, c: Any) -> Array:
    """In two roundings, which may differ from one in the last bit; the same numbers give the same bits."""
    return array((np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32))


def heads_in_order(dots: Any, weights: Any) -> Any:
    """Sums over the last dim, of heads, in the order of ``index_score/triton.py``: each class modulo 8 ascending, then a tree over classes,
    which plain Triton makes from its registers and two shuffles."""
    terms = np.maximum(dots, 0)
    sums = terms[..., :8] * weights[..., :8]
    for head in range(8, dots.shape[-1], 8):
        sums = fma(terms[..., head : head + 8], weights[..., head : head + 8], sums)
    t = [sums[..., 2 * c] + sums[..., 2 * c + 1] for c in range(4)]
    return (t[0] + t[2]) + (t[1] + t[3])


def across_four(x: Any, lane: Any) -> Array:
    """``gluon_quads._across_four``, which is written in assembly: lanes 2 apart, then 1 apart."""
    x = np.asarray(x).reshape(4, 2, 8, 4, 2)
    far = x[:, :, :, :2] + x[:, :, :, 2:]
    return array((far[:, :, :, 0] + far[:, :, :, 1]).transpose(0, 2, 1, 3))


def language(memory: list[np.ndarray], program: int = 0, programs: int = 1) -> types.SimpleNamespace:
    """What stands for ``gl``."""
    return types.SimpleNamespace(
        full=lambda shape, value, kind, layout: array(np.full(shape, value, kind)),
        int32=np.int32, int64=np.int64, uint32=np.uint32, uint64=np.uint64, float32=np.float32, constexpr=None,
        fma=fma, load=load, store=store,
        reshape=np.reshape, permute=np.transpose, expand_dims=np.expand_dims, min=np.min, max=np.max, sum=np.sum,
        minimum=lambda a, b: array(np.minimum(a, b)), where=lambda c, a, b: array(np.where(c, a, b)),
        maximum=lambda a, b, propagate_nan=None: array(np.maximum(a, np.asarray(b, np.asarray(a).dtype))),
        associative_scan=lambda x, axis, combine: array(np.add.accumulate(x, axis)),  # sums are all that is asked for
        split=lambda x: (x[..., 0], x[..., 1]), join=lambda a, b: np.stack((a, b), -1), broadcast=np.broadcast_arrays,
        abs=np.abs, zeros=lambda shape, kind, layout: array(np.zeros(shape, kind)),
        convert_layout=lambda x, layout, assert_trivial: x, SwizzledSharedLayout=lambda *args: None,
        SliceLayout=lambda dim, parent: None, BlockedLayout=lambda *args: None, NVMMADistributedLayout=lambda *args: None,
        arange=lambda start, stop, layout: array(np.arange(start, stop, dtype=np.int32)),
        pointer_type=lambda kind: PointerType(memory, kind), program_id=lambda axis: program, num_programs=lambda axis: programs,
    )  # fmt: skip


def plain(jitted: Any, gl: Any, instead: dict[str, Any] | None = None, made: dict[Any, Any] | None = None) -> Callable[..., Any]:
    """A Gluon function as a Python one, and so all that it calls but what ``instead`` names."""
    made = {} if made is None else made
    if jitted.fn not in made:
        names = dict(jitted.fn.__globals__)
        made[jitted.fn] = types.FunctionType(jitted.fn.__code__, names, None, jitted.fn.__defaults__)
        for name, value in names.items():
            if hasattr(value, "fn"):
                names[name] = plain(value, gl, instead, made)
            elif type(value).__name__ == "constexpr":
                names[name] = value.value
        names |= {"gl": gl} | (instead or {})
    return made[jitted.fn]
