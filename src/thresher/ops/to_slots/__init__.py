"""Selected positions as slots: what stands between a selection and the attention over a paged cache.

```python
page = page_table[requests[:, None], indices // page_size]
slots = page * page_size + indices % page_size
```
"""

from __future__ import annotations

from torch import Tensor

from thresher.checks import INT32, INT64, check_count, check_tensor
from thresher.ops.arguments import check_values
from thresher.ops.dispatch import AUTO, choose, device_of
from thresher.ops.to_slots.reference import to_slots_reference
from thresher.types import Selection


def slots_of(picked: Selection, page_table: Tensor, requests: Tensor, page_size: int) -> Tensor:
    """Slots of a selection: those it has, or else ``to_slots`` of its indices.

    Args:
        picked: what was selected, of logical positions or of a rank's own.
        page_table, requests, page_size: as for ``to_slots``; the keys that were selected from had the same.

    Returns:
        int32 ``[Q, k]``, -1 for none.

    Raises:
        ThresherError: what ``to_slots`` refuses.
    """
    return to_slots(picked.indices, page_table, requests, page_size) if picked.slots is None else picked.slots


def to_slots(indices: Tensor, page_table: Tensor, requests: Tensor, page_size: int, impl: str = AUTO) -> Tensor:
    """Where each row's logical positions lie in a paged cache.

    Args:
        indices: int32 ``[Q, k]``, positions in each row's request; negative ones stand for none.
        page_table: int32 ``[B, P]``, the pages of each request, -1 where unused.
        requests: int64 ``[Q]``, the row of ``page_table`` that each row belongs to.
        page_size: tokens in a page, at least 1.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Returns:
        int32 ``[Q, k]``, -1 for a negative position, and where the table has no page for one.

    Raises:
        ThresherError: a shape, dtype or device that does not fit, page_size below 1, a request outside 0..B - 1, or an impl that cannot
            run. Where values are not checked a kernel gives -1 for a request outside.
    """
    check_tensor("indices", indices, INT32, ("num_queries", "topk"), "take Selection.indices")
    check_tensor("page_table", page_table, INT32, ("requests", "max_pages"), "take PageTable.table")
    check_tensor("requests", requests, INT64, (indices.shape[0],), "pass one per row, as .long()")
    check_count("page_size", page_size, 1, do="64 is usual")
    device = device_of(indices=indices, page_table=page_table, requests=requests)
    check_values(("requests", requests, 0, page_table.shape[0] - 1, "name a row of page_table"))
    kernel = choose("to_slots", impl, device)
    if kernel is None:
        return to_slots_reference(indices, page_table, requests, page_size)
    slots: Tensor = kernel(indices, page_table, requests, page_size)
    return slots
