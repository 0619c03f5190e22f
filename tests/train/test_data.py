"""Training text: nothing held out is learnt from, copies come from the past, the same seed gives the same data."""

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.errors import ThresherError
from thresher.train.config import WarmupConfig
from thresher.train.data import Corpus, plant_copies, read_documents, stdlib_files, tokenize

DIGITS = torch.arange(100_000, 100_010)
"""No stream holds these, so a planted number is told from text."""


def settings_of(**changes):
    return WarmupConfig(**{"length": 210, "queries": 10, "planted": 0.0, "copies": 3, "numbers": 0.4, **changes})


def corpus(sizes=(2500, 3000), length=None, **changes):
    """Streams whose tokens are their own places, so that a sequence tells where it came from."""
    streams = {name: torch.arange(n) + 10_000 * i for i, (name, n) in enumerate(zip("ab", sizes, strict=False), start=1)}
    return Corpus(streams, settings_of(**changes), DIGITS, length)


def planted(length, seed, **changes):
    """0, 1, 2, ... with copies planted in it."""
    sequence = torch.arange(length)
    plant_copies(sequence, np.random.default_rng(seed), settings_of(length=length, **changes), DIGITS)
    return sequence


def test_held_out_text_is_never_trained_on():
    made = corpus()
    held = {int(t) for sequence in made.held_out(4) for t in sequence}
    seen = {int(t) for sequence in islice(made.batches(), 3000) for t in sequence}
    assert not held & seen
    assert {t // 10_000 for t in seen} == {1, 2}, "both streams are drawn from"
    assert max(t % 10_000 for t in seen if t < 20_000) < 2250
    assert min(t % 10_000 for t in held if t < 20_000) >= 2250
    assert len(seen) > 0.98 * (2250 + 2700), "all of the training part is drawn from"


def test_held_out_is_the_same_at_every_call_and_for_every_seed():
    first, again, other = corpus().held_out(4), corpus(), corpus(seed=9, planted=1.0)
    next(again.batches())
    for batch in (again.held_out(4), other.held_out(4)):
        assert len(batch) == 8
        assert all(torch.equal(a, b) for a, b in zip(first, batch, strict=True))
    plain = [torch.equal(s, torch.arange(210) + s[0]) for s in first]
    assert plain == [True, False] * 4, "every second one has copies"


def test_batches_follow_the_seed_and_leave_the_streams_alone():
    def drawn(seed):
        return torch.stack(list(islice(corpus(seed=seed, planted=1.0).batches(), 6)))

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    made = corpus(planted=1.0)
    list(islice(made.batches(), 20))
    assert torch.equal(made.streams["a"], torch.arange(2500) + 10_000)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_share_of_sequences_that_get_copies(share):
    batch = list(islice(corpus(planted=share).batches(), 300))
    plain = sum(torch.equal(s, torch.arange(210) + s[0]) for s in batch)
    assert 1 - plain / 300 == pytest.approx(share, abs=0 if share in (0, 1) else 0.1)


def test_another_length_than_the_configurations():
    assert {len(s) for s in corpus(length=240).held_out(2)} == {240}
    assert len(next(corpus().batches())) == 210


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), length=st.integers(193, 1500))
def test_one_copy_repeats_the_past(seed, length):
    sequence = planted(length, seed, copies=1, numbers=0.0)
    changed = (sequence != torch.arange(length)).nonzero().flatten()
    assert 12 <= len(changed) <= 64
    assert torch.equal(changed, torch.arange(int(changed[0]), int(changed[-1]) + 1)), "one span"
    source = sequence[changed]
    assert torch.equal(source, torch.arange(int(source[0]), int(source[0]) + len(source))), "copied in order"
    assert source[-1] < changed[0], "from wholly before its place"


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), length=st.integers(193, 1500))
def test_a_number_stands_in_the_source_and_in_the_copy(seed, length):
    sequence = planted(length, seed, copies=1, numbers=1.0)
    places = (sequence >= 100_000).nonzero().flatten()
    first, second = places.chunk(2)
    assert 3 <= len(first) <= 6
    assert torch.equal(sequence[first], sequence[second])
    (distance,) = (second - first).unique().tolist()
    copied = [i for i in range(length) if sequence[i] < 100_000 and sequence[i] != i]
    assert {i - int(sequence[i]) for i in copied} <= {distance}, "the number came with its surroundings"


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), copies=st.integers(1, 12))
def test_the_future_is_never_read(seed, copies):
    """Tokens are their own places: one that stands before its place was read from the future."""
    for place, token in enumerate(planted(400, seed, copies=copies).tolist()):
        assert token >= 100_000 or token <= place


def test_no_copies_no_change_and_too_many_still_fit():
    assert torch.equal(planted(300, 0, copies=0), torch.arange(300))
    assert len(planted(300, 0, copies=200)) == 300


def test_the_share_of_copies_with_a_number():
    hits = sum(bool((planted(900, seed, copies=1) >= 100_000).any()) for seed in range(300))
    assert hits / 300 == pytest.approx(0.4, abs=0.09)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Corpus({}, settings_of(), DIGITS), "some training text"),
        (lambda: corpus((2100,)), "text 'a' must hold over 2100 tokens; got 2100"),
        (lambda: corpus((2500, 0)), "text 'b' must hold over 2100 tokens; got 0"),
        (lambda: corpus(length=260), "text 'a' must hold over 2600 tokens; got 2500"),
        (lambda: corpus(length=192), "sequences must hold over 192 tokens; got 192"),
    ],
)
def test_too_little_text_is_one_clear_line(call, words):
    with pytest.raises(ThresherError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_shortest_sequences_have_room_for_the_longest_copy():
    for seed in range(200):
        planted(193, seed, copies=5)


def test_the_librarys_own_sources_without_the_demos_text():
    files = stdlib_files()
    assert len(files) > 200
    assert files == sorted(files)
    assert not any({"pydoc_data", "site-packages", "test", "idlelib"} & set(p.parent.parts[-3:]) for p in files)
    assert not any(p.name == "topics.py" for p in files)


def test_documents_are_thinned_evenly_and_bad_bytes_replaced(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_bytes(b"\xff" + bytes([48 + i]) * 99)
    files = sorted(tmp_path.iterdir())
    assert len(read_documents(files, 10_000)) == 10
    some = read_documents(files, 300)
    assert [text[1] for text in some] == ["0", "4", "8"]
    assert some[0][0] == "\N{REPLACEMENT CHARACTER}"


def test_tokenize_gives_int64():
    class Letters:
        def encode(self, text):
            return type("Encoding", (), {"ids": [ord(c) for c in text]})

    got = tokenize(["ab", ""], Letters())
    assert [t.tolist() for t in got] == [[97, 98], []]
    assert all(t.dtype == torch.int64 for t in got)
