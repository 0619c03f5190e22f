"""Keys and values of an ordinary (GQA) attention layer, stored by slot."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.cache.pages import check_slots
from thresher.errors import require


class KVCache:
    """One layer's attention keys and values.

    Attributes:
        k: ``[num_pages * page_size, kv_heads, k_dim]``, flat over slots; zero until written.
        v: ``[num_pages * page_size, kv_heads, v_dim]``.
        page_size: tokens in a page.
    """

    def __init__(
        self,
        num_pages: int,
        kv_heads: int,
        k_dim: int,
        v_dim: int,
        dtype: torch.dtype = torch.bfloat16,
        page_size: int = 64,
        device: torch.device | str = "cpu",
    ) -> None:
        sizes = (num_pages, kv_heads, k_dim, v_dim, page_size)
        require(
            num_pages >= 0 and min(sizes[1:]) >= 1, "num_pages, kv_heads, k_dim, v_dim and page_size must be positive", sizes, "fix them"
        )
        self.page_size = page_size
        self.k = torch.zeros(num_pages * page_size, kv_heads, k_dim, dtype=dtype, device=device)
        self.v = torch.zeros(num_pages * page_size, kv_heads, v_dim, dtype=dtype, device=device)

    def store(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Write keys ``[n, kv_heads, k_dim]`` and values ``[n, kv_heads, v_dim]`` at ``slots`` (int64 ``[n]``, distinct).

        They are rounded to the cache's dtype.

        Raises:
            ThresherError: shapes do not match, or a slot lies outside the cache.
        """
        num = slots.shape[0]
        for name, new, held in (("k", k, self.k), ("v", v, self.v)):
            want = (num, *held.shape[1:])
            require(new.shape == want, f"{name} must be {list(want)}", tuple(new.shape), "pass one entry per slot")
        check_slots(slots, self.k.shape[0])
        self.k[slots] = k.to(self.k.dtype)
        self.v[slots] = v.to(self.v.dtype)
