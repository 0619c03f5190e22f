"""``thresher generate``: the converted model goes on with a text, each new token choosing what it attends to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from thresher.distributed.parse import place
from thresher.distributed.simulate import OverRanks
from thresher.errors import ThresherError, require
from thresher.models.checkpoint import SHIPPED, load_indexers
from thresher.models.decoder import Decoder
from thresher.models.smollm2 import CONFIG, load_model, load_tokenizer
from thresher.selectors import LayerPlan
from thresher.selectors.parse import parse

TOPK = 512
"""What the shipped indexers are meant for; a selector string that names no ``topk`` gets it."""


def plan_from_text(selector: str, placement: str, num_layers: int) -> list[OverRanks]:
    """One placed selector a layer, from ``misa:active_heads=8`` or a layer plan (``0-1=dense;2-29=dsa``), and ``idsa:ranks=4``.

    Raises:
        ThresherError: text that cannot be read, or values that do not fit together.
    """
    defaults = {"topk": TOPK}
    if selector.strip()[:1].isdigit():
        layers = LayerPlan.from_text(selector, num_layers, defaults=defaults)
    else:
        layers = LayerPlan.uniform(parse(selector, defaults=defaults), num_layers)
    return place(placement, layers)


def read_prompt(path: str) -> str:
    """The text of a prompt file.

    Raises:
        ThresherError: no such file, not UTF-8, or empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ThresherError(f"the prompt file must be readable; got {path} ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise ThresherError(f"the prompt file must be UTF-8 text; got {path}; convert it") from None
    require(bool(text.strip()), "the prompt file must hold text", f"{path}, which is empty", "write a prompt into it")
    return text


def stream(decoder: Decoder, plan: Sequence[OverRanks], last: int, max_tokens: int, tokenizer: Any) -> Iterator[str]:
    """Pieces of text as they are decoded; a piece waits until its last character is whole. ``last`` is the prompt's last token."""
    ids: list[int] = []
    shown = ""
    for token in decoder.generate(torch.tensor([last], device=decoder.model.device), plan, max_tokens):
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text


def run_generate(
    selector: str,
    placement: str,
    prompt_file: str,
    max_tokens: int,
    compare: str | None,
    device: str,
    write: Callable[[str], object],
    weights: Path = SHIPPED,
) -> None:
    """Stream the continuation of a prompt to ``write``; with ``compare``, decode again under that selector on one device and say where
    the texts part.

    The prompt is prefilled densely but for its last token, which runs under the selector like every new one.
    """
    require(max_tokens >= 1, "max_tokens must be at least 1", max_tokens, "ask for a token")
    text = read_prompt(prompt_file)
    indexers = load_indexers(weights, device)
    plan = plan_from_text(selector, placement, len(indexers))
    other = plan_from_text(compare, "single", len(indexers)) if compare else None
    tokenizer = load_tokenizer()
    ids = tokenizer.encode(text).ids
    limit = CONFIG.max_position_embeddings
    fits = len(ids) + max_tokens <= limit
    require(
        fits,
        f"prompt and answer must fit the model's {limit} tokens",
        f"{len(ids)} + {max_tokens}",
        "shorten the prompt or ask for fewer tokens",
    )
    model = load_model(device=device)
    with torch.inference_mode():
        decoder = Decoder(model, indexers)
        if len(ids) > 1:
            decoder.prefill(torch.tensor(ids[:-1], device=device))
        ranks = plan[0].placement
        first = _collect(
            stream(decoder if ranks == decoder.placement else decoder.dealt(ranks), plan, ids[-1], max_tokens, tokenizer), write
        )
        write("\n")
        if other is None:
            return
        decoder.rollback(len(ids) - 1)
        second = _collect(stream(decoder, other, ids[-1], max_tokens, tokenizer), lambda piece: None)
    write(parting(first, second, compare or "") + "\n")


def parting(text: str, other: str, name: str) -> str:
    """One or two lines that say where two continuations part."""
    if text == other:
        return f"[same text as {name}]"
    at = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return f"[parts from {name} after {at} characters: {text[at : at + 40]!r} where {name} has {other[at : at + 40]!r}]"


def _collect(pieces: Iterator[str], write: Callable[[str], object]) -> str:
    out = []
    for piece in pieces:
        write(piece)
        out.append(piece)
    return "".join(out)
