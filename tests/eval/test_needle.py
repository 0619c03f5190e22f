"""The planted fact: exact lengths, whole lines around it, the same bytes every time. A small word-level tokenizer stands in."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.errors import ThresherError
from thresher.eval import needle
from thresher.eval.needle import DEPTHS, FACT, LENGTHS, NUMBER, QUESTION, build_needle, found, library_text

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def tokenizer():
    """One token for each byte or so: no merges, digits apart, nothing lost in decoding."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*alphabet, "<s>"])}
    merges = [("Ċ", "Ċ"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he")]
    vocab |= {"ĊĊ": len(vocab), "Ġt": len(vocab) + 1, "he": len(vocab) + 2, "Ġthe": len(vocab) + 3}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    # A template that would add a token shows that none is added.
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return made


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_exact_length_and_one_whole_fact_in_its_place(tokenizer, length, depth):
    case = build_needle(tokenizer, length, depth)
    assert len(case.context_ids) + len(case.question_ids) == length
    text = tokenizer.decode(case.context_ids)
    fact = FACT.format(number=NUMBER)
    assert text.count(fact) == 1
    before, after = text.split(fact)
    assert before.endswith("\n\n")
    assert NUMBER not in before + after
    assert library_text().startswith(before + after), "the text around the fact is the library's, without a gap"
    first, last = case.fact_span
    assert tokenizer.decode(case.context_ids[first:last]) == fact
    assert first / length == pytest.approx(depth, abs=0.15)
    assert tokenizer.decode(case.question_ids) == QUESTION
    assert NUMBER not in QUESTION


def test_it_is_the_same_every_time_and_differs_where_asked(tokenizer):
    base = build_needle(tokenizer, 2048, 0.5)
    assert build_needle(tokenizer, 2048, 0.5) == base
    other = build_needle(tokenizer, 2048, 0.5, number="90817")
    assert tokenizer.decode(other.context_ids) == tokenizer.decode(base.context_ids).replace(NUMBER, "90817")
    moved = build_needle(tokenizer, 2048, 0.5, text_offset=100_000)
    start = library_text().find("\n", 100_000) + 1
    assert tokenizer.decode(moved.context_ids).startswith(library_text()[start : start + 40])


@settings(max_examples=60, deadline=None)
@given(
    depth=st.floats(0, 1),
    length=st.integers(280, 900),
    text=st.lists(st.sampled_from(["a line", "\n", "\n\n", " the ", "é", "1"]), min_size=1, max_size=20),
)
def test_any_text_long_enough(tokenizer, depth, length, text):
    joined = "".join(text) * 2000
    case = build_needle(tokenizer, length, depth, text=joined)
    assert len(case.context_ids) + len(case.question_ids) == length
    first, last = case.fact_span
    assert tokenizer.decode(case.context_ids[first:last]) == FACT.format(number=NUMBER)
    before = tokenizer.decode(case.context_ids[:first])
    assert first == length - len(case.question_ids) - (last - first) or before.endswith("\n")


def test_depth_zero_and_one_are_the_ends(tokenizer):
    text = "\n\n".join(f"Paragraph {i}." for i in range(400))
    early, late = build_needle(tokenizer, 2048, 0.0, text=text), build_needle(tokenizer, 2048, 1.0, text=text)
    assert early.fact_span[0] < 40
    assert late.fact_span[1] > len(late.context_ids) - 40


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"depth": 1.5}, "depth"),
        ({"depth": float("nan")}, "depth"),
        ({"number": "12a"}, "digits"),
        ({"number": ""}, "digits"),
        ({"number": "٣"}, "digits"),
        ({"length": 3}, "length"),
        ({"text": "short"}, "must hold"),
        ({"text": ""}, "text_offset"),
        ({"text_offset": 10**9}, "text_offset"),
        ({"text_offset": -1}, "text_offset"),
    ],
)
def test_mistakes_are_one_clear_line(tokenizer, options, word):
    with pytest.raises(ThresherError, match=word) as caught:
        build_needle(tokenizer, **{"length": 2048, "depth": 0.5, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "want"),
    [
        (" 48213.\n\nQuestion", True),
        ("It is number 48213, I think", True),
        ("48213", True),
        (" 482137", False),
        (" 148213", False),
        (" 4821", False),
        (" 48,213", False),
        ("", False),
        ("no 1 or 48213", True),
    ],
)
def test_found_means_the_number_stands_by_itself(answer, want):
    assert found("48213", answer) is want


def test_the_library_text_is_sorted_prose():
    from pydoc_data.topics import topics

    text = library_text()
    assert 400_000 < len(text) < 2_000_000
    names = sorted(topics)
    assert text.startswith(topics[names[0]].strip())
    assert text.rstrip().endswith(topics[names[-1]].strip())
    assert not re.search(r"Lisbon", text), "the fact must be unlike the text"


def test_the_wording_leaves_room(tokenizer):
    assert max(LENGTHS) + needle.ANSWER_TOKENS <= 8192
