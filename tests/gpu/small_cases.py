"""One or two cases of every kernel, with garbage wherever a caller could leave some: for the repeats, and for ``tools/sanitize``.

    python -m tests.gpu.small_cases [--planted]

runs each once on the GPU. ``--planted`` runs one kernel that reads far past its memory instead: what a checker must find.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from thresher.cache import IndexKeyCache, LatentCache, pack_keys
from thresher.types import IndexKeys, IndexQuery, Selection

from .draw import GARBAGE, generator, paged, queries, query_of, vectors
from .machine import DEVICE, INTERPRET, sized

score = importlib.import_module("thresher.ops.index_score.triton")
select = importlib.import_module("thresher.ops.select.triton")
fused = importlib.import_module("thresher.ops.score_select.triton")
step = importlib.import_module("thresher.ops.score_select.cuda")
attention = importlib.import_module("thresher.ops.sparse_attend.triton")
merging = importlib.import_module("thresher.ops.merge.triton")
pooling = importlib.import_module("thresher.ops.pool_keys.triton")
quantizing = importlib.import_module("thresher.ops.quantize.triton")
routing = importlib.import_module("thresher.ops.route_heads.triton")

Run = Callable[[], list[Tensor]]
WILD = torch.tensor([-(2**63), -(2**31), -1, 0, 2**31 - 1, 2**40, 2**62, 1])
DIM, HEADS = 64, 16


def odd_world(page_size: int) -> tuple[IndexQuery, IndexKeys]:
    """Queries of requests and positions from anywhere; a table with holes and pages from anywhere; lengths past the table."""
    keys = paged([vectors(n, DIM, seed=n) for n in (150, 0, 193)], page_size)
    table = keys.page_table.clone()
    table[0, 1] = -1
    table[2, ::2] = GARBAGE[torch.arange(table.shape[1]) % len(GARBAGE)][::2].to(DEVICE)
    q, weights = queries(12, HEADS, DIM, seed=1)
    positions = torch.cat((WILD, torch.tensor([149, 192, 63, 70])))
    requests = torch.cat((torch.tensor([0, 2, 0, 2, 0, 2]), WILD[[0, 2, 5]], torch.tensor([2, 0, 1])))
    return query_of(q, weights, positions, requests), IndexKeys(keys.pages, table, torch.tensor([150, 0, 2**62], device=DEVICE))


def ragged() -> Run:
    q, weights = queries(9, HEADS, DIM, seed=2)
    k, scales = vectors(131, DIM, seed=3)
    ranges = torch.cat((WILD, torch.tensor([131]))).to(DEVICE), torch.cat((WILD.flip(0), torch.tensor([131]))).to(DEVICE)
    return lambda: [score.index_score(q, weights, k, scales, *ranges)]


def ragged_bf16() -> Run:
    gen = generator(4)
    q, k = torch.randn(9, HEADS, DIM, generator=gen).bfloat16().to(DEVICE), torch.randn(131, DIM, generator=gen).bfloat16().to(DEVICE)
    weights, scales = torch.randn(9, HEADS, generator=gen).to(DEVICE), torch.ones(131, device=DEVICE)
    ends = torch.arange(123, 132, device=DEVICE)
    return lambda: [score.index_score(q, weights, k, scales, ends - 120, ends)]


def paged_64() -> Run:
    given = odd_world(64)
    return lambda: [score.paged_index_score(*given, width=333)]


def paged_61() -> Run:
    given = odd_world(61)
    return lambda: [score.paged_index_score(*given, width=333)]


def many() -> Run:
    """Enough queries of each request for the Hopper kernel, in pages and contiguous."""
    query, keys = odd_world(64)
    q, weights = queries(96, 20, DIM, seed=14)
    times = torch.arange(96, device=DEVICE) % 12
    crowd = query_of(q, weights, query.positions[times], query.requests[times])
    k, scales = vectors(131, DIM, seed=3)
    ranges = WILD.to(DEVICE)[times % len(WILD)], WILD.flip(0).to(DEVICE)[times % len(WILD)]
    return lambda: [score.paged_index_score(crowd, keys, width=333), score.index_score(q, weights, k, scales, *ranges)]


def long_world(heads: int) -> tuple[IndexQuery, IndexKeys]:
    """Holes in the page table, requests from anywhere, and rows long enough for a level."""
    keys = paged([vectors(n, DIM, seed=n) for n in (17000, 70)], 64)
    table = keys.page_table.clone()
    table[0, 5:9] = torch.tensor([-1, 2**31 - 1, -(2**31), 10**6], dtype=torch.int32)
    q, weights = queries(70, heads, DIM, seed=15)
    where = torch.arange(70)
    requests = torch.where(where % 11 == 0, WILD[where % len(WILD)], where % 2)
    query = query_of(q, weights, torch.where(where % 7 == 0, -1, 17000 - 9 * where).clamp(max=17000), requests)
    return query, IndexKeys(keys.pages, table, keys.lengths)


def score_and_select(heads: int = 20) -> Run:
    query, keys = long_world(heads)

    def run() -> list[Tensor]:
        if DEVICE.type != "cuda":
            return []
        selection, redo = fused.first_try(query, keys, 200)
        return [selection.indices, selection.lengths, redo]

    return run


def score_and_select_few() -> Run:
    """Few heads, which are summed up by one thread, and take two tiles a turn."""
    return score_and_select(7)


def one_step() -> Run:
    """What a step of decoding launches, over these worlds."""
    worlds = [odd_world(64), long_world(7), long_world(40)]

    def run() -> list[Tensor]:
        if DEVICE.type != "cuda":
            return []
        found = []
        for query, keys in worlds:
            picked = step.score_select(query, keys, 200)
            found += [picked.indices, picked.lengths, picked.scores]
        return found

    return run


def redo() -> Run:
    """Some rows done again, of a world with holes, in pages of two sizes; the others are left as they were."""
    worlds = [odd_world(page_size) for page_size in (64, 61)]
    marks = (torch.arange(12) % 3 < 2).int().to(DEVICE)

    def run() -> list[Tensor]:
        found = []
        for query, keys in worlds:
            indices, scores = torch.full((12, 50), -7, dtype=torch.int32, device=DEVICE), torch.zeros(12, 50, device=DEVICE)
            again = Selection(indices, torch.full((12,), -7, device=DEVICE), scores=scores)
            fused.do_again(query, keys, marks, again)
            found += [again.indices, again.lengths, scores]
        return found

    return run


def gathered() -> Run:
    query, keys = odd_world(64)
    wanted = torch.randint(-5, 200, (12, 140), generator=generator(5))
    wanted[:, : len(WILD)] = WILD
    wanted = wanted.to(DEVICE)
    return lambda: [score.gathered_index_score(query, keys, wanted)]


def in_blocks() -> Run:
    """Blocks of a page and of a part of one, numbers from anywhere among them."""
    query, keys = odd_world(64)
    blocks = torch.randint(-2, 4, (12, 20), generator=generator(16), dtype=torch.int32)
    blocks[:, : len(GARBAGE)] = GARBAGE
    blocks = blocks.to(DEVICE)
    return lambda: [score.block_index_score(query, keys, blocks, size) for size in (64, 128, 7)]


def choose_blocks() -> Run:
    """Of requests and positions from anywhere; then the best tokens of the blocks, in a short row and in a long one."""
    query, keys = odd_world(64)
    scores = torch.randn(12, 700, generator=generator(17))
    scores[1], scores[2, ::3], scores[3] = -0.0, torch.nan, -torch.inf
    scores = scores.to(DEVICE)

    def run() -> list[Tensor]:
        found = []
        for size, width in ((16, 700), (1, 700), (16, 5)):
            blocks = select.select_blocks(scores[:, :width], 9, query, keys, size)
            among = scores.repeat(1, 22)
            found += [blocks]
            for each in (16, 1600):
                picked = select.select_topk_in_blocks(among[:, : blocks.shape[1] * each], 77, blocks, each)
                found += [picked.indices, picked.lengths, picked.scores]
        return found

    return run


def _selected(width: int, topk: int, times: int = 1) -> Run:
    gen = generator(width)
    scores = torch.randn(3, width, generator=gen)
    scores[1] = torch.where(torch.rand(width, generator=gen) < 0.9, -0.0, scores[1])
    scores[2, ::3], scores[2, 1::3] = -torch.inf, torch.nan
    scores = scores.repeat(times, 1).to(DEVICE)
    positions = torch.arange(width, device=DEVICE).repeat(3 * times, 1)
    positions[1, width // 2 :] = -1
    table = torch.cat((torch.arange(9).int(), GARBAGE)).expand(3, -1).to(DEVICE)
    requests = torch.tensor([1, 2**40, -1], device=DEVICE).repeat(times)

    def run() -> list[Tensor]:
        plain = select.select_topk(scores, topk, positions=positions)
        slots = select.select_topk_slots(scores, topk, table, requests, 61)
        return [plain.indices, plain.lengths, plain.scores, slots.indices, slots.lengths]

    return run


def select_short() -> Run:
    return _selected(1000, 64)


def select_long() -> Run:
    return _selected(20000, 512)


def select_many() -> Run:
    return _selected(9000, 256, 22)


def _slots(num: int, topk: int, total: int) -> Tensor:
    slots = torch.randint(total, (num, topk), generator=generator(6), dtype=torch.int32)
    junk = torch.cat((GARBAGE, torch.tensor([total], dtype=torch.int32)))[torch.arange(topk) % (len(GARBAGE) + 1)]
    slots[1, ::2], slots[2], slots[3] = junk[::2], -1, junk
    return slots.to(DEVICE)


def gqa() -> Run:
    gen = generator(7)
    q = torch.randn(4, 6, 64, generator=gen).bfloat16().to(DEVICE)
    k, v = (torch.randn(97, 2, dim, generator=gen).bfloat16().to(DEVICE) for dim in (64, 40))
    slots = _slots(4, 77, 97)

    def run() -> list[Tensor]:
        part = attention.sparse_attend(q, k, v, slots, 0.1)
        return [part.out, part.lse]

    return run


def mla() -> Run:
    gen = generator(8)
    q = torch.randn(4, 20, 576, generator=gen).bfloat16().to(DEVICE)
    latents = torch.randn(97, 576, generator=gen).bfloat16().to(DEVICE)
    slots = _slots(4, 77, 97)

    def run() -> list[Tensor]:
        part = attention.sparse_attend_mla(q, latents, slots, 0.07)
        return [part.out, part.lse]

    return run


def mla_fp8() -> Run:
    gen = generator(9)
    q = torch.randn(4, sized(65, 17), 576, generator=gen).bfloat16().to(DEVICE)
    cache = LatentCache(3, 31)
    cache.store(torch.arange(93), torch.randn(93, 512, generator=gen), torch.randn(93, 64, generator=gen))
    data, slots = cache.data.to(DEVICE), _slots(4, 77, 93)

    def run() -> list[Tensor]:
        part = attention.sparse_attend_mla_fp8(q, data, slots, 0.07)
        return [part.out, part.lse]

    return run


def merge() -> Run:
    gen = generator(10)
    out, lse = torch.randn(3, 5, 3, 130, generator=gen), torch.randn(3, 5, 3, generator=gen) * 20
    lse[0, 1], lse[:, 2] = -torch.inf, -torch.inf
    out[0, 1], out[:, 2] = torch.nan, torch.nan
    given = out.to(DEVICE), lse.to(DEVICE)

    def run() -> list[Tensor]:
        part = merging.merge_stacked(*given)
        return [part.out, part.lse]

    return run


def pool() -> Run:
    values, scales = vectors(150, DIM, seed=11)
    _, keys = odd_world(61)
    keys = IndexKeys(keys.pages, keys.page_table, torch.tensor([150, 0, 10**6], device=DEVICE))
    positions = torch.tensor([-1, 0, 149, 77], device=DEVICE)
    zeros = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    requests = torch.cat((WILD[:5], torch.tensor([0, 2]))).to(DEVICE)

    def run() -> list[Tensor]:
        pages = torch.zeros(2, 4, 1, DIM + 4, dtype=torch.uint8, device=DEVICE)
        table = torch.tensor([[1, -1, 7], [0, 2**31 - 1, 1], [0, -(2**31), 2]], dtype=torch.int32, device=DEVICE)
        pooling.pool_paged_keys(keys, zeros, 16, 200, IndexKeys(pages, table, zeros))
        own = pooling.paged_partial_means(keys, requests, WILD[:7].to(DEVICE), 16)
        flat, partial = pooling.pool_keys(values, scales, 16), pooling.partial_means(values, scales, 16, positions)
        # Requests 1 and 2 share page 0, but request 1 holds nothing: no block is written twice.
        return [pages, *flat, *partial, *own]

    return run


def route() -> Run:
    query, keys = odd_world(61)
    keys = IndexKeys(keys.pages, keys.page_table, torch.tensor([150, 0, 10**6], device=DEVICE))
    means = [pooling.pool_keys(*vectors(n, DIM, seed=n), 16) for n in (150, 0, 193)]
    wild = IndexKeys(keys.pages, keys.page_table.flip(0), torch.tensor([10**6, 10**6, 10**6], device=DEVICE))

    def run() -> list[Tensor]:
        mass, chosen = routing.routed_heads(query, means, keys, 16, 3)
        kept = [routing.routed_query(query, given, keys, 16, 3) for given in (means, wild, [(v[:0], s[:0]) for v, s in means])]
        beside = [routing.head_mass(query, wild, keys, 16), routing.route_heads(mass, 5)]
        return [mass, chosen, *beside, *(x for each in kept for x in (each.q.view(torch.uint8), each.weights))]

    return run


def quantize() -> Run:
    gen = generator(12)
    x = torch.randn(len(WILD), 2, DIM, generator=gen).bfloat16().to(DEVICE)
    latent, rope = torch.randn(len(WILD), 512, generator=gen).to(DEVICE), torch.randn(len(WILD), 64, generator=gen).to(DEVICE)
    weights, positions, slots = torch.randn(len(WILD), 2, generator=gen).to(DEVICE), WILD.clamp(0, 2**20).to(DEVICE), WILD.to(DEVICE)

    def run() -> list[Tensor]:
        cache, latents = IndexKeyCache(2, DIM, 5, DEVICE), LatentCache(2, 5, device=DEVICE)
        quantizing.store_index_keys(cache.pages, slots, x[:, 0], positions, 1e4, 32, "half")
        quantizing.store_latents(latents.data, slots, latent, rope, positions)
        folded = quantizing.quantize_queries(x, weights, positions, 1e4, 32, "interleaved", 0.3)
        return [cache.pages, latents.data, *folded, *quantizing.quantize_fp8(x)]

    return run


def empty_caches() -> Run:
    """No page, no token: not one byte may be read."""
    keys = pack_keys([(torch.zeros(0, DIM, device=DEVICE).to(torch.float8_e4m3fn), torch.zeros(0, device=DEVICE))])
    q, weights = queries(2, HEADS, DIM, seed=13)
    query = query_of(q, weights, [5, -1], [0, 3])
    wanted = torch.zeros(2, 5, dtype=torch.int64, device=DEVICE)
    return lambda: [
        score.paged_index_score(query, keys, width=70),
        score.gathered_index_score(query, keys, wanted),
        score.block_index_score(query, keys, wanted.int(), 64),
        select.select_blocks(torch.zeros(2, 3, device=DEVICE), 3, query, keys, 64),
    ]


CASES: dict[str, Callable[[], Run]] = {
    made.__name__: made
    for made in (
        ragged, ragged_bf16, paged_64, paged_61, many, gathered, in_blocks, choose_blocks, select_short, select_long, select_many,
        score_and_select, score_and_select_few, one_step, redo, gqa, mla, mla_fp8, merge, pool, route, quantize, empty_caches,
    )
}  # fmt: skip


@triton.jit
def _read_past_the_end(x, out, far):
    tl.store(out, tl.load(x + far))


def main() -> None:
    if INTERPRET or not torch.cuda.is_available():
        sys.exit("needs a CUDA device, and TRITON_INTERPRET=0")
    if "--planted" in sys.argv:
        x = torch.zeros(16, device=DEVICE)
        _read_past_the_end[(1,)](x, x, 2**20)
        torch.cuda.synchronize()
        return
    for name, make in CASES.items():
        make()()
        torch.cuda.synchronize()
        print(name, flush=True)


if __name__ == "__main__":
    main()
