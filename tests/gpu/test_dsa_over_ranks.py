"""A model's step over two ranks that share one GPU, in CUDA graphs, with exchanges over symmetric memory."""

from __future__ import annotations

import pytest
import torch

from thresher.bench import model_check
from thresher.bench.model_step import ModelStep, all_slots, to_all
from thresher.distributed.collectives import own_heads
from thresher.distributed.shards import union
from thresher.models.dsa_config import parse_config
from thresher.models.dsa_decoder import DsaDecoder
from thresher.models.dsa_weights import share_model
from thresher.models.published import PUBLISHED, random_model
from thresher.models.tiny_checkpoint import TINY
from thresher.selectors import DSA, HISA, Dense
from thresher.types import PartialAttention, Selection

from ..models.dsa_peer import FAMILIES, TOPK
from .test_symmetric import TURNS, Ranks, poisoned  # noqa: F401

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LENGTH, REQUESTS, NUM = 200, 2, 2


class Copies:
    """One rank that takes its own for the others': what is launched once before graphs are recorded, so that all kernels are loaded."""

    def __init__(self, rank: int) -> None:
        self.rank, self.ranks = rank, NUM

    def gather(self, x):
        return x[None].repeat(NUM, *[1] * x.dim())

    def gather_heads(self, x, shares):
        return x.repeat(1, NUM, *[1] * (x.dim() - 2))

    def merge(self, part):
        return part

    def merge_heads(self, part, shares):
        own = own_heads(shares, self.rank)
        return PartialAttention(part.out[:, own].contiguous(), part.lse[:, own].contiguous())


def join(model, ranks) -> None:
    model.ranks = ranks
    for layer in model.layers:
        layer.ranks = ranks


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("selector", [DSA(TOPK), HISA(topk=TOPK, block_size=8, num_blocks=6), Dense()])
@pytest.mark.parametrize("placement", ["replicated", "exact", "idsa:granularity=4"])
def test_two_ranks_on_one_gpu(family, selector, placement, monkeypatch):
    """Every rank and every replay has the same bits. Parts of sums are bf16, and so a block or two of the sets of later layers differ."""
    config = parse_config({**PUBLISHED[family], **TINY[family], "moe_intermediate_size": 64})  # half of it is aligned
    whole = random_model(config, torch.bfloat16, "cuda")
    ids = torch.tensor([3, 4], device="cuda")
    joined = Ranks(NUM)
    decoders, steps, graphs, outs = [], [], [], []
    for rank in range(NUM):
        decoder = DsaDecoder(share_model(whole, Copies(rank)), LENGTH, REQUESTS, placement=placement)
        decoder.fill(LENGTH)
        ModelStep(decoder, selector, ids).whole()
        decoders.append(decoder)
    for rank, decoder in enumerate(decoders):
        step = ModelStep(decoder, selector, ids)
        join(decoder.model, joined.ranks[rank])
        decoder.ranks = joined.ranks[rank]
        step.attend = attend_of(decoder, selector)
        steps.append(step)  # a graph keeps nothing alive
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=joined.streams[rank], capture_error_mode="relaxed"):
            outs.append(step.whole())
        graphs.append(graph)
    turns = []
    for _ in range(TURNS):
        joined.run(lambda rank: graphs[rank.rank].replay())
        turns.append([out.clone() for out in outs])
    assert all(torch.equal(out, turns[0][0]) for turn in turns for out in turn)
    there = DsaDecoder(whole, LENGTH, REQUESTS)
    there.fill(LENGTH)
    monkeypatch.setattr(model_check, "ModelStep", lambda *given: Replayed(turns[0][0]))
    monkeypatch.setattr(model_check, "gather_union", lambda picked, where, ranks: unions(decoders, where, picked))
    monkeypatch.setattr(model_check, "ODD", 0.35)
    with torch.no_grad():
        assert model_check._differs(decoders[0], there, selector, ids.cpu()) is None


class Replayed:
    """A step that was taken."""

    def __init__(self, out) -> None:
        self.out = out

    def whole(self):
        return self.out


def attend_of(decoder, selector):
    """As ``ModelStep`` makes it, for the ranks that the decoder has by now."""
    positions, slots, requests = decoder.last()
    if isinstance(selector, Dense):
        return to_all(decoder, slots, all_slots(decoder))
    return decoder.attending(decoder.model.config.plan(selector), positions, slots, requests)


def unions(decoders, where, picked) -> Selection:
    """Of the layer that ``picked`` is of on the first rank."""
    layer = next(layer for layer, chosen in decoders[0].selections.items() if chosen is picked)
    if where.kind == "replicated":
        return Selection(picked.indices, picked.lengths)
    sets = [decoder.selections[layer] for decoder in decoders]
    width = max(chosen.topk for chosen in sets)
    padded = [torch.nn.functional.pad(chosen.indices, (0, width - chosen.topk), value=-1) for chosen in sets]
    return union([Selection(indices, (indices >= 0).sum(1), "local") for indices in padded], where)

