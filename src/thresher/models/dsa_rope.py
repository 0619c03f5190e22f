"""RoPE of the DSA models, with YaRN's frequencies where a config asks for them (arXiv 2309.00071).

``ops.apply_rope`` knows one base for all frequencies; YaRN slows the low ones down by ``factor``, leaves the high ones, and joins the two
by a ramp. All in fp32 and on the CPU, as the published code makes them, since an angle is a frequency times a position of up to 2**20.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thresher.errors import require

DEFAULT = ("rope_theta", "rope_type", "type")
YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


@dataclass(frozen=True)
class Rope:
    """What the angles are made from.

    Attributes:
        theta: base of the frequencies.
        factor: YaRN's; 1 for none.
        trained_length: positions before YaRN (unread without it).
        beta_fast, beta_slow: a frequency stays from so many turns over those positions on, and is fully slowed down below so many.
        factor_of_turns: multiplies cosines and sines.
        softmax_factor: multiplies the softmax scale.
    """

    theta: float
    factor: float = 1.0
    trained_length: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    factor_of_turns: float = 1.0
    softmax_factor: float = 1.0


class Rotation(NamedTuple):
    """Cosines and sines of T positions, fp32 ``[T, dim / 2]``."""

    cos: Tensor
    sin: Tensor


def parse_rope(data: Mapping[str, Any]) -> Rope:
    """From ``rope_parameters``, or from ``rope_theta`` and ``rope_scaling``.

    Raises:
        ThresherError: a field that is missing or no number, an unknown kind of scaling, or a field that this module does not know.
    """
    given = data.get("rope_parameters")
    if given is None:
        given = {**(data.get("rope_scaling") or {}), **{name: data[name] for name in ("rope_theta",) if name in data}}
    require(isinstance(given, dict), "rope_parameters must be an object", repr(given), "fetch the published config.json")
    kind = given.get("rope_type", given.get("type", "default"))
    require(kind in ("default", "yarn"), "the rope_type must be default or yarn", repr(kind), "this decoder has no other")
    known = DEFAULT + YARN * (kind == "yarn")
    for name, value in given.items():
        require(name in known, f"a {kind} RoPE must have no fields but {', '.join(known)}", name, "this decoder would not follow it")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        require(number or name in ("rope_type", "type"), f"{name} must be a number", repr(value), "fetch the published config.json")
    needed = ("rope_theta", "factor", "original_max_position_embeddings") if kind == "yarn" else ("rope_theta",)
    for name in needed:
        require(name in given, f"config.json must have the field {name} of its RoPE", "none", "fetch the published config.json")
    if kind == "default":
        return Rope(float(given["rope_theta"]))
    factor, mscale, all_dims = float(given["factor"]), given.get("mscale"), given.get("mscale_all_dim")
    turns = _mscale(factor, mscale) / _mscale(factor, all_dims) if mscale and all_dims else _mscale(factor, 1.0)
    return Rope(
        float(given["rope_theta"]),
        factor,
        int(given["original_max_position_embeddings"]),
        float(given.get("beta_fast", 32)),
        float(given.get("beta_slow", 1)),
        turns,
        _mscale(factor, all_dims) ** 2 if all_dims else 1.0,
    )


def rotation(rope: Rope, dim: int, positions: Tensor) -> Rotation:
    """Cosines and sines for ``positions`` (int64 ``[T]``) of ``dim`` rotated dims."""
    angles = positions.float()[:, None] * _frequencies(rope, dim, positions.device)
    return Rotation(angles.cos() * rope.factor_of_turns, angles.sin() * rope.factor_of_turns)


def rotate(x: Tensor, turn: Rotation, style: str) -> Tensor:
    """Rotate pairs of the first dims of ``x``; the rest passes through.

    Args:
        x: ``[T, ..., D]``, any float type; D at least twice the rotation's width.
        turn: of the same T positions.
        style: ``"half"`` or ``"interleaved"``, as for ``ops.apply_rope``.

    Returns:
        fp32, the shape of x.
    """
    width = turn.cos.shape[-1]
    cos, sin = (t.view(len(x), *[1] * (x.dim() - 2), width) for t in turn)
    turned, rest = x.float().split([2 * width, x.shape[-1] - 2 * width], dim=-1)
    a, b = (turned[..., 0::2], turned[..., 1::2]) if style == "interleaved" else turned.chunk(2, dim=-1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    joined = torch.stack(pair, dim=-1).flatten(-2) if style == "interleaved" else torch.cat(pair, dim=-1)
    return torch.cat((joined, rest), dim=-1)


@cache
def _frequencies(rope: Rope, dim: int, device: torch.device) -> Tensor:
    """fp32 ``[dim / 2]``."""
    powers = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.factor == 1.0:
        return (1.0 / powers).to(device)
    # The dim whose frequency makes so many turns over the positions seen in training.
    first, last = (
        dim * math.log(rope.trained_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        for turns in (rope.beta_fast, rope.beta_slow)
    )
    low, high = max(math.floor(first), 0), min(math.ceil(last), dim - 1)
    width = high - low if high != low else 0.001
    slowed = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    kept = 1 - slowed
    return (1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept).to(device)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
