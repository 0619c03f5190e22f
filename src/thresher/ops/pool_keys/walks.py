"""Sums of index keys in position order on Hopper, in CUDA C++ (``thresher/cuda/walk.cu``): the bits of ``device.ordered_sum``.

A walk is a chain of additions. There keys come from device memory a run at a time, 40 clocks a key, whatever is asked for ahead; here they
are copied to shared memory first, by all threads, and a key takes 27 (docs/lab-log.md).
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from torch import Tensor

from thresher.cache.device import Rows, on_hopper
from thresher.cuda import launch
from thresher.ops.dispatch import installed

PART, PARTS = 128, 3  # keys that are copied together, and how many such parts shared memory holds, as in walk.cu


class _Rows(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p if name in ("values", "scales", "table") else ctypes.c_uint) for name in Rows._fields]


class _Pool(ctypes.Structure):
    _fields_ = [
        ("keys", _Rows), ("means", _Rows), *((name, ctypes.c_void_p) for name in ("olds", "news", "counts", "tickets")),
        ("block_size", ctypes.c_uint), ("programs", ctypes.c_uint),
    ]  # fmt: skip


class _Own(ctypes.Structure):
    _fields_ = [
        ("keys", _Rows), *((name, ctypes.c_void_p) for name in ("positions", "requests", "lengths", "sums")),
        *((name, ctypes.c_uint) for name in ("num_queries", "num_requests", "block_size")),
    ]  # fmt: skip


class Kept(NamedTuple):
    """What a cache of means keeps of each request beside the tokens it pooled, for kernels to bring up to date.

    Attributes:
        counts: int64 ``[B]``, full blocks.
        tickets: int32 ``[B]``, zeros before and after.
    """

    counts: Tensor
    tickets: Tensor


def can_walk(rows: Rows, block_size: int, dim: int) -> bool:
    """Whether these kernels take such keys. Others are ``ordered_sum``'s."""
    return on_hopper(rows.values) and installed("cuda.bindings") and fits(rows, block_size, dim)


def fits(rows: Rows, block_size: int, dim: int) -> bool:
    """Whether keys lie as these kernels read them, 16 bytes at a time."""
    size = rows.page_size
    return dim in (64, 128) and size >= 16 and size & (size - 1) == 0 and block_size % 16 == 0 and rows.values.data_ptr() % 16 == 0


def pool(
    rows: Rows, old: Tensor, new: Tensor, block_size: int, programs: int, out: Rows, out_width: int, dim: int, kept: Kept | None = None
) -> None:
    """Write the means of the blocks ``old[r] // B <= b < new[r] // B`` of every request r.

    Args:
        old, new: int64 ``[B]``, tokens, contiguous.
        programs: thread blocks for a request, which take turns at its blocks.
        out: pages with block numbers as positions, or rows one after the other, ``out_width`` a request.
        kept: what is told the new lengths; ``old`` is then told too.
    """
    arguments = _Pool(
        keys=_rows(rows), means=_rows(out._replace(table_width=out_width)), olds=old.data_ptr(), news=new.data_ptr(),
        counts=None if kept is None else kept.counts.data_ptr(), tickets=None if kept is None else kept.tickets.data_ptr(),
        block_size=block_size, programs=programs,
    )  # fmt: skip
    _launch(f"pool_{dim}", arguments, programs * len(old), rows, block_size, dim)


def own_sums(rows: Rows, positions: Tensor, requests: Tensor, lengths: Tensor, block_size: int, sums: Tensor) -> None:
    """Write the sum of each query's own block up to the query into ``sums``, fp32 ``[Q, D]``; not that of a query which completes it."""
    dim = sums.shape[1]
    arguments = _Own(
        keys=_rows(rows), positions=positions.data_ptr(), requests=requests.data_ptr(), lengths=lengths.data_ptr(), sums=sums.data_ptr(),
        num_queries=len(positions), num_requests=len(lengths), block_size=block_size,
    )  # fmt: skip
    _launch(f"own_{dim}", arguments, len(positions), rows, block_size, dim)


def _rows(rows: Rows) -> _Rows:
    return _Rows(*(x.data_ptr() if isinstance(x, Tensor) else x for x in rows))


def _launch(name: str, arguments: ctypes.Structure, grid: int, rows: Rows, block_size: int, dim: int) -> None:
    pages = -(-block_size // rows.page_size) + 1
    shared = PARTS * PART * (dim + 4) + 4 * (dim // 32 + 1 + pages)
    launch.launch("walk", name, arguments, grid, dim, shared, rows.values.device)
