"""Sparse MLA by FlashMLA, through its Python package: over the FP8 cache (its decode kernel) and over bf16 latents (its prefill kernel).

It reads our caches as they lie. Converted are: slots outside the cache to -1; shapes, lse's too; lse +inf of an empty row to -inf; and the
output, which it rounds to bf16, to fp32: on a GPU in one launch before the package's and one after (``flash_mla_kernels``). It takes 64 or
128 heads and whole tiles of slots; nothing is padded here.

The decode kernel wants a schedule over the multiprocessors, which the package makes by a kernel at the first call with a new schedule
object, from shapes alone. ``sparse_attend_mla_fp8`` makes one at each call, and so may be recorded in a CUDA graph; engines make it once
for all layers of a step, as ``decode_inputs`` allows.

Source of the interface: FlashMLA, tokenspeed-flashmla 1.0.0.post20260615.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thresher.cache.latents import FP8_BYTES, LATENT_DIM, ROPE_DIM
from thresher.errors import ThresherError
from thresher.ops.dispatch import no_gradient, on_device
from thresher.types import PartialAttention

MLA_DIM = LATENT_DIM + ROPE_DIM
HEADS = (64, 128)
DECODE_TILE, PREFILL_TILE = 64, 128  # slots: K must be a multiple


class DecodeInputs(NamedTuple):
    """``q`` bf16 ``[Q, 1, N, 576]``, ``cache`` uint8 ``[P, page_size, 1, 656]``, ``slots`` int32 ``[Q, 1, K]``, the package's schedule."""

    q: Tensor
    cache: Tensor
    slots: Tensor
    schedule: Any


def load() -> Any:
    """The package."""
    return import_module("flash_mla")


def unsupported_mla(q: Tensor, latents: Tensor, value_dim: int = LATENT_DIM, slots: Tensor | None = None) -> str | None:
    """Why ``sparse_attend_mla`` cannot run here, or None."""
    if q.dtype != torch.bfloat16 or latents.dtype != torch.bfloat16:
        return f"needs bfloat16 queries and latents, not {q.dtype} and {latents.dtype}"
    if (latents.shape[-1], value_dim) != (MLA_DIM, LATENT_DIM):
        return f"needs latents of {MLA_DIM} dims with a value of {LATENT_DIM}, not {latents.shape[-1]} and {value_dim}"
    if latents.stride(1) != 1 or latents.stride(0) % 8 or latents.data_ptr() % 16:
        return "needs rows of latents at addresses that are multiples of 16 bytes"
    return _other_shape(q, slots, PREFILL_TILE) or no_gradient(q, latents)


def unsupported_mla_fp8(q: Tensor, cache_data: Tensor, slots: Tensor | None = None) -> str | None:
    """Why ``sparse_attend_mla_fp8`` cannot run here, or None."""
    if q.dtype != torch.bfloat16 or cache_data.dtype != torch.uint8:
        return f"needs bfloat16 queries and a uint8 cache, not {q.dtype} and {cache_data.dtype}"
    if q.dim() != 3 or q.shape[2] != MLA_DIM or cache_data.dim() != 4 or cache_data.shape[2:] != (1, FP8_BYTES):
        got = f"{list(q.shape)} and {list(cache_data.shape)}"
        return f"needs q [num_queries, heads, {MLA_DIM}] and a cache [pages, page_size, 1, {FP8_BYTES}], not {got}"
    apart = cache_data.stride(3) != 1 or (cache_data.shape[1] > 1 and cache_data.stride(1) != FP8_BYTES)
    if apart or cache_data.stride(0) % 16 or cache_data.data_ptr() % 16:
        return "needs the tokens of a page one after the other, and pages at addresses that are multiples of 16 bytes"
    return _other_shape(q, slots, DECODE_TILE) or no_gradient(q)


def worthwhile(q: Tensor) -> bool:
    """Whether "auto" takes ``sparse_attend_mla_fp8`` from here: not where our own kernel for Hopper can run. On an H200, for 1, 32 and 128
    queries of 128 heads, this one takes 34, 83 and 221 us with its schedule, which engines make once for all layers, and 18, 62 and 184
    without; ours 13, 67 and 209 (docs/lab-log.md)."""
    return not import_module("thresher.cache.device").runs_gluon(q)


def sparse_attend_mla(q: Tensor, latents: Tensor, slots: Tensor, scale: float, value_dim: int = LATENT_DIM) -> PartialAttention:
    """See ``thresher.ops.sparse_attend.sparse_attend_mla``; the output has bf16's precision. Slots outside 0..S - 1 count as absent."""
    _refuse(unsupported_mla(q, latents, value_dim, slots))
    if min(q.shape[0], latents.shape[0]) == 0:
        return _empty(q)
    with on_device(q):
        out, lse = prefill(q.contiguous(), latents[:, None], _inside(slots, latents.shape[0])[:, None], scale)
    return to_part(out, lse)


