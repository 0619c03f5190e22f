"""Hadamard rotation of index queries and keys: it spreads outliers before FP8 and leaves every dot product unchanged.

```python
H = torch.ones(1, 1)
while len(H) < D:
    H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])  # Sylvester order
out = x.float() @ H * D**-0.5
```
"""

from __future__ import annotations

from torch import Tensor

from thresher.checks import FLOAT, check_tensor
from thresher.errors import require
from thresher.ops.hadamard.reference import hadamard_reference


def hadamard(x: Tensor) -> Tensor:
    """Rotate the last dimension by the Hadamard matrix in Sylvester order, times ``D**-0.5`` (its own inverse).

    A row has the same bits alone or in a batch. Differentiable.

    Args:
        x: ``[..., D]``, any float type, D a power of two.

    Returns:
        fp32 ``[..., D]``.

    Raises:
        ThresherError: D is not a power of two, or x is not a float tensor.

    Source: DeepSeek-V3.2-Exp (arXiv 2512.02556), the indexer's activation rotation.
    """
    check_tensor("x", x, FLOAT, ("...", "D"), "convert it")
    dim = x.shape[-1]
    require(dim > 0 and dim & (dim - 1) == 0, "the last dimension of x must be a power of two", tuple(x.shape), "pad it")
    return hadamard_reference(x)
