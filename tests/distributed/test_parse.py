"""Placements as text."""

import pytest

from thresher.distributed import IDSA, ExactMerge, Replicated, Single
from thresher.distributed.parse import PLACEMENTS, place
from thresher.errors import ThresherError
from thresher.selectors import DSA, HISA, Dense


@pytest.mark.parametrize(
    ("text", "make"),
    [
        ("single", Single),
        ("idsa:ranks=4", lambda s: IDSA(s, 4)),
        ("idsa:ranks=1", lambda s: IDSA(s, 1)),
        (" idsa : ranks = 4 , local_topk = 200 , granularity=64", lambda s: IDSA(s, 4, 200, 64)),
        ("exact:ranks=3", lambda s: ExactMerge(s, 3)),
        ("replicated:ranks=3", lambda s: Replicated(s, 3)),
        ("exact:granularity=2,ranks=3", lambda s: ExactMerge(s, 3, 2)),
    ],
)
def test_every_layer_is_placed(text, make):
    selectors = [Dense(), DSA(512), HISA(16, 64, 512)]
    assert place(text, selectors) == [make(s) for s in selectors]


def test_ranks_that_are_not_named_are_those_there_are():
    assert place("idsa", [DSA(512)], 4) == [IDSA(DSA(512), 4)]
    assert place("exact:ranks=2", [DSA(512)], 4) == [ExactMerge(DSA(512), 2)]
    assert place("single", [DSA(512)], 4) == [Single(DSA(512))]


def test_every_placement_has_a_name():
    assert set(PLACEMENTS.values()) == {Single, Replicated, IDSA, ExactMerge}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ring:ranks=4", "a placement must be one of single, replicated, idsa, exact; got 'ring'"),
        ("", "a placement must be one of single, replicated, idsa, exact"),
        ("IDSA:ranks=4", "a placement must be one of"),
        ("idsa", "idsa needs ranks"),
        ("exact", "exact needs ranks"),
        ("idsa:", "options must follow the colon"),
        ("idsa:ranks=0", "ranks must be at least 1; got 0"),
        ("idsa:ranks=-2", "ranks must be at least 1; got -2"),
        ("idsa:ranks=four", "ranks must be an int; got 'four'"),
        ("idsa:ranks=4.0", "ranks must be an int"),
        ("idsa:ranks=4,ranks=4", "ranks must be given once"),
        ("idsa:ranks", "ranks must have a value"),
        ("idsa:ranks=4,granularity=0", "granularity must be at least 1"),
        ("idsa:ranks=4,local_topk=100", r"local_topk must lie in \[128, 512\], so that 4 ranks hold topk=512 tokens; got 100"),
        ("idsa:ranks=4,local_topk=513", r"local_topk must lie in \[128, 512\]"),
        ("idsa:ranks=4,selector=dsa", "options of idsa must be among: ranks, local_topk, granularity; got 'selector'"),
        ("exact:ranks=4,local_topk=200", "options of exact must be among: ranks, granularity"),
        ("single:ranks=1", "options of single must be among: none"),
    ],
)
def test_mistakes_are_one_clear_line(text, words):
    with pytest.raises(ThresherError, match=words) as caught:
        place(text, [DSA(512)])
    assert "\n" not in str(caught.value)
