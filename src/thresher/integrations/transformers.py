"""``use(model, selector)``: a DSA model of transformers attends to the tokens that a selector picks.

Nothing of transformers is imported or changed: each indexer object has another ``forward`` while the context lasts. It calls the modules of
that indexer and the rotary function of its modeling file, keeps the model's own cache of index keys up to date, and hands queries, weights
and keys to the selector. docs/transformers.md is for users.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from thresher.errors import require
from thresher.integrations.precision import PRECISIONS
from thresher.integrations.select import Rule, number_of, select_columns
from thresher.selectors import LayerPlan, Oracle, Selector, Shared

# Class of a layer's attention -> the function of its modeling file that turns the indexer's queries and keys.
FAMILIES = {"DeepseekV32Attention": "apply_rotary_pos_emb", "GlmMoeDsaAttention": "apply_rotary_pos_emb_interleave"}
# What turns the attention's own, in both.
ATTENTION_ROPE = "apply_rotary_pos_emb_interleave"


@contextmanager
def use(model: nn.Module, selector: Selector | LayerPlan, precision: str = "model") -> Iterator[None]:
    """Inside the block the model attends to the tokens that the selector picks; after it, to its own again.

    Prefill, decoding with the model's caches, ``generate`` and ``torch.compile`` go on as before. Of nested blocks the inner one holds.
    Layers without an indexer (``config.indexer_types``) go on sharing the selection of the layer before.

    Args:
        model: a ``DeepseekV32ForCausalLM`` or ``GlmMoeDsaForCausalLM`` of transformers 5.17 to 5.24, or its base model, with the attention
            "sdpa" or "eager".
        selector: one for every layer, or a plan with one for each.
        precision: "model" scores with the model's own queries and keys, as its own indexer does; "fp8" first turns both by Hadamard and
            rounds them to FP8, as the published models do and as kernels take them.

    Raises:
        ThresherError: another model, selector or precision, or a plan that does not fit the layers. A forward raises it for another
            attention, for an attention mask with gaps, and for what the selector refuses.

    Source: DeepSeek-V3.2-Exp (arXiv 2512.02556); GLM-5 (arXiv 2602.15763).
    """
    layers = _attention_layers(model)
    require(precision in PRECISIONS, f"precision must be one of {', '.join(PRECISIONS)}", repr(precision), "check the spelling")
    plan = _plan(selector, [layer.indexer is not None for layer in layers])
    hooks: dict[int, _Hook] = {}
    with ExitStack() as undo:
        for i, layer in enumerate(layers):
            if layer.indexer is None:
                continue
            own = plan[i]
            hooks[i] = _Hook(layer, i, own, precision, hooks[own.layer] if isinstance(own, Shared) else None)
            _replace(undo, layer.indexer, "forward", hooks[i].forward)
            if hooks[i].sees_attention:
                _replace(undo, layer, "expand_kv", hooks[i].expand_kv)
        yield


class _Hook:
    """Stands in for the ``forward`` of one indexer. Its methods are bound, so that a copy of the model gets its own.

    Args:
        attention: that the indexer belongs to.
        layer: its number.
        selector: for this layer.
        precision: as for ``use``.
        source: the layer whose selection this one takes, or None.
    """

    def __init__(self, attention: Any, layer: int, selector: Selector, precision: str, source: _Hook | None) -> None:
        self.attention, self.layer, self.source = attention, layer, source
        self.rule, self.topk = number_of(Rule(selector, precision)), selector.topk
        kind = _kind(attention)
        assert kind is not None
        functions = vars(sys.modules[kind.__module__])
        self.rotate, self.rotate_attention = functions[FAMILIES[kind.__name__]], functions[ATTENTION_ROPE]
        self.sees_attention = isinstance(selector, Oracle)
        self.own_expand_kv = attention.expand_kv
        self.attention_keys: Tensor | None = None
        self.lends, self.lent = False, torch.empty(0)
        if source is not None:
            source.lends = True

    @torch.no_grad()
    def forward(
        self,
        hidden_states: Tensor,
        q_resid: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,  # what the cache is called up to 5.23
    ) -> Tensor:
        """int32 ``[B, S, k]``: the columns that each query attends to, as the indexer's own ``forward`` gives them."""
        indexer = self.attention.indexer
        attention = indexer.config._attn_implementation
        # Any other would take the indices as they are, and count one that is repeated twice.
        require(attention in ("eager", "sdpa"), "the model's attention must be eager or sdpa", attention, "call set_attn_implementation")
        cache = past_key_values if cache is None else cache
        q, k = self.queries_and_keys(hidden_states, q_resid, position_embeddings)
        if cache is not None:
            k = cache.update_indexer(k, indexer.layer_idx)
        if self.source is not None:
            return self.source.lent
        factor = indexer.n_heads**-0.5 * indexer.softmax_scale
        weights = indexer.weights_proj(hidden_states.to(indexer.weights_proj.weight.dtype)).float() * factor
        columns = k.shape[1]
        width = columns if self.topk is None else min(self.topk, columns)
        seen = self.attention_inputs(q_resid, position_embeddings, cache, columns) if self.sees_attention else []
        scale = float(self.attention.scaling)
        picked: Tensor = select_columns(self.rule, self.layer, width, q, weights, k, attention_mask, seen, scale)
        if self.lends:
            self.lent = picked
        return picked

    def queries_and_keys(self, hidden_states: Tensor, q_resid: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The indexer's queries ``[B, S, H, D]`` and new keys ``[B, S, D]``."""
        indexer = self.attention.indexer
        rotary = indexer.qk_rope_head_dim
        q = indexer.wq_b(q_resid).unflatten(-1, (indexer.n_heads, indexer.head_dim))
        k = indexer.k_norm(indexer.wk(hidden_states)).unsqueeze(2)
        q_rot, k_rot = self.rotate(q[..., :rotary], k[..., :rotary], *position_embeddings, unsqueeze_dim=2)
        return torch.cat([q_rot, q[..., rotary:]], dim=-1), torch.cat([k_rot, k[..., rotary:]], dim=-1).squeeze(2)

    def expand_kv(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """The attention's own ``expand_kv``; its keys are kept for ``attention_inputs``, which follows in the same forward."""
        self.attention_keys, values = self.own_expand_kv(kv_nope, k_rot)
        return self.attention_keys, values

    def attention_inputs(self, q_resid: Tensor, position_embeddings: tuple[Tensor, Tensor], cache: Any, columns: int) -> list[Tensor]:
        """The attention's queries ``[B, N, S, Dk]`` and keys ``[B, N, columns, Dk]``."""
        attention = self.attention
        keys, self.attention_keys = self.attention_keys, None
        assert keys is not None
        if keys.shape[2] < columns:  # 5.17 expands new tokens alone; its cache holds keys that are expanded
            keys = cache.layers[attention.layer_idx].keys
        plain = attention.qk_nope_head_dim
        q = attention.q_b_proj(q_resid).unflatten(-1, (-1, attention.qk_head_dim)).transpose(1, 2)
        q_rot, _ = self.rotate_attention(q[..., plain:], q[..., plain:], *position_embeddings)
        return [torch.cat([q[..., :plain], q_rot], dim=-1), keys]


def _attention_layers(model: object) -> list[Any]:
    """The attention of every layer, in order."""
    found = [module for module in model.modules() if _kind(module)] if isinstance(model, nn.Module) else []
    must = "model must be a DeepseekV32 or GlmMoeDsa model of transformers"
    require(bool(found), must, type(model).__name__, "pass DeepseekV32ForCausalLM, say")
    return found


def _kind(module: nn.Module) -> type | None:
    """The class of ``FAMILIES`` that a module is of, or None."""
    return next((kind for kind in type(module).__mro__ if kind.__name__ in FAMILIES), None)


def _plan(selector: object, full: list[bool]) -> list[Selector]:
    """The selector of every layer; a ``Shared`` names the layer with an indexer whose selection it takes.

    Args:
        selector: what the caller passed.
        full: whether a layer has an indexer; one without shares the selection of the last that has.
    """
    ok = isinstance(selector, Selector | LayerPlan) and not isinstance(selector, Shared)
    require(ok, "selector must be a Selector or a LayerPlan", repr(selector), "pass DSA(), say; Shared stands in a LayerPlan alone")
    num = len(full)
    plan = LayerPlan.uniform(selector, num) if isinstance(selector, Selector) else selector
    assert isinstance(plan, LayerPlan)
    require(len(plan) == num, f"the plan must have {num} layers, as the model has", len(plan), "give each layer a selector")
    owner = [max((j for j in range(i + 1) if full[j]), default=i) for i in range(num)]
    chosen = [Shared(owner[each.layer]) if isinstance(each, Shared) else each for each in plan]
    for i, own in enumerate(owner):
        must = f"layer {i} has no indexer and shares the selection of layer {own}, so a plan must give both the same selector"
        require(full[i] or chosen[i] in (chosen[own], Shared(own)), must, chosen[i], f"give it Shared({own})")
    return chosen


def _replace(undo: ExitStack, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Give an object an attribute; on exit, what it had of its own before, or none."""
    own = vars(module)
    if name in own:
        undo.callback(own.__setitem__, name, own[name])
    else:
        undo.callback(own.pop, name)
    own[name] = function
