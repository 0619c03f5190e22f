"""A fact planted in a long text, and a question about it: exact token lengths, the same bytes every time.

The text is the Python standard library's ``pydoc_data.topics``. The wording of fact and question was fixed with dense attention
alone, before any selector was looked at, so that it favours none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from thresher.errors import require

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LENGTHS = (2048, 4096, 7680)
DEPTHS = (0.1, 0.5, 0.9)
NUMBER = "48213"
ANSWER_TOKENS = 16

FACT = "The best thing to do in Lisbon is to visit house number {number}.\n\n"
QUESTION = "\n\nWhat is the best thing to do in Lisbon?\nThe best thing to do in Lisbon is to visit house number"

_CHARS_PER_TOKEN = 6


@dataclass(frozen=True)
class Needle:
    """One case: what the model reads before the selector starts, and what it reads under it.

    Attributes:
        context_ids: the text with the fact in it; its prefill is dense and shared by all selectors.
        question_ids: the question and the beginning of the answer; ``len(context_ids) + len(question_ids) == length``.
        number: the planted number, as decimal digits.
        length: tokens of context and question together; the answer comes on top.
        depth: where the fact was wanted, as a fraction of the text.
        fact_span: first and one-past-last position of the fact in ``context_ids``.
    """

    context_ids: list[int]
    question_ids: list[int]
    number: str
    length: int
    depth: float
    fact_span: tuple[int, int]


def library_text() -> str:
    """All of ``pydoc_data.topics``, topics in sorted order, separated by blank lines (about half a megabyte of English)."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n"


def build_needle(
    tokenizer: Tokenizer,
    length: int,
    depth: float,
    number: str = NUMBER,
    text: str | None = None,
    text_offset: int = 0,
    fact: str = FACT,
    question: str = QUESTION,
) -> Needle:
    """Plant a fact in a text so that context and question together are exactly ``length`` tokens.

    The fact goes to the paragraph break nearest to ``depth`` (a line break where there is none, the end where there is neither),
    so it never cuts a sentence. No special tokens are added.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``.
        length: tokens of context and question together.
        depth: 0 is the start of the text, 1 its end.
        number: decimal digits to plant.
        text: the text to read from; ``library_text()`` by default.
        text_offset: characters of ``text`` to skip; the reading starts at the next line.
        fact: its ``{number}`` is replaced.
        question: what follows the context.

    Raises:
        ThresherError: for a depth outside [0, 1], a number that is not digits, a length with no room for text, or a text too short.
    """
    require(0.0 <= depth <= 1.0, "depth must be between 0 and 1", depth, "pass a fraction of the text")
    require(number.isascii() and number.isdigit(), "number must be decimal digits", repr(number), "pass e.g. '48213'")
    text = library_text() if text is None else text
    require(0 <= text_offset < len(text), f"text_offset must be inside the text (0..{len(text) - 1})", text_offset, "start earlier")
    fact_ids = _encode(tokenizer, fact.format(number=number))
    question_ids = _encode(tokenizer, question)
    num_text = length - len(fact_ids) - len(question_ids)
    require(num_text > 0, f"length must exceed fact and question ({len(fact_ids) + len(question_ids)} tokens)", length, "ask for more")

    start = 0 if text_offset == 0 else text.find("\n", text_offset) + 1
    text_ids, breaks = _read(tokenizer, text[start:], num_text)
    target = depth * num_text
    at = min(breaks, key=lambda position: (abs(position - target), position))
    context_ids = text_ids[:at] + fact_ids + text_ids[at:]
    return Needle(context_ids, question_ids, number, length, depth, (at, at + len(fact_ids)))


def found(number: str, answer: str) -> bool:
    """Whether the planted number stands in the answer as a run of digits of its own (``1482130`` does not hold ``48213``)."""
    return number in re.findall(r"[0-9]+", answer)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def _read(tokenizer: Tokenizer, text: str, num_tokens: int) -> tuple[list[int], list[int]]:
    """The first ``num_tokens`` tokens, and the token positions before which the fact may stand."""
    piece = text[: num_tokens * _CHARS_PER_TOKEN]
    encoding = tokenizer.encode(piece, add_special_tokens=False)
    if len(encoding.ids) < num_tokens and len(piece) < len(text):
        piece = text
        encoding = tokenizer.encode(piece, add_special_tokens=False)
    ids = list(encoding.ids[:num_tokens])
    require(len(ids) == num_tokens, f"the text must hold {num_tokens} tokens from text_offset on", len(ids), "start earlier")
    ends = [end for _, end in encoding.offsets[:num_tokens]]
    for mark in ("\n\n", "\n"):
        breaks = [i + 1 for i, end in enumerate(ends) if piece[:end].endswith(mark)] if mark in piece else []
        if breaks:
            return ids, breaks
    return ids, [num_tokens]
