"""FP8 of index queries, keys and block means: e4m3 with one power-of-two scale per vector.

```python
amax = x.float().abs().amax(-1).clamp(min=1e-4)
scales = torch.exp2(torch.ceil(torch.log2(amax / 448)))  # in exact arithmetic
values = (x.float() / scales[..., None]).to(torch.float8_e4m3fn)
again = values.float() * scales[..., None]
```

The definition stands in ``thresher.cache.fp8``, since the caches below this layer store the same format. Three functions take what a
layer computes all the way: ``store_index_keys`` and ``store_latents`` into a paged cache, ``quantize_queries`` into an ``IndexQuery``'s
fields. ``store_step`` is all three at once. They have no gradient.
"""

from __future__ import annotations

from torch import Tensor

from thresher.cache.fp8 import dequantize_fp8, quantize_fp8
from thresher.cache.latents import FP8_BYTES, LATENT_DIM, ROPE_DIM
from thresher.checks import BYTES, HALF_OR_SINGLE, INDEX, check_number, check_tensor
from thresher.errors import require
from thresher.ops.arguments import check_values
from thresher.ops.dispatch import choose, device_of
from thresher.ops.quantize.reference import queries_reference, store_keys_reference, store_latents_reference, store_step_reference
from thresher.ops.rope import check_rotation
from thresher.types import check_key_pages

__all__ = ["dequantize_fp8", "quantize_fp8", "quantize_queries", "store_index_keys", "store_latents", "store_step"]


def store_index_keys(
    pages: Tensor, slots: Tensor, x: Tensor, positions: Tensor, theta: float, rotary_dim: int, style: str, impl: str = "auto"
) -> None:
    """RoPE, Hadamard rotation and FP8 of new index keys, written into the paged cache.

    Args:
        pages: uint8 ``[P, page_size, 1, D + 4]``, contiguous, ``IndexKeyCache.pages``: written to.
        slots: int32 or int64 ``[T]``, distinct but for -1, which leaves its token out.
        x: ``[T, D]`` bf16, fp16 or fp32, D a power of two; rows may be strided.
        positions: int32 or int64 ``[T]``.
        theta: base of the RoPE frequencies.
        rotary_dim: how many leading dims rotate; even, at most D, 0 for none.
        style: ``"half"`` or ``"interleaved"``, as for ``apply_rope``.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Raises:
        ThresherError: a shape, dtype, device, size or style that does not fit, a slot outside -1..P * page_size - 1, or an impl that cannot
            run. Where values are not checked (``ops.dispatch.checks_values``) a kernel leaves out what lies outside. A NaN or an infinity:
            the reference refuses it and writes nothing, a kernel stores that key as NaN under scale 1.
    """
    dim = _check_pages(pages)
    check_tensor("x", x, HALF_OR_SINGLE, ("tokens", dim), "use the cache of this indexer")
    _check_power_of_two("x", x)
    _check_tokens(x.shape[0], slots=slots, positions=positions)
    check_rotation(dim, theta, rotary_dim, style)
    device = device_of(pages=pages, slots=slots, x=x, positions=positions)
    _check_slots(slots, pages)
    kernel = choose("store_index_keys", impl, device, lambda module: module.unsupported(x.dtype, dim, rotate=True))
    (kernel or store_keys_reference)(pages, slots, x, positions, theta, rotary_dim, style)


