"""The MLA latent cache: 656 bytes a token in FP8, 1152 in bf16 (DeepSeek-V3.2-Exp)."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.cache.fp8 import dequantize_fp8, quantize_fp8
from thresher.cache.pages import check_slots
from thresher.errors import require

LATENT_DIM = 512
ROPE_DIM = 64
GROUP = 128
FP8_BYTES = 656
BF16_BYTES = 1152


class LatentCache:
    """One layer's latents, one byte record a token.

    FP8: 512 e4m3 values, 4 fp32 scales (one per 128 values), 64 bf16 RoPE values. bf16: 512 latent then 64 RoPE values.
    A scale is ``max(amax, 1e-4) / 448`` of its 128 values rounded up to a power of two, the rule the index keys follow; a reader that
    multiplies by the stored scale needs no change.

    Attributes:
        data: uint8 ``[P, page_size, 1, 656]`` or, for bf16, uint8 ``[P, page_size, 1, 1152]``; zero until written.
        fp8: which of the two forms.
    """

    def __init__(self, num_pages: int, page_size: int = 64, fp8: bool = True, device: torch.device | str = "cpu") -> None:
        require(
            num_pages >= 0 and page_size >= 1,
            "num_pages must be at least 0 and page_size at least 1",
            f"{num_pages}, {page_size}",
            "fix them",
        )
        self.fp8 = fp8
        self.data = torch.zeros(num_pages, page_size, 1, FP8_BYTES if fp8 else BF16_BYTES, dtype=torch.uint8, device=device)

    @property
    def page_size(self) -> int:
        return self.data.shape[1]

    @property
    def bytes_per_token(self) -> int:
        return self.data.shape[3]

    def store(self, slots: Tensor, latent: Tensor, rope: Tensor) -> None:
        """Write tokens at ``slots``.

        Args:
            slots: int64 ``[n]``, distinct.
            latent: ``[n, 512]``, any float type.
            rope: ``[n, 64]``, any float type, RoPE applied.

        Raises:
            ThresherError: wrong shapes, a slot outside the cache, or a NaN or infinity (nothing is written then).
        """
        store_records(self.data, slots, latent, rope)

    def load(self, slots: Tensor) -> Tensor:
        """Tokens at ``slots`` (int64 ``[n]``) as fp32 ``[n, 576]``: 512 latent values, then 64 RoPE values.

        Raises:
            ThresherError: a slot lies outside the cache.
        """
        records = _records(self.data, slots)[slots]
        return decode_records(records) if self.fp8 else records.view(torch.bfloat16).float()


def store_records(data: Tensor, slots: Tensor, latent: Tensor, rope: Tensor) -> None:
    """``LatentCache.store`` into memory that need not belong to a ``LatentCache``; the bytes of a token tell its form."""
    num = slots.shape[0]
    require(latent.shape == (num, LATENT_DIM), f"latent must be [{num}, {LATENT_DIM}]", tuple(latent.shape), "pass one latent per slot")
    require(rope.shape == (num, ROPE_DIM), f"rope must be [{num}, {ROPE_DIM}]", tuple(rope.shape), "pass one key part per slot")
    finite = torch.isfinite(latent).all() & torch.isfinite(rope).all()
    require(bool(finite), "latents must be finite", "a NaN or an infinity", "check the layer before it")
    records = _records(data, slots)
    tail = rope.to(torch.bfloat16).contiguous().view(torch.uint8)
    if data.shape[3] == FP8_BYTES:
        values, scales = quantize_fp8(latent.unflatten(1, (LATENT_DIM // GROUP, GROUP)))
        head = torch.cat((values.flatten(1).view(torch.uint8), scales.view(torch.uint8)), dim=1)
    else:
        head = latent.to(torch.bfloat16).contiguous().view(torch.uint8)
    records[slots] = torch.cat((head, tail), dim=1)


def decode_records(records: Tensor) -> Tensor:
    """FP8 records, uint8 ``[n, 656]``, as fp32 ``[n, 576]``: 512 latent values, then 64 RoPE values."""
    values = records[:, :LATENT_DIM].view(torch.float8_e4m3fn).unflatten(1, (LATENT_DIM // GROUP, GROUP))
    scales = records[:, LATENT_DIM : FP8_BYTES - 2 * ROPE_DIM].contiguous().view(torch.float32)
    rope = records[:, FP8_BYTES - 2 * ROPE_DIM :].contiguous().view(torch.bfloat16)
    return torch.cat((dequantize_fp8(values, scales).flatten(1), rope.float()), dim=1)


def _records(data: Tensor, slots: Tensor) -> Tensor:
    require(slots.dim() == 1, "slots must be [n]", tuple(slots.shape), "flatten it")
    records = data.view(-1, data.shape[3])
    check_slots(slots, records.shape[0])
    return records
