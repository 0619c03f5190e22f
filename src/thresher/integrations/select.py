"""A selector on a model's own index queries and keys, as one operator of PyTorch.

To a compiler it is ``torch.ops.thresher.select_columns``, of known shape; so a model compiles with it as it does without. It reads lengths
on the host, and no CUDA graph can hold it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from thresher.cache import LayerState, pack_keys
from thresher.integrations.masks import Seen, read_mask
from thresher.integrations.precision import encode_keys, encode_queries
from thresher.selectors import Selector
from thresher.types import AttentionInputs, IndexQuery

SCHEMA = (
    "(int rule, int layer, SymInt width, Tensor q, Tensor weights, Tensor k, Tensor mask, Tensor[] attention, float scale) -> Tensor"
)


@dataclass(frozen=True)
class Rule:
    """Which tokens, and how exactly they are scored ("model" or "fp8")."""

    selector: Selector
    precision: str


_rules: list[Rule] = []


def number_of(rule: Rule) -> int:
    """The number that the operator knows a rule by. Equal rules have one, so that a compiled model meets it again."""
    if rule not in _rules:
        _rules.append(rule)
    return _rules.index(rule)


@torch.library.custom_op("thresher::select_columns", mutates_args=(), schema=SCHEMA, tags=(torch.Tag.cudagraph_unsafe,))
def select_columns(
    rule: int, layer: int, width: int, q: Tensor, weights: Tensor, k: Tensor, mask: Tensor, attention: list[Tensor], scale: float
) -> Tensor:
    """The columns that each query attends to.

    Args:
        rule: a number that ``number_of`` gave.
        layer: of the model, for selectors that draw by it.
        width: columns of the result, at least as many as a query selects.
        q: ``[B, S, H, D]``, after RoPE.
        weights: fp32 ``[B, S, H]``, with every factor.
        k: ``[B, T, D]``, after RoPE.
        mask: ``[B or 1, S, T]``, as ``read_mask`` takes it.
        attention: nothing, or the attention's own queries ``[B, N, S, Dk]`` and keys ``[B, N, T, Dk]``.
        scale: the attention's, for these.

    Returns:
        int32 ``[B, S, width]``. A row that selects fewer columns repeats its first; one that sees none is all 0.

    Raises:
        ThresherError: what ``read_mask``, ``encode_keys`` and the selector raise.
    """
    batch, length = q.shape[:2]
    seen = read_mask(mask.expand(batch, -1, -1))
    if not seen.spans:
        return q.new_zeros((batch, length, width), dtype=torch.int32)
    selector, precision = _rules[rule].selector, _rules[rule].precision
    values, scales = encode_keys(torch.cat([k[row, start:end] for row, start, end in seen.spans]), precision)
    sizes = [end - start for _, start, end in seen.spans]
    keys = pack_keys(list(zip(values.split(sizes), scales.split(sizes), strict=True)))
    encoded = encode_queries(q.flatten(0, 1), weights.flatten(0, 1), k.dtype, precision)
    query = IndexQuery(*encoded, seen.positions, seen.requests)
    inputs = _attention_inputs(attention, scale, seen) if attention else None
    # A state of this call alone: what was kept could be of tokens that the model's cache has cut since, or of another beam.
    picked = selector.select_indices(query, keys, LayerState(layer), inputs).indices[:, :width]
    picked = pad(picked, (0, width - picked.shape[1]), value=-1)
    columns = torch.where(picked < 0, picked[:, :1].clamp(min=0), picked) + seen.first[:, None]
    return columns.int().view(batch, length, width)


@select_columns.register_fake
def _(
    rule: int, layer: int, width: int, q: Tensor, weights: Tensor, k: Tensor, mask: Tensor, attention: list[Tensor], scale: float
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], width), dtype=torch.int32)


def _attention_inputs(attention: list[Tensor], scale: float, seen: Seen) -> AttentionInputs:
    """What ``select_columns`` is given, by requests."""
    q, k = attention

    def load_keys(request: int) -> Tensor:
        row, start, end = seen.spans[request]
        return k[row, :, start:end].transpose(0, 1)

    return AttentionInputs(q.transpose(1, 2).flatten(0, 1), load_keys, scale)
