"""The check before a model's step is timed: the same step on a CPU, by the reference; over ranks, the same step on one device."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thresher.bench.model_step import ModelStep, without_indexers
from thresher.cache.state import LayerState
from thresher.distributed.parse import place
from thresher.distributed.shards import gather_union
from thresher.distributed.simulate import OverRanks
from thresher.errors import ThresherError
from thresher.models.dsa_cache import Fp8Cache
from thresher.models.dsa_config import DsaConfig
from thresher.models.dsa_decoder import DsaDecoder
from thresher.models.dsa_layers import DsaModel
from thresher.selectors import Dense, LayerPlan, Selector, Shared
from thresher.types import AttentionInputs, IndexKeys, IndexQuery, Selection

CHECKED = 12 * 1024  # tokens: enough for HISA to choose among blocks
# What bf16 products summed in another order may make of a selection, as a share of it, and of logits, as a share of their length: twice to
# four times what bf16 weights and fp32 ones differ by. Attention to other tokens moves logits by 0.4 and more.
ODD, OFF = 0.05, 0.02


@dataclass(frozen=True)
class Beside(Selector):
    """Selects by itself, notes how far that is from what was selected elsewhere, and goes on with the latter: the step after it is then
    compared over the same tokens.

    Attributes:
        own: the selector, or a placement around it, whose ranks are simulated.
        other: what was selected elsewhere, for the same queries.
        odd: the share of it that was not selected here, largest of the rows, one entry a call.
    """

    own: Selector | OverRanks
    other: Selection
    odd: list[float] = field(default_factory=list)

    @property
    def topk(self) -> int | None:
        return self.own.topk if isinstance(self.own, Selector) else self.own.width

    def select(
        self, query: IndexQuery, keys: IndexKeys, state: LayerState | None = None, attention: AttentionInputs | None = None
    ) -> Selection:
        """See ``Selector.select``."""
        mine = self.own.select(query, keys, state, attention)
        sets = [[set(row) - {-1} for row in picked.indices.tolist()] for picked in (self.other, mine)]
        self.odd.append(max(len(theirs ^ here) / (2 * max(len(theirs), 1)) for theirs, here in zip(*sets, strict=True)))
        return self.other


def check_model(model: DsaModel, selectors: dict[str, Selector], batch: int, length: int, seed: int) -> None:
    """Raise unless a step of ``batch`` requests of ``length`` tokens has the same bits twice and agrees with the reference on a CPU.

    Raises:
        ThresherError: naming the selector and what differs.
    """
    here, there = (DsaDecoder(made, length, batch) for made in (model, _on_cpu(model)))
    for decoder in (here, there):  # which hand out pages alike
        decoder.fill(length, seed)
    _check(here, there, selectors, seed, "the reference")


def check_over_ranks(
    whole: DsaModel, model: DsaModel, placement: str, selectors: dict[str, Selector], batch: int, length: int, seed: int
) -> None:
    """Raise unless a step over ranks has the same bits twice, attends to what one process that simulates the ranks
    attends to, and gives the logits of the whole model on one device.

    Args:
        whole: the whole model, on this rank's device.
        model: this rank's share of it.
        placement: as for ``DsaDecoder``.
        selectors, batch, length, seed: as for ``check_model``.

    Raises:
        ThresherError: naming the selector and what differs.
    """
    here, there = DsaDecoder(model, length, batch, placement=placement), DsaDecoder(whole, length, batch)
    for decoder in (here, there):
        decoder.fill(length, seed)
    _check(here, there, selectors, seed, "one device")


def _check(here: DsaDecoder, there: DsaDecoder, selectors: dict[str, Selector], seed: int, other: str) -> None:
    ids = torch.randint(here.model.config.vocab_size, (here.table.num_requests,), generator=torch.Generator().manual_seed(seed))
    for name, selector in selectors.items():
        why = _differs(here, there, selector, ids)
        if why is not None:
            raise ThresherError(f"a step by {name} must agree with {other}; got: {why}; no time is taken on a red check")


def _differs(here: DsaDecoder, there: DsaDecoder, selector: Selector, ids: Tensor) -> str | None:
    """Why the step of one decoder is not the other's, or None."""
    config, dense = here.model.config, isinstance(selector, Dense)
    with without_indexers(here.model) if dense else nullcontext():
        step = ModelStep(here, selector, ids.to(here.model.device))
        got = step.whole()
        if not torch.equal(got, step.whole()):
            return "a second run gives other bits"
    plan = config.plan(selector) if dense else _beside(config, selector, here, there)
    for request in range(len(ids)):
        there.rollback(here.length() - 1, request)
    if here.ranks.ranks == 1:
        _copy_caches(here, there)  # another device draws other numbers
    device = there.model.device
    want = there.step(ids.to(device), plan, torch.arange(len(ids), device=device)).cpu()
    odd = max((share for chosen in plan if isinstance(chosen, Beside) for share in chosen.odd), default=0.0)
    off = float((got.cpu() - want).norm() / want.norm())
    if not odd <= ODD:
        return f"{odd:.1%} of a selection is not selected there, over {ODD:.0%}"
    return None if off <= OFF else f"logits are off by {off:.2g} of their length, over {OFF:.2g}"


def _beside(config: DsaConfig, selector: Selector, here: DsaDecoder, there: DsaDecoder) -> LayerPlan:
    """A plan for the other decoder: where a layer has an indexer, what was selected here, by all ranks together."""
    device = there.model.device
    (over,) = place(here.placement, [selector], here.ranks.ranks)
    layers: list[Selector] = []
    for layer, source in enumerate(config.index_layers):
        if source == layer:
            picked = gather_union(here.selections[layer], over.placement, here.ranks)
            other = Selection(picked.indices.to(device), picked.lengths.to(device))
            layers.append(Beside(selector if here.ranks.ranks == 1 else over, other))
        else:
            layers.append(Shared(source))
    return LayerPlan(tuple(layers))


def _copy_caches(here: DsaDecoder, there: DsaDecoder) -> None:
    """All tokens."""
    for mine, theirs in zip(here.caches, there.caches, strict=True):
        assert isinstance(mine, Fp8Cache)
        assert isinstance(theirs, Fp8Cache)
        theirs.latents.data.copy_(mine.latents.data)
        theirs.keys.pages.copy_(mine.keys.pages)


def _on_cpu(model: DsaModel) -> DsaModel:
    """The model itself where it is on one."""
    if model.device.type == "cpu":
        return model
    with torch.device("meta"):
        shapes = DsaModel(model.config, model.embed.weight.dtype)
    twin = shapes.to_empty(device="cpu").requires_grad_(False).eval()
    twin.load_state_dict(model.state_dict())
    return twin
