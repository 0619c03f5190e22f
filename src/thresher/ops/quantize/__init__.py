"""FP8 of index queries, keys and block means: e4m3 with one power-of-two scale per vector.

```python
amax = x.float().abs().amax(-1).clamp(min=1e-4)
scales = torch.exp2(torch.ceil(torch.log2(amax / 448)))  # in exact arithmetic
values = (x.float() / scales[..., None]).to(torch.float8_e4m3fn)
again = values.float() * scales[..., None]
```

The definition stands in ``thresher.cache.fp8``, since the caches below this layer store the same format.
"""

from __future__ import annotations

from thresher.cache.fp8 import dequantize_fp8, quantize_fp8

__all__ = ["dequantize_fp8", "quantize_fp8"]
