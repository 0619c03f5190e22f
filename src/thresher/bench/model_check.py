"""The check before a model's step is timed: the same step on a CPU, by the reference."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thresher.bench.model_step import ModelStep, without_indexers
from thresher.cache.state import LayerState
from thresher.errors import ThresherError
from thresher.models.dsa_cache import Fp8Cache
from thresher.models.dsa_config import DsaConfig
from thresher.models.dsa_decoder import DsaDecoder
from thresher.models.dsa_layers import DsaModel
from thresher.selectors import Dense, LayerPlan, Selector, Shared
from thresher.types import AttentionInputs, IndexKeys, IndexQuery, Selection

CHECKED = 12 * 1024  # tokens: enough for HISA to choose among blocks
REQUESTS = 2
# What bf16 products summed in another order may make of a selection, as a share of it, and of logits, as a share of their length: twice to
# four times what bf16 weights and fp32 ones differ by. Attention to other tokens moves logits by 0.4 and more.
ODD, OFF = 0.05, 0.02


@dataclass(frozen=True)
class Beside(Selector):
    """Selects by itself, notes how far that is from what another device selected, and goes on with the latter: the step after it is then
    compared over the same tokens.

    Attributes:
        own: the selector.
        other: what was selected elsewhere, for the same queries.
        odd: the share of it that was not selected here, largest of the rows, one entry a call.
    """

    own: Selector
    other: Selection
    odd: list[float] = field(default_factory=list)

    @property
    def topk(self) -> int | None:
        return self.own.topk

    def select(
        self, query: IndexQuery, keys: IndexKeys, state: LayerState | None = None, attention: AttentionInputs | None = None
    ) -> Selection:
        """See ``Selector.select``."""
        mine = self.own.select_indices(query, keys, state, attention)
        pairs = zip(self.other.indices.tolist(), mine.indices.tolist(), strict=True)
        self.odd.append(max(len(set(theirs) ^ set(here)) / (2 * len(set(theirs))) for theirs, here in pairs))
        return self.other


def check_model(model: DsaModel, selectors: dict[str, Selector], length: int, seed: int) -> None:
    """Raise unless a step of two requests of ``length`` tokens has the same bits twice and agrees with the reference on a CPU.

    Raises:
        ThresherError: naming the selector and what differs.
    """
    here, there = (DsaDecoder(made, length, REQUESTS) for made in (model, _on_cpu(model)))
    for decoder in (here, there):  # which hand out pages alike
        decoder.fill(length, seed)
    ids = torch.randint(model.config.vocab_size, (REQUESTS,), generator=torch.Generator().manual_seed(seed))
    for name, selector in selectors.items():
        why = _differs(here, there, selector, ids)
        if why is not None:
            raise ThresherError(f"a step by {name} must agree with the reference; got: {why}; no time is taken on a red check")


def _differs(here: DsaDecoder, there: DsaDecoder, selector: Selector, ids: Tensor) -> str | None:
    """Why the step of one decoder is not the other's, or None."""
    config, dense = here.model.config, isinstance(selector, Dense)
    with without_indexers(here.model) if dense else nullcontext():
        step = ModelStep(here, selector, ids.to(here.model.device))
        got = step.whole()
        if not torch.equal(got, step.whole()):
            return "a second run gives other bits"
    plan = config.plan(selector) if dense else _beside(config, selector, here)
    _copy_caches(here, there)
    want = there.step(ids, plan, torch.arange(len(ids)))
    odd = max((share for chosen in plan if isinstance(chosen, Beside) for share in chosen.odd), default=0.0)
    off = float((got.cpu() - want).norm() / want.norm())
    if not odd <= ODD:
        return f"{odd:.1%} of a selection is not selected by the reference, over {ODD:.0%}"
    return None if off <= OFF else f"logits are off by {off:.2g} of their length, over {OFF:.2g}"


def _beside(config: DsaConfig, selector: Selector, here: DsaDecoder) -> LayerPlan:
    picked = {layer: Selection(chosen.indices.cpu(), chosen.lengths.cpu()) for layer, chosen in here.selections.items()}
    sources = enumerate(config.index_layers)
    return LayerPlan(tuple(Beside(selector, picked[layer]) if source == layer else Shared(source) for layer, source in sources))


def _copy_caches(here: DsaDecoder, there: DsaDecoder) -> None:
    """All tokens but the last of each request."""
    for request in range(REQUESTS):
        there.rollback(here.length() - 1, request)
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
