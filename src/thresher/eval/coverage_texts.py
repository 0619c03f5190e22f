"""What coverage is measured on: prose, code, tables, and texts made so that the tokens that matter fall on few ranks.

Every text is the same bytes on every run: from Python's standard library (so another version of Python may give other code), or drawn from
a seed.
"""

from __future__ import annotations

import argparse
import inspect
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from thresher.errors import ThresherError, require
from thresher.eval.needle import library_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TEXTS = ("prose", "code", "table", "numbers", "short_period", "long_period")
LONG_PERIOD = 64
_SEED = 0
_CHARS_PER_TOKEN = 8


def period_of(name: str, length: int, topk: int) -> int | None:
    """Tokens after which a text made against IDSA repeats itself; None for the others.

    ``short_period``: ``length // topk``, so that the places where one token recurs are about as many as are kept. Dealt over as many ranks,
    or over fewer that divide it, they all lie on one. ``long_period``: 64, a multiple of every usual number of ranks.
    """
    return {"short_period": max(2, length // topk), "long_period": LONG_PERIOD}.get(name)


def text_ids(tokenizer: Tokenizer, name: str, length: int, topk: int) -> list[int]:
    """The first ``length`` tokens of one of ``TEXTS``; no special tokens are added.

    Raises:
        ThresherError: an unknown name, or a length that the text does not have.
    """
    require(name in TEXTS, f"a text must be one of {', '.join(TEXTS)}", repr(name), "check the spelling")
    period = period_of(name, length, topk)
    if period is not None:
        # In token space, where alone a period can be had exactly.
        once = _first(tokenizer, library_text(), period, name)
        return (once * (length // period + 1))[:length]
    sources: dict[str, Callable[[], str]] = {
        "prose": library_text,
        "code": lambda: inspect.getsource(argparse),
        "table": lambda: table_text(length),
        "numbers": lambda: numbers_text(length),
    }
    return _first(tokenizer, sources[name](), length, name)


def file_ids(tokenizer: Tokenizer, path: str, length: int) -> list[int]:
    """The first ``length`` tokens of a UTF-8 file.

    Raises:
        ThresherError: a file that cannot be read, is not UTF-8, or is too short.
    """
    return _first(tokenizer, read_text(path), length, path)


def read_text(path: str) -> str:
    """A text file of the user's.

    Raises:
        ThresherError: a file that cannot be read or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ThresherError(f"a text must be a readable file; got {path} ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise ThresherError(f"a text must be UTF-8; got {path}; convert it") from None


def table_text(rows: int) -> str:
    """A markdown table of measurements, its columns padded as printed tables are: rows of about equally many tokens."""
    draw = random.Random(_SEED)
    lines = ["| station | day        | level  | flow  | state |", "| ------- | ---------- | ------ | ----- | ----- |"]
    for row in range(rows):
        day = f"2026-{row // 28 % 12 + 1:02d}-{row % 28 + 1:02d}"
        level, flow = f"{draw.uniform(0, 99):6.2f}", f"{draw.randrange(2000):5d}"
        lines.append(f"| A{draw.randrange(1000):03d}    | {day} | {level} | {flow} | {draw.choice(('ok   ', 'low  ', 'check'))} |")
    return "\n".join(lines) + "\n"


def numbers_text(rows: int) -> str:
    """Eight columns of three digits. SmolLM2 reads each digit as a token, so every row is 32: a period that ordinary data may well have."""
    draw = random.Random(_SEED)
    return "".join(" ".join(f"{draw.randrange(1000):03d}" for _ in range(8)) + "\n" for _ in range(rows))


def _first(tokenizer: Tokenizer, text: str, length: int, name: str) -> list[int]:
    ids: Sequence[int] = ()
    for piece in (text[: _CHARS_PER_TOKEN * length], text):  # all of a long text only where its beginning does not do
        if len(ids) < length:
            ids = tokenizer.encode(piece, add_special_tokens=False).ids
    require(len(ids) >= length, f"the text {name} must hold {length} tokens", len(ids), "ask for a smaller length")
    return list(ids[:length])
