"""The indexer's key cache: D + 4 bytes a token, block-planar in each page (132 bytes at D = 128, as DeepSeek-V3.2 stores it)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad

from thresher.cache.pages import check_slots
from thresher.errors import require
from thresher.types import IndexKeys, IndexQuery

HAS_TRITON = find_spec("triton") is not None


def planes(pages: Tensor) -> tuple[Tensor, Tensor]:
    """The two planes of each page, as views of the same memory.

    Args:
        pages: uint8 ``[P, page_size, 1, D + 4]``, contiguous: ``page_size * D`` e4m3 values, then ``page_size`` fp32 scales.

    Returns:
        values: float8_e4m3fn ``[P, page_size, D]``.
        scales: fp32 ``[P, page_size]``.
    """
    num_pages, page_size, _, width = pages.shape
    head_dim = width - 4
    flat = pages.view(num_pages, page_size * width)
    values = flat[:, : page_size * head_dim].unflatten(1, (page_size, head_dim)).view(torch.float8_e4m3fn)
    return values, flat[:, page_size * head_dim :].view(torch.float32)


def store_keys(pages: Tensor, slots: Tensor, values: Tensor, scales: Tensor) -> None:
    """``IndexKeyCache.store`` into pages that need not belong to an ``IndexKeyCache``."""
    num, page_size, dim = slots.shape[0], pages.shape[1], pages.shape[3] - 4
    _check_key(values, scales)
    require(values.shape == (num, dim), f"values must be [{num}, {dim}]", tuple(values.shape), "pass one key per slot")
    check_slots(slots, pages.shape[0] * page_size)
    page, offset = slots // page_size, slots % page_size
    all_values, all_scales = planes(pages)
    all_values.view(torch.uint8)[page, offset] = values.view(torch.uint8)
    all_scales[page, offset] = scales


class IndexKeyCache:
    """Storage for index keys, written by slot.

    Attributes:
        pages: uint8 ``[P, page_size, 1, D + 4]``; zero until written.

    Args:
        num_pages: P.
        head_dim: D, a multiple of 4 (so that scales are aligned).
        page_size: tokens in a page.
        device: where ``pages`` lives.
    """

    def __init__(self, num_pages: int, head_dim: int, page_size: int = 64, device: torch.device | str = "cpu") -> None:
        require(
            num_pages >= 0 and page_size >= 1,
            "num_pages must be at least 0 and page_size at least 1",
            f"{num_pages}, {page_size}",
            "fix them",
        )
        require(head_dim >= 4 and head_dim % 4 == 0, "head_dim must be a positive multiple of 4", head_dim, "pad the keys with zeros")
        self.pages = torch.zeros(num_pages, page_size, 1, head_dim + 4, dtype=torch.uint8, device=device)

    @property
    def page_size(self) -> int:
        return self.pages.shape[1]

    @property
    def head_dim(self) -> int:
        return self.pages.shape[3] - 4

    def store(self, slots: Tensor, values: Tensor, scales: Tensor) -> None:
        """Write keys at ``slots``.

        Args:
            slots: int64 ``[n]``, distinct.
            values: float8_e4m3fn ``[n, D]``.
            scales: fp32 ``[n]``.

        Raises:
            ThresherError: wrong shapes or dtypes, a slot outside the cache, or a NaN or infinity in values or scales
                (nothing is written then).
        """
        store_keys(self.pages, slots, values, scales)

    def view(self, page_table: Tensor, lengths: Tensor) -> IndexKeys:
        """The keys of every request, sharing this cache's memory.

        Args:
            page_table: int32 ``[B, max_pages]``, ``PageTable.table``.
            lengths: int64 ``[B]``, ``PageTable.lengths``.
        """
        return IndexKeys(self.pages, page_table.to(self.pages.device), lengths.to(self.pages.device))


def load_keys(keys: IndexKeys, request: int, start: int = 0, end: int | None = None) -> tuple[Tensor, Tensor]:
    """The keys of one request at positions ``start..end - 1``, in position order (a copy).

    Args:
        keys: paged keys.
        request: row of ``keys.page_table``.
        start: first position.
        end: one past the last position; the request's length when None.

    Returns:
        values: float8_e4m3fn ``[end - start, D]``.
        scales: fp32 ``[end - start]``.

    Raises:
        ThresherError: no such request, or a range that is not within its length.
    """
    require(0 <= request < keys.num_requests, f"request must lie in [0, {keys.num_requests})", request, "pass a row of the page table")
    length = int(keys.lengths[request])
    end = length if end is None else end
    require(0 <= start <= end <= length, f"start..end must lie within 0..{length}", f"{start}..{end}", "ask for tokens the request holds")
    size = keys.page_size
    first = start // size
    pages = keys.page_table[request, first : -(-end // size)]
    values, scales = planes(keys.pages)
    cut = slice(start - first * size, end - first * size)
    got = values.view(torch.uint8).index_select(0, pages).view(torch.float8_e4m3fn).flatten(0, 1)
    return got[cut], scales.index_select(0, pages).flatten()[cut]


def visible_counts(query: IndexQuery, keys: IndexKeys) -> Tensor:
    """int64 ``[Q]``: how many keys each query sees, ``min(position + 1, length)``, 0 at position -1."""
    if query.q.is_cuda and HAS_TRITON:
        from thresher.cache.device import count_visible

        return count_visible(query, keys)
    return torch.minimum(query.positions + 1, keys.lengths[query.requests]).clamp(min=0)


def pack_keys(requests: Sequence[tuple[Tensor, Tensor]], page_size: int = 64) -> IndexKeys:
    """Pack contiguous keys into fresh pages, request after request.

    Args:
        requests: for each request, values float8_e4m3fn ``[n, D]`` and scales fp32 ``[n]``; n may be 0.
        page_size: tokens in a page.

    Raises:
        ThresherError: no request, mixed head dims, or what ``IndexKeyCache.store`` refuses.
    """
    require(len(requests) >= 1, "requests must hold at least one (values, scales) pair", 0, "pass one pair per request")
    for values, scales in requests:
        _check_key(values, scales)
    dims = sorted({values.shape[1] for values, _ in requests})
    require(len(dims) == 1, "every request must have the same head_dim", dims, "pack one model's keys")
    device, dim = requests[0][0].device, dims[0]
    counts = [scales.shape[0] for _, scales in requests]
    needed = [-(-count // page_size) for count in counts]
    room = [pages * page_size - count for pages, count in zip(needed, counts, strict=True)]
    values = torch.cat([pad(x.view(torch.uint8), (0, 0, 0, more)) for (x, _), more in zip(requests, room, strict=True)])
    scales = torch.cat([pad(x, (0, more)) for (_, x), more in zip(requests, room, strict=True)])
    pages = torch.cat((values.view(-1, page_size * dim), scales.view(-1, page_size).view(torch.uint8)), dim=1)
    ends = list(accumulate(needed))
    width = max(1, *needed)
    rows = [[*range(end - pages, end), *[-1] * (width - pages)] for end, pages in zip(ends, needed, strict=True)]
    table = torch.tensor(rows, dtype=torch.int32).to(device, non_blocking=True)
    lengths = torch.tensor(counts, dtype=torch.int64).to(device, non_blocking=True)
    return IndexKeys(pages.view(-1, page_size, 1, dim + 4), table, lengths)


def _check_key(values: Tensor, scales: Tensor) -> None:
    ok = values.dtype == torch.float8_e4m3fn and values.dim() == 2
    require(ok, "values must be float8_e4m3fn [n, head_dim]", f"{values.dtype} {tuple(values.shape)}", "use quantize_fp8")
    ok = scales.dtype == torch.float32 and scales.shape == values.shape[:1]
    require(ok, f"scales must be float32 [{values.shape[0]}]", f"{scales.dtype} {tuple(scales.shape)}", "use quantize_fp8")
    # 0x7F and 0xFF are e4m3's only non-finite bytes.
    finite = torch.isfinite(scales).all() & ((values.view(torch.uint8) & 0x7F) != 0x7F).all()
    require(bool(finite), "index keys must be finite", "a NaN or an infinity", "check the layer before it")
