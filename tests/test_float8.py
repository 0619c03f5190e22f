"""No torch operation on e4m3 tensors that some device or version lacks: their bytes are indexed and joined instead."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from thresher.cache.placement import Placement
from thresher.distributed import IDSA, ExactMerge, Single
from thresher.models.decoder import Decoder
from thresher.selectors import DSA, HISA, MISA, Dense, MISARandom, MISARerank, MISAStatic, Oracle

from .models.tiny import tiny_indexers, tiny_model, tokens

ABSENT = ("__setitem__", "cat", "stack", "gather", "index_select", "take_along_dim", "where", "masked_fill", "sort", "topk", "abs", "mul")
METHODS = (
    *(Single(s) for s in (Dense(), DSA(9), MISA(3, 8, 9), MISARerank(3, 8, 20, 9), HISA(4, 6, 9), Oracle(9), MISARandom(3, topk=9))),
    Single(MISAStatic((1, 4), 9)),
    *(IDSA(DSA(9), 3), IDSA(HISA(4, 6, 9), 2), ExactMerge(MISA(3, 8, 9), 2)),
)


def by_tensor(index):
    return any(isinstance(part, torch.Tensor) for part in (index if isinstance(index, tuple) else (index,)))


class Strict(TorchFunctionMode):
    """Refuses what a GPU may refuse."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        listed = [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else [arg])]
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float8_e4m3fn for x in listed):
            assert name not in ABSENT, f"{name} of float8"
            assert name != "__getitem__" or not by_tensor(args[1]), "float8 indexed by a tensor"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{type(method).__name__}-{type(method.selector).__name__}")
def test_decoding_asks_nothing_of_float8(method):
    model, indexers = tiny_model(), tiny_indexers()
    with torch.inference_mode(), Strict():
        decoder = Decoder(model, indexers)
        decoder.prefill(tokens(40))
        dealt = decoder.dealt(method.placement) if method.placement != Placement(1) else decoder
        for ids in (tokens(3, seed=4), tokens(1, seed=5)):
            dealt.step(ids, [method] * 3)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x[torch.tensor([1])],
        lambda x: x[:, torch.tensor([1])],
        lambda x: torch.cat([x, x]),
        lambda x: x.index_select(0, torch.tensor([1])),
    ],
)
def test_what_is_refused_is_seen(wrong):
    x = torch.zeros(2, 4).to(torch.float8_e4m3fn)
    with Strict(), pytest.raises(AssertionError, match="float8"):
        wrong(x)
    with Strict():
        assert x[1:, None].view(torch.uint8)[torch.tensor([0])].shape == (1, 1, 4)