def quantize_queries(
    x: Tensor,
    weights: Tensor,
    positions: Tensor,
    theta: float,
    rotary_dim: int,
    style: str,
    factor: float = 1.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """RoPE, Hadamard rotation and FP8 of index queries, their scales folded into the head weights.

    Args:
        x: ``[T, H, D]`` bf16, fp16 or fp32, D a power of two; tokens and heads may be strided.
        weights: ``[T, H]``, any of the same types.
        positions: int32 or int64 ``[T]``.
        theta: base of the RoPE frequencies.
        rotary_dim: how many leading dims rotate; even, at most D, 0 for none.
        style: ``"half"`` or ``"interleaved"``, as for ``apply_rope``.
        factor: a constant to fold in, e.g. ``(H * D) ** -0.5``; taken in fp32, multiplied before the scale.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Returns:
        float8_e4m3fn ``[T, H, D]`` and fp32 ``[T, H]``: ``q`` and ``weights`` of an ``IndexQuery``.

    Raises:
        ThresherError: a shape, dtype, device, size or style that does not fit, or an impl that cannot run. A NaN or an infinity: the
            reference refuses it, a kernel makes that vector NaN under scale 1.

    Source: DeepSeek-V3.2-Exp (arXiv 2512.02556), the indexer's queries.
    """
    check_tensor("x", x, HALF_OR_SINGLE, ("tokens", "heads", "head_dim"), "reshape it")
    _check_power_of_two("x", x)
    check_tensor("weights", weights, HALF_OR_SINGLE, tuple(x.shape[:2]), "pass one weight per token and head")
    _check_tokens(x.shape[0], positions=positions)
    check_rotation(x.shape[2], theta, rotary_dim, style)
    check_number("factor", factor)
    device = device_of(x=x, weights=weights, positions=positions)
    kernel = choose("quantize_queries", impl, device, lambda module: module.unsupported(x.dtype, x.shape[2], rotate=True))
    if kernel is None:
        return queries_reference(x, weights, positions, theta, rotary_dim, style, factor)
    made: tuple[Tensor, Tensor] = kernel(x, weights, positions, theta, rotary_dim, style, factor)
    return made


def store_latents(
    data: Tensor,
    slots: Tensor,
    latent: Tensor,
    rope: Tensor,
    positions: Tensor | None = None,
    theta: float = 10000.0,
    style: str = "interleaved",
    impl: str = "auto",
) -> None:
    """FP8 of new MLA latents, written into the paged cache; with ``positions`` their 64 RoPE dims are rotated first.

    Args:
        data: uint8 ``[P, page_size, 1, 656]``, contiguous, ``LatentCache.data``: written to.
        slots: int32 or int64 ``[T]``, distinct but for -1, which leaves its token out.
        latent: ``[T, 512]`` bf16, fp16 or fp32; rows may be strided.
        rope: ``[T, 64]``, any of the same types.
        positions: int32 or int64 ``[T]``, or None when ``rope`` is rotated already.
        theta: base of the RoPE frequencies.
        style: ``"half"`` or ``"interleaved"`` (MLA's own).
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Raises:
        ThresherError: as for ``store_index_keys``.

    Source: the cache of DeepSeek-V3.2-Exp (arXiv 2512.02556); docs/formats.md has its bytes.
    """
    _check_records(data)
    check_tensor("latent", latent, HALF_OR_SINGLE, ("tokens", LATENT_DIM), "pass one latent per token")
    check_tensor("rope", rope, HALF_OR_SINGLE, (latent.shape[0], ROPE_DIM), "pass one key part per token")
    _check_tokens(latent.shape[0], slots=slots)
    if positions is not None:
        _check_tokens(latent.shape[0], positions=positions)
    check_rotation(ROPE_DIM, theta, ROPE_DIM, style)
    device = device_of(data=data, slots=slots, latent=latent, rope=rope, positions=positions)
    _check_slots(slots, data)
    kernel = choose("store_latents", impl, device, lambda module: module.unsupported(latent.dtype, LATENT_DIM))
    (kernel or store_latents_reference)(data, slots, latent, rope, positions, theta, style)


def store_step(
    pages: Tensor,
    data: Tensor,
    slots: Tensor,
    key: Tensor,
    latent: Tensor,
    rope: Tensor,
    q: Tensor,
    weights: Tensor,
    positions: Tensor,
    theta: float,
    rotary_dim: int,
    style: str,
    factor: float = 1.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """All that a step of decoding stores, in one launch.

    ```python
    store_index_keys(pages, slots, key, positions, theta, rotary_dim, style)
    store_latents(data, slots, latent, rope, positions, theta)
    return quantize_queries(q, weights, positions, theta, rotary_dim, style, factor)
    ```

    Args:
        pages: uint8 ``[P, page_size, 1, D + 4]``, contiguous, ``IndexKeyCache.pages``: written to.
        data: uint8 ``[P', page_size', 1, 656]``, contiguous, ``LatentCache.data``: written to.
        slots: int32 or int64 ``[T]``, of both caches; distinct but for -1, which leaves its token out of them.
        key: ``[T, D]`` bf16, fp16 or fp32, D a power of two; rows may be strided.
        latent: ``[T, 512]``, any of the same types; rows may be strided.
        rope: ``[T, 64]``, likewise; rotated "interleaved", MLA's own style.
        q: ``[T, H, D]``, any of the same types; tokens and heads may be strided.
        weights: ``[T, H]``, likewise.
        positions: int32 or int64 ``[T]``.
        theta: base of the RoPE frequencies.
        rotary_dim, style: of ``key`` and ``q``, as for ``store_index_keys``.
        factor: a constant to fold in, as for ``quantize_queries``.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Returns:
        float8_e4m3fn ``[T, H, D]`` and fp32 ``[T, H]``: ``q`` and ``weights`` of an ``IndexQuery``.

    Raises:
        ThresherError: as for the three. A NaN or an infinity: the reference refuses it, but has stored the keys where a latent is at fault.
    """
    dim = _check_pages(pages)
    _check_records(data)
    check_tensor("q", q, HALF_OR_SINGLE, ("tokens", "heads", dim), "use the cache of this indexer")
    _check_power_of_two("q", q)
    num = q.shape[0]
    check_tensor("weights", weights, HALF_OR_SINGLE, tuple(q.shape[:2]), "pass one weight per token and head")
    check_tensor("key", key, HALF_OR_SINGLE, (num, dim), "pass one key per token")
    check_tensor("latent", latent, HALF_OR_SINGLE, (num, LATENT_DIM), "pass one latent per token")
    check_tensor("rope", rope, HALF_OR_SINGLE, (num, ROPE_DIM), "pass one key part per token")
    _check_tokens(num, slots=slots, positions=positions)
    check_rotation(dim, theta, rotary_dim, style)
    check_number("factor", factor)
    device = device_of(pages=pages, data=data, slots=slots, key=key, latent=latent, rope=rope, q=q, weights=weights, positions=positions)
    _check_slots(slots, pages)
    _check_slots(slots, data)
    kernel = choose("store_step", impl, device, lambda module: module.unsupported(q.dtype, dim, rotate=True))
    made: tuple[Tensor, Tensor] = (kernel or store_step_reference)(
        pages, data, slots, key, latent, rope, q, weights, positions, theta, rotary_dim, style, factor
    )
    return made


def _check_pages(pages: Tensor) -> int:
    """Of an index-key cache; returns the dims of a key."""
    check_key_pages(pages)
    require(pages.is_contiguous(), "pages must be contiguous", f"strides {pages.stride()}", "pass IndexKeyCache.pages")
    return pages.shape[3] - 4


def _check_records(data: Tensor) -> None:
    """Of a latent cache."""
    check_tensor("data", data, BYTES, ("pages", "page_size", 1, FP8_BYTES), "pass LatentCache(fp8=True).data")
    require(data.shape[1] >= 1, "the page_size of data must be at least 1", tuple(data.shape), "64 is usual")
    require(data.is_contiguous(), "data must be contiguous", f"strides {data.stride()}", "pass LatentCache.data")


def _check_tokens(num: int, **tensors: Tensor) -> None:
    """Of slots and positions."""
    for name, tensor in tensors.items():
        check_tensor(name, tensor, INDEX, (num,), "pass one per token")


def _check_power_of_two(name: str, x: Tensor) -> None:
    dim = x.shape[-1]
    require(dim > 0 and dim & (dim - 1) == 0, f"the last dimension of {name} must be a power of two", tuple(x.shape), "pad it")


def _check_slots(slots: Tensor, cache: Tensor) -> None:
    """Whether they are slots of a cache ``[pages, page_size, ...]``."""
    num_slots = cache.shape[0] * cache.shape[1]
    check_values(("slots", slots, -1, num_slots - 1, "take them from a PageTable of this size"))
