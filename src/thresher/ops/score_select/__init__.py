"""Score and select in one: the keys of largest score, the scores never held.

```python
scores = paged_index_score(query, keys)
selection = select_topk(scores, topk)
```

Kernels without a public function so far: ``score_select.triton.score_select`` is to be called by name, and selectors take the two steps.
"""
