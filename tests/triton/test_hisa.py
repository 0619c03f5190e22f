"""HISA on kernels: what it launches, what the host reads, and the same set as from scores of a list of tokens."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from thresher.cache import LayerState, pack_keys
from thresher.ops import dispatch, gathered_index_score, select_topk
from thresher.ops.hisa_select.reference import choose_blocks
from thresher.selectors import HISA
from thresher.selectors.scan import block_means
from thresher.types import IndexKeys, IndexQuery

from .test_index_score import integers

HOST_READS = ("tolist", "item", "__bool__", "__int__", "__float__")


def world(lengths: list[int], num: int) -> tuple[IndexQuery, IndexKeys]:
    gen = torch.Generator().manual_seed(0)
    keys = pack_keys([(integers(n, 64, seed=n), 2.0 ** torch.randint(-3, 3, (n,), generator=gen).float()) for n in lengths])
    positions = torch.randint(-1, max(lengths) + 5, (num,), generator=gen)
    query = IndexQuery(integers(num, 4, 64, seed=1), torch.randn(num, 4, generator=gen), positions, torch.arange(num) % len(lengths))
    return query, keys


class Launches(TorchDispatchMode):
    """Names of what would be launched on a GPU, in order: kernels, and those of torch's operations that do more than look or allocate."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        self.reads: list[str] = []
        self.inside = False
        launch = GridExecutor.__call__

        def run(executor, *args, **kwargs):
            self.names.append(executor.fn.__name__)
            self.inside = True
            try:
                return launch(executor, *args, **kwargs)
            finally:
                self.inside = False

        monkeypatch.setattr(GridExecutor, "__call__", run)
        for name in HOST_READS:
            monkeypatch.setattr(torch.Tensor, name, self.reading(name, getattr(torch.Tensor, name)))

    def reading(self, name, read):
        def look(tensor, *args):
            if not self.inside:
                self.reads.append(name)
            return read(tensor, *args)

        return look

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if not self.inside and not func.is_view and "empty" not in func.__name__:
            self.names.append(func.__name__.split(".")[0])
        return made


def test_six_launches_and_no_look_at_the_device(monkeypatch):
    """Values are not checked on a GPU, so not here; there another kernel scores the means of many queries."""
    for name in ("arguments", "select", "pool_keys"):
        monkeypatch.setattr(importlib.import_module(f"thresher.ops.{name}"), "checks_values", lambda device: False)
    query, keys = world([700, 300], 9)
    selector, state = HISA(64, 4, 100), LayerState(0)
    with dispatch.using("triton"):
        fresh = selector.select(query, keys, state)
        with Launches(monkeypatch) as launches:
            again = selector.select(query, keys, state)
        assert launches.names == ["_pool_kernel", "floor_divide", "paged_kernel", "blocks_kernel", "block_kernel", "one_program"]
        stateless = selector.select(query, keys)
        assert launches.reads == []
    for other in (again, stateless):
        assert torch.equal(other.indices, fresh.indices)
        assert torch.equal(other.scores.view(torch.int32), fresh.scores.view(torch.int32))


@pytest.mark.parametrize(("block_size", "num_blocks"), [(64, 4), (128, 2), (7, 9)])
def test_the_set_of_a_list_of_tokens(block_size, num_blocks):
    """Blocks spelt out as positions, scored and selected one by one."""
    query, keys = world([700, 0, 130], 10)
    selector = HISA(block_size, num_blocks, 60)
    with dispatch.using("triton"):
        got = selector.select(query, keys)
        blocks = choose_blocks(query, keys, block_means(keys, block_size, None), selector.num_blocks, block_size).long()
        tokens = (blocks[:, :, None] * block_size + torch.arange(block_size)).flatten(1)
        tokens = tokens.masked_fill((blocks < 0).repeat_interleave(block_size, 1), -1)
        want = select_topk(gathered_index_score(query, keys, tokens), 60, positions=tokens)
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.lengths, want.lengths)
    assert torch.equal(got.scores.view(torch.int32), want.scores.view(torch.int32))
