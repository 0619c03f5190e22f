"""Checks that several operations share: values in bounds, and paged index keys with their queries."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.checks import check_kind
from thresher.errors import require
from thresher.ops.dispatch import checks_values, device_of
from thresher.types import IndexKeys, IndexQuery

Bounds = tuple[str, Tensor, int | None, int | None, str]


def check_values(*bounds: Bounds) -> None:
    """Raise unless every value lies in its bounds. One read for all of them; none where ``checks_values`` says so.

    Args:
        bounds: ``(name, integer tensor, low, high, what to do)``, all on one device; None where there is no bound.

    Raises:
        ThresherError: naming the tensor, its bounds, and the smallest and largest value it has.
    """
    held = [bound for bound in bounds if bound[1].numel()]
    if not held or not checks_values(held[0][1].device):
        return
    ends = torch.stack([end.long() for bound in held for end in torch.aminmax(bound[1])]).tolist()
    for (name, _, low, high, do), least, most in zip(held, ends[::2], ends[1::2], strict=True):
        if low is not None and high is not None:
            require(low <= least and most <= high, f"{name} must be in {low}..{high}", f"{least}..{most}", do)
        elif low is not None:
            require(low <= least, f"{name} must be at least {low}", least, do)
        elif high is not None:
            require(most <= high, f"{name} must be at most {high}", most, do)


def check_means(means: IndexKeys, keys: IndexKeys) -> None:
    """Raise unless these can be the means of the blocks of these keys, by their sizes.

    Raises:
        ThresherError: something else than keys, other requests or another head dim, pages that are strided, or devices that differ.
    """
    check_kind("means", means, IndexKeys, "pass what pool_blocks returns")
    got = f"{means.num_requests} requests, head_dim {means.head_dim}"
    ok = (means.num_requests, means.head_dim) == (keys.num_requests, keys.head_dim)
    must = f"means must hold the {keys.num_requests} requests of keys, with head_dim {keys.head_dim}"
    require(ok and means.pages.is_contiguous(), must, got, "pass what pool_blocks returns")
    device_of(keys=keys.pages, means=means.pages, page_table=means.page_table, lengths=means.lengths)


def check_paged(query: IndexQuery, keys: IndexKeys) -> torch.device:
    """Raise unless these queries can be asked of these keys; returns their device.

    Raises:
        ThresherError: something else than queries and keys, head dims or devices that differ, pages that are strided, a request that is
            not there, or a length that is negative or more than the page table has room for.
    """
    check_kind("query", query, IndexQuery, "build one from q, weights, positions and requests")
    check_kind("keys", keys, IndexKeys, "take IndexKeyCache.view or pack_keys")
    dim = query.q.shape[2]
    require(dim == keys.head_dim, f"query and keys must share the head dim {keys.head_dim}", dim, "use the indexer that filled the cache")
    device = device_of(
        query=query.q,
        weights=query.weights,
        positions=query.positions,
        requests=query.requests,
        pages=keys.pages,
        page_table=keys.page_table,
        lengths=keys.lengths,
    )
    require(keys.pages.is_contiguous(), "pages must be contiguous", f"strides {keys.pages.stride()}", "pass IndexKeyCache.pages")
    room = keys.room
    check_values(
        ("requests", query.requests, 0, keys.num_requests - 1, "name a row of page_table"),
        ("lengths", keys.lengths, 0, room, "pass the tokens that page_table holds"),
    )
    return device
