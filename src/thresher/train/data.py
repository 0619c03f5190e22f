"""Training text: the standard library's source files, any text files the caller names, and copies planted inside them.

Prose alone hardly ever asks a model to find something far back, so an indexer trained on it would not learn to serve the heads that do.
``plant_copies`` therefore repeats earlier passages of a sequence later on, at every distance.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thresher.errors import require
from thresher.train.config import WarmupConfig

_SKIPPED = {"site-packages", "pydoc_data", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
"""Parts of the standard library left out: ``pydoc_data`` is the demo's text, the tests are mostly tables of numbers."""


def stdlib_files() -> list[Path]:
    """Source files of the running Python's standard library, sorted by name, without ``_SKIPPED``."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(p for p in root.rglob("*.py") if not _SKIPPED.intersection(p.relative_to(root).parts) and p.stat().st_size > 2000)


def tokenize(documents: Sequence[str], tokenizer: Any) -> list[Tensor]:
    """Each document as int64 token ids ``[n]``."""
    return [torch.tensor(tokenizer.encode(text).ids, dtype=torch.int64) for text in documents]


def read_documents(files: Sequence[Path], max_chars: int) -> list[str]:
    """The files' texts, evenly thinned (every n-th file) to at most about ``max_chars`` characters together; unreadable bytes replaced."""
    total = sum(p.stat().st_size for p in files)
    step = max(1, -(-total // max_chars))
    return [p.read_text(encoding="utf-8", errors="replace") for p in files[::step]]


class Corpus:
    """Token streams (one per kind of text), each with its last tenth held out.

    Args:
        streams: name -> int64 tokens ``[n]`` of one kind of text, documents joined.
        config: seed, and how copies are planted.
        digits: int64, the token ids of the digits.
        length: tokens in a sequence; ``config.length`` if None.
    """

    def __init__(self, streams: dict[str, Tensor], config: WarmupConfig, digits: Tensor, length: int | None = None) -> None:
        self.streams, self.config, self.digits = streams, config, digits
        self.length = length or config.length
        require(self.length > 192, "sequences must hold over 192 tokens", self.length, "raise --length")
        require(len(streams) > 0, "there must be some training text", "none", "name text files")
        for name, tokens in streams.items():
            enough = len(tokens) * 0.1 > self.length
            require(enough, f"text '{name}' must hold over {self.length * 10} tokens", len(tokens), "add text or shorten the sequences")
        self.rng = np.random.default_rng(config.seed)

    def batches(self) -> Iterator[Tensor]:
        """Endless training sequences ``[length]``, drawn evenly from the streams' first nine tenths."""
        names = sorted(self.streams)
        while True:
            tokens = self.streams[names[self.rng.integers(len(names))]]
            start = int(self.rng.integers(int(len(tokens) * 0.9) - self.length))
            sequence = tokens[start : start + self.length].clone()
            if self.rng.random() < self.config.planted:
                plant_copies(sequence, self.rng, self.config, self.digits)
            yield sequence

    def held_out(self, per_stream: int) -> list[Tensor]:
        """``per_stream`` fixed sequences of each stream's last tenth, the same at every call; every second one with planted copies."""
        rng = np.random.default_rng(0)
        out = []
        for name in sorted(self.streams):
            tokens = self.streams[name]
            low, high = int(len(tokens) * 0.9), len(tokens) - self.length
            for i in range(per_stream):
                start = low + (high - low) * i // max(1, per_stream)
                sequence = tokens[start : start + self.length].clone()
                if i % 2:
                    plant_copies(sequence, rng, self.config, self.digits)
                out.append(sequence)
        return out


def plant_copies(sequence: Tensor, rng: np.random.Generator, config: WarmupConfig, digits: Tensor) -> None:
    """Overwrite ``config.copies`` spans of ``sequence [n]`` in place, each with a copy of 12 to 64 tokens from anywhere before it.

    A share ``config.numbers`` of the sources first gets a number of 3 to 6 random ``digits`` (token ids) written into its second half,
    since prose holds few: what is to be found again must not be guessable.
    """
    length = len(sequence)
    for _ in range(config.copies):
        size = int(rng.integers(12, 65))
        target = int(rng.integers(2 * size, length - size))
        source = int(rng.integers(0, target - size))
        if config.numbers and rng.random() < config.numbers:
            places = int(rng.integers(3, 7))
            at = source + int(rng.integers(size // 2, size - places + 1))
            sequence[at : at + places] = digits[torch.from_numpy(rng.integers(0, len(digits), places))]
        sequence[target : target + size] = sequence[source : source + size].clone()
