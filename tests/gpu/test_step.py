"""One launch a step of decoding: the sets, order and scores of the two steps, bit for bit, eager and in a graph with other lengths."""

from __future__ import annotations

import importlib

import pytest
import torch

from thresher.ops import pool_blocks, to_slots
from thresher.ops.hisa_select import cuda as hisa
from thresher.ops.hisa_select.reference import hisa_select_reference
from thresher.ops.score_select import cuda as step
from thresher.types import Selection

from .compare import differ, fail_on
from .machine import DEVICE, INTERPRET, REPEATS
from .test_graphs import Recorded
from .test_score_select import world

scores_of = importlib.import_module("thresher.ops.index_score.triton")
select = importlib.import_module("thresher.ops.select.triton")
pytestmark = pytest.mark.skipif(INTERPRET, reason="a kernel in CUDA C++ cannot be interpreted")


def two_steps(query, keys, topk: int) -> Selection:
    return select.select_topk(scores_of.paged_index_score(query, keys), topk)


def problems(got: Selection, want: Selection, query, keys) -> list[str | None]:
    slots = to_slots(want.indices, keys.page_table, query.requests, 64, impl="reference")
    found = [differ("indices", got.indices, want.indices), differ("lengths", got.lengths, want.lengths), differ("slots", got.slots, slots)]
    return found if got.scores is None else [*found, differ("scores", got.scores, want.scores)]


@pytest.mark.parametrize(
    ("kind", "lengths", "num", "heads", "dim", "topk"),
    [
        ("normal", [33000], 1, 64, 128, 2048),
        ("normal", [131072], 1, 64, 128, 2048),
        ("normal", [1000, 70, 40000, 131072, 64, 1], 6, 64, 128, 2048),
        ("sorted", [9000, 33000, 300], 9, 32, 128, 2048),
        ("normal", [20000] * 40, 140, 16, 64, 512),
        ("plateaus", [30000], 2, 64, 128, 2048),
        ("ascending", [30000], 1, 8, 64, 2048),
        ("descending", [30000], 4, 64, 128, 2048),
        ("nan", [30000, 5000], 8, 40, 128, 2048),
        ("signs", [8000, 100], 5, 12, 128, 100),
        ("normal", [131072] * 40, 40, 64, 128, 2048),  # more orders than shared memory holds
    ],
)
@pytest.mark.parametrize("with_scores", [True, False])
def test_it_is_the_two_steps(kind, lengths, num, heads, dim, topk, with_scores):
    query, keys = world(kind, lengths, num, heads, dim)
    assert step.unsupported(query, keys, topk) is None
    want = two_steps(query, keys, topk)
    for _ in range(REPEATS):
        fail_on(problems(step.score_select(query, keys, topk, with_scores), want, query, keys))


@pytest.mark.parametrize(
    ("kind", "lengths", "num", "heads", "dim", "block", "num_blocks", "topk"),
    [
        ("normal", [131072], 1, 64, 128, 128, 64, 2048),
        ("normal", [1000, 70, 40000, 131072, 64, 1], 6, 64, 128, 128, 64, 2048),
        ("sorted", [9000, 33000, 300], 9, 32, 128, 64, 40, 512),
        ("normal", [20000] * 40, 140, 16, 64, 192, 11, 512),
        ("plateaus", [30000], 2, 64, 128, 128, 16, 2048),
        ("descending", [30000], 4, 64, 128, 128, 64, 2048),
        ("nan", [30000, 5000], 8, 40, 128, 128, 20, 2048),
        ("signs", [8000, 100], 5, 12, 128, 64, 5, 100),
    ],
)
@pytest.mark.parametrize("with_scores", [True, False])
def test_it_is_the_four_operations(kind, lengths, num, heads, dim, block, num_blocks, topk, with_scores):
    query, keys = world(kind, lengths, num, heads, dim)
    means = pool_blocks(keys, block)
    given = query, keys, means, num_blocks, block, topk
    assert hisa.unsupported(query, keys, means, num_blocks, block, topk) is None
    want = hisa_select_reference(*given, True, "triton")
    for _ in range(REPEATS):
        fail_on(problems(hisa.hisa_select(*given, with_scores), want, query, keys))


def test_a_graph_is_right_at_other_lengths():
    query, keys = world("normal", [40000, 131072, 9000], 3, 64, 128)
    query.requests[:] = torch.arange(3, device=DEVICE)

    def run() -> list[torch.Tensor]:
        got = step.score_select(query, keys, 2048, False)
        return [got.indices, got.lengths, got.slots]

    recorded = Recorded(run)
    for lengths in ([40000, 131072, 9000], [100, 5, 0], [33333, 2048, 2049], [1, 131072, 64], [-5, 100000, 9000]):
        keys.lengths.copy_(torch.tensor(lengths))
        query.positions.copy_(torch.tensor(lengths) - 1)
        want = two_steps(query, keys, 2048)
        for _ in range(3):
            indices, taken, slots = recorded.replay()
            fail_on(problems(Selection(indices, taken, slots=slots), want, query, keys))
