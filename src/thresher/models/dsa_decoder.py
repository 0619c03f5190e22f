"""A paged decoder of DSA models, for several requests: exact, and meant to be measured. Serving is an engine's job.

Every token attends to what a selector picks for it, in prefill as in decoding; ``Dense`` picks all. A layer without an indexer of its own
asks with the query and the keys of the layer that selects for it. Over ranks every process runs the same tokens, with its share of the
model and, unless they are replicated, of the tokens held.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from thresher.cache.placed import PlacedTable
from thresher.cache.scratch import Scratch
from thresher.cache.state import LayerState
from thresher.distributed.collectives import check_ranks
from thresher.distributed.parse import place
from thresher.errors import require
from thresher.models.dsa_cache import PAGE_SIZE, PRECISIONS, DsaCache, Fp8Cache
from thresher.models.dsa_dealt import attend_dealt
from thresher.models.dsa_layers import Attend, DsaInput, DsaModel, IndexInput
from thresher.ops.to_slots import slots_of
from thresher.selectors import Dense, LayerPlan, Selector
from thresher.types import AttentionInputs, IndexQuery, Selection

CHUNK = 1024
"""Tokens that go through the model at once; over ranks an eighth, which is what their exchanges have room for."""
FILLED = 2**14
"""Tokens that ``fill`` draws at once."""


class DsaDecoder:
    """Requests and their caches.

    Args:
        model: the weights.
        capacity: tokens that each request may reach.
        num_requests: how many there may be.
        precision: ``"fp8"``, the caches and the indexer as they are served; ``"fp32"``, nothing quantised.
        placement: where the tokens live, as text: ``"replicated"``, ``"exact"``, ``"idsa:granularity=64"``, over the model's ranks.

    Raises:
        ThresherError: a capacity past the model's positions, no request, an unknown precision, or a placement that cannot be read, is for
            another number of ranks than the model, or deals out tokens in fp32.
    """

    def __init__(
        self, model: DsaModel, capacity: int, num_requests: int = 1, precision: str = "fp8", placement: str = "replicated"
    ) -> None:
        config = model.config
        longest = config.max_position_embeddings
        require(1 <= capacity <= longest, f"capacity must lie in 1..{longest}, the model's positions", capacity, "pass the longest text")
        require(precision in PRECISIONS, f"precision must be one of {', '.join(PRECISIONS)}", repr(precision), "name one")
        require(num_requests >= 1, "num_requests must be at least 1", num_requests, "pass the number of texts")
        self.model, self.capacity, self.ranks, self.placement = model, capacity, model.ranks, placement
        (where,) = place(placement, [Dense()], self.ranks.ranks)
        check_ranks(where.placement.ranks, self.ranks)
        self.dealt = self.ranks.ranks > 1 and where.placement.kind != "replicated"
        require(precision == "fp8" or not self.dealt, "tokens that are dealt out must be fp8", precision, "pass placement='replicated'")
        self.tokens = PlacedTable(num_requests, capacity, where.placement, self.ranks.rank, PAGE_SIZE, model.device)
        self.table = self.tokens.pages
        make = PRECISIONS[precision]
        sources = config.index_layers
        self.caches: list[DsaCache] = [make(config, self.table, source == layer) for layer, source in enumerate(sources)]
        selections: dict[int, Selection] = {}
        scratch = Scratch()
        self.states = [LayerState(layer, selections, scratch) for layer in range(len(sources))]

    @property
    def selections(self) -> dict[int, Selection]:
        """Layer -> what was selected for the tokens that last went through the model together; local, where they are dealt out."""
        return self.states[0].selections

    def length(self, request: int = 0) -> int:
        """Tokens held for ``request``."""
        return self.tokens.length(request)

    def prefill(self, ids: Tensor, plan: LayerPlan | Selector | None = None, request: int = 0) -> Tensor:
        """Run a whole context and fill the caches.

        Args:
            ids: int64 ``[T]``, the request's first tokens.
            plan: as for ``run``.
            request: which one; it must be empty.

        Returns:
            fp32 ``[vocab]``: logits after the last token.

        Raises:
            ThresherError: the request has tokens already, or what ``run`` raises.
        """
        held = self.length(request)
        require(held == 0, "prefill starts a request", f"{held} tokens held", f"call rollback(0, request={request}) first")
        return self._last_logits(ids, plan, request)

    def step(self, ids: Tensor, plan: LayerPlan | Selector | None = None, requests: Tensor | None = None) -> Tensor:
        """``run``, with logits: one token of each of several requests, or several of one. fp32 ``[T, vocab]``."""
        return self.model.logits(self.run(ids, plan, requests))

    @torch.no_grad()
    def run(self, ids: Tensor, plan: LayerPlan | Selector | None = None, requests: Tensor | None = None) -> Tensor:
        """Run T further tokens, each attending to what ``plan`` picks for it. A failure leaves nothing behind.

        Args:
            ids: int64 ``[T]``; those of one request in the order of its text.
            plan: a selector a layer; or one selector, which a layer without an indexer does not run but shares (``DsaConfig.plan``); or
                None, the model's own.
            requests: int64 ``[T]``, the request of each token; all of request 0 if None.

        Returns:
            ``[T, hidden]``, after the final norm.

        Raises:
            ThresherError: no token, one past the vocabulary, a text past the capacity, or a plan for another number of layers.
        """
        config = self.model.config
        requests = torch.zeros_like(ids) if requests is None else requests
        right = ids.dtype == requests.dtype == torch.int64 and ids.dim() == 1 and ids.shape == requests.shape
        got = f"{ids.dtype} {tuple(ids.shape)} and {requests.dtype} {tuple(requests.shape)}"
        require(right, "ids and requests must be int64 [T]", got, "pass a request per token")
        require(len(ids) > 0, "there must be a token to run", 0, "pass a text")
        low, high = (int(x) for x in ids.aminmax())
        require(low >= 0 and high < config.vocab_size, f"ids must lie in [0, {config.vocab_size})", f"{low}..{high}", "use its tokenizer")
        plan = plan if isinstance(plan, LayerPlan) else config.plan(plan)
        require(len(plan) == len(self.states), f"the plan must name {len(self.states)} layers", len(plan), "use LayerPlan.uniform")
        low, high = (int(x) for x in requests.aminmax())
        count = self.table.num_requests
        require(low >= 0 and high < count, f"requests must lie in [0, {count})", f"{low}..{high}", "make the decoder for more")
        before = {request: self.length(request) for request in requests.unique().tolist()}
        try:
            at_once = CHUNK if self.ranks.ranks == 1 else CHUNK // 8
            parts = zip(ids.split(at_once), requests.split(at_once), strict=True)
            return torch.cat([self._run(some, of, plan) for some, of in parts])
        except BaseException:
            for request, length in before.items():
                self.rollback(min(length, self.length(request)), request)
            raise

    def generate(self, ids: Tensor, max_tokens: int, plan: LayerPlan | Selector | None = None, request: int = 0) -> Iterator[int]:
        """Run ``ids [T]`` and then decode greedily.

        Yields token ids until one that ends the text or ``max_tokens`` of them.
        """
        logits = self._last_logits(ids, plan, request)
        for count in range(max_tokens):
            token = int(logits.argmax())
            if token in self.model.config.eos_token_ids:
                return
            yield token
            if count + 1 < max_tokens:
                logits = self._last_logits(ids.new_tensor([token]), plan, request)

    def rollback(self, length: int, request: int = 0) -> None:
        """Forget every token of ``request`` past the first ``length``."""
        held = self.tokens.rollback(request, length)
        for state in self.states:
            state.rollback(request, held)

    @torch.no_grad()
    def fill(self, length: int, seed: int = 0) -> None:
        """Give every request ``length`` tokens of random latents and index keys, for measurements that need no text: far quicker than a
        prefill.

        Args:
            length: tokens of each request; all must be empty.
            seed: equal seeds give equal caches on one kind of device, and over ranks a share of the same.

        Raises:
            ThresherError: a length outside the capacity, or a request that holds tokens.
        """
        require(1 <= length <= self.capacity, f"length must lie in 1..{self.capacity}, the capacity", length, "pass fewer tokens")
        held = sum(self.length(request) for request in range(self.table.num_requests))
        require(held == 0, "only an empty decoder can be filled", f"{held} tokens held", "make a new one")
        config, device, dtype = self.model.config, self.model.device, self.model.embed.weight.dtype
        draw = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, device=device)

        slots = torch.cat([self.tokens.append(request, length) for request in range(self.table.num_requests)])
        for part in slots.split(FILLED):
            for layer, (cache, source) in enumerate(zip(self.caches, config.index_layers, strict=True)):
                none = normal(len(part), 0, 0)
                index = IndexInput(none, none, normal(len(part), config.index_head_dim)) if source == layer else None
                latent, rope = normal(len(part), config.kv_lora_rank), normal(len(part), config.qk_rope_head_dim)
                cache.store(part, DsaInput(none, latent.to(dtype), rope.to(dtype), index, layer))

    def attending(self, plan: LayerPlan, positions: Tensor, slots: Tensor, requests: Tensor) -> Attend:
        """How the layers of a step attend, for tokens that have their place: what ``run`` gives the model, and what a CUDA graph can hold.

        Nothing is appended, so a step may be run again, whole or a layer of it; layers in order.

        Args:
            plan: a selector a layer.
            positions, slots: int64 ``[T]``, where each token stands in its request and in the caches.
            requests: int64 ``[T]``, the request of each.
        """
        if self.dealt:
            caches = [cache for cache in self.caches if isinstance(cache, Fp8Cache)]
            placed = place(self.placement, plan, self.ranks.ranks)
            return attend_dealt(self.model.config, self.ranks, placed, caches, self.states, positions, slots, requests)
        asked: dict[int, IndexQuery] = {}

        def attend(given: DsaInput) -> Tensor:
            cache, source = self.caches[given.layer], self.model.config.index_layers[given.layer]
            if given.index is None:
                cache.store(slots, given)
            else:
                asked[given.layer] = cache.store_and_ask(slots, given, positions, requests)
            picked = self.caches[source].select(plan[given.layer], asked[source], self.states[given.layer], self._inputs(given))
            self.selections[given.layer] = picked
            return cache.attend(given.q, slots_of(picked, self.table.table, requests, PAGE_SIZE), picked.slots is None)

        return attend

    def last(self) -> tuple[Tensor, Tensor, Tensor]:
        """The last token of every request: its position, its slot on this rank (-1 if another holds it) and its request, int64 ``[B]``."""
        ends = [self.length(request) - 1 for request in range(self.table.num_requests)]
        positions = torch.tensor(ends, device=self.model.device)
        slots = torch.cat([self.tokens.slots(request, positions[request, None]) for request in range(len(ends))])
        return positions, slots, torch.arange(len(ends), device=self.model.device)

    def _last_logits(self, ids: Tensor, plan: LayerPlan | Selector | None, request: int) -> Tensor:
        """fp32 ``[vocab]``, after the last of further tokens of one request."""
        return self.model.logits(self.run(ids, plan, torch.full_like(ids, request))[-1:])[0]

    def _run(self, ids: Tensor, requests: Tensor, plan: LayerPlan) -> Tensor:
        positions, slots = self._append(requests)
        return self.model(ids, positions, self.attending(plan, positions, slots, requests))

    def _append(self, requests: Tensor) -> tuple[Tensor, Tensor]:
        """Positions and slots, int64 ``[T]``, of the next tokens of their requests."""
        positions, slots = torch.empty_like(requests), torch.empty_like(requests)
        for request in requests.unique().tolist():
            rows = (requests == request).nonzero()[:, 0]
            start = self.length(request)
            slots[rows] = self.tokens.append(request, len(rows))
            positions[rows] = torch.arange(start, start + len(rows), device=rows.device)
        return positions, slots

    def _inputs(self, given: DsaInput) -> AttentionInputs | None:
        """For selectors that look at true mass, over all heads: on one rank."""
        if self.ranks.ranks > 1:
            return None
        cache = self.caches[given.layer]
        return AttentionInputs(given.q, lambda request: self._latents(cache, request), self.model.config.softmax_scale)

    def _latents(self, cache: DsaCache, request: int) -> Tensor:
        """The attention's keys ``[length, 1, 576]`` of one request, in position order."""
        every = torch.arange(self.length(request), device=self.model.device)
        return cache.load(self.table.slots(request, every))[:, None]