def sparse_attend_mla_fp8(q: Tensor, cache_data: Tensor, slots: Tensor, scale: float, early: bool = True) -> PartialAttention:
    """``sparse_attend_mla`` over the FP8 cache as it lies in memory; the output has bf16's precision.

    Args:
        q: bf16 ``[Q, N, 576]``, N 64 or 128.
        cache_data: uint8 ``[P, page_size, 1, 656]``, the bytes of ``LatentCache.data``; pages may lie apart.
        slots: int32 ``[Q, K]``, K a multiple of 64; slots outside the cache count as absent.
        scale: softmax scale.
        early: when it begins is the package's choice.

    Returns:
        out fp32 ``[Q, N, 512]`` and lse fp32 ``[Q, N]``; 0 and -inf for a row without slots.

    Raises:
        ThresherError: what ``unsupported_mla_fp8`` says.
    """
    _refuse(unsupported_mla_fp8(q, cache_data, slots))
    if min(q.shape[0], cache_data.shape[0], cache_data.shape[1]) == 0:
        return _empty(q)
    with on_device(q):
        out, lse = decode(decode_inputs(q, cache_data, slots), scale)
    return to_part(out[:, 0], lse[:, :, 0])


def decode_inputs(q: Tensor, cache_data: Tensor, slots: Tensor) -> DecodeInputs:
    """The arguments of ``sparse_attend_mla_fp8`` as the package wants them. The schedule is filled by the first ``decode``."""
    inside = _inside(slots, cache_data.shape[0] * cache_data.shape[1])
    return DecodeInputs(q.contiguous()[:, None], cache_data, inside[:, None], load().get_mla_metadata()[0])


def decode(inputs: DecodeInputs, scale: float) -> tuple[Tensor, Tensor]:
    """Call the package and nothing else: out bf16 ``[Q, 1, N, 512]`` and lse fp32 ``[Q, N, 1]``, +inf for a row without slots."""
    q, cache, slots, schedule = inputs
    out, lse = load().flash_mla_with_kvcache(
        q, cache, None, None, LATENT_DIM, schedule, None, softmax_scale=scale, is_fp8_kvcache=True, indices=slots
    )
    return out, lse


def prefill(q: Tensor, latents: Tensor, slots: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Call the package and nothing else.

    Args:
        q: bf16 ``[Q, N, 576]``.
        latents: bf16 ``[S, 1, 576]``.
        slots: int32 ``[Q, 1, K]``, -1 where absent.
        scale: softmax scale.

    Returns:
        out bf16 ``[Q, N, 512]`` and lse fp32 ``[Q, N]``, +inf for a row without slots.
    """
    out, _, lse = load().flash_mla_sparse_fwd(q, latents, slots, scale, LATENT_DIM)
    return out, lse


def to_part(out: Tensor, lse: Tensor) -> PartialAttention:
    """fp32, and lse -inf where the package says +inf."""
    if _has_kernels(out):
        return PartialAttention(*_kernels().as_part(out, lse))
    return PartialAttention(out.float(), lse.masked_fill(lse == torch.inf, -torch.inf))


def _inside(slots: Tensor, num_slots: int) -> Tensor:
    if _has_kernels(slots):
        made: Tensor = _kernels().inside(slots, num_slots)
        return made
    return slots.masked_fill((slots < 0) | (slots >= num_slots), -1).contiguous()


def _has_kernels(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _kernels() -> ModuleType:
    """Loaded for tensors on a GPU alone: Triton need not be there without one."""
    return import_module("thresher.ops.sparse_attend.flash_mla_kernels")


def _empty(q: Tensor) -> PartialAttention:
    num, heads = q.shape[:2]
    lse = q.new_full((num, heads), -torch.inf, dtype=torch.float32)
    return PartialAttention(q.new_zeros(num, heads, LATENT_DIM, dtype=torch.float32), lse)


def _other_shape(q: Tensor, slots: Tensor | None, tile: int) -> str | None:
    if q.shape[1] not in HEADS:
        return f"needs 64 or 128 heads, not {q.shape[1]}"
    if slots is not None and (slots.shape[1] == 0 or slots.shape[1] % tile):
        return f"needs a multiple of {tile} slots a query, not {slots.shape[1]}"
    return None


def _refuse(why: str | None) -> None:
    if why:
        raise ThresherError(f'FlashMLA must be able to run; got: {why}; pass impl="triton" or "reference"')
