"""``thresher generate``: the converted model goes on with a text, each new token choosing what it attends to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thresher.cache.placement import Placement
from thresher.distributed.collectives import Collectives, check_ranks
from thresher.distributed.group import TIMEOUT_S, agree, started, world_size
from thresher.distributed.parse import place
from thresher.distributed.simulate import OverRanks
from thresher.errors import ThresherError, require
from thresher.models.checkpoint import SHIPPED, load_indexers
from thresher.models.decoder import Decoder
from thresher.models.llama import Llama
from thresher.models.smollm2 import CONFIG, load_model, load_tokenizer
from thresher.selectors import LayerPlan
from thresher.selectors.parse import parse

TOPK = 512
"""What the shipped indexers are meant for; a selector string that names no ``topk`` gets it."""


def plan_from_text(selector: str, placement: str, num_layers: int, ranks: int | None = None) -> list[OverRanks]:
    """One placed selector a layer, from ``misa:active_heads=8`` or a layer plan (``0-1=dense;2-29=dsa``), and ``idsa:ranks=4``, or ``idsa``
    over as many ranks as there are.

    Raises:
        ThresherError: text that cannot be read, or values that do not fit together.
    """
    defaults = {"topk": TOPK}
    if selector.strip()[:1].isdigit():
        layers = LayerPlan.from_text(selector, num_layers, defaults=defaults)
    else:
        layers = LayerPlan.uniform(parse(selector, defaults=defaults), num_layers)
    return place(placement, layers, ranks)


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
    timeout_s: float = TIMEOUT_S,
) -> None:
    """Stream the continuation of a prompt to ``write``; with ``compare``, decode again under that selector on one device and say where
    the texts part.

    The prompt is prefilled densely but for its last token, which runs under the selector like every new one. Where ``torchrun`` started
    several processes, each is a rank and holds a rank's tokens; rank 0 writes. Otherwise all ranks are simulated in this process.
    """
    require(max_tokens >= 1, "max_tokens must be at least 1", max_tokens, "ask for a token")
    with started(device, timeout_s) if world_size() > 1 else nullcontext() as ranks:
        text = read_prompt(prompt_file)
        indexers = load_indexers(weights, device)
        plan = plan_from_text(selector, placement, len(indexers), None if ranks is None else ranks.ranks)
        other = plan_from_text(compare, "single", len(indexers)) if compare else None
        if ranks is not None:
            asked = {"selector, k and placement": plan, "other selector": other, "number of tokens": max_tokens, "device": device}
            agree(ranks, {"version": version("thresher"), **asked, "prompt": digest(text.encode())}, device)
            check_ranks(plan[0].placement.ranks, ranks)
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
        if ranks is not None:
            held = [*model.state_dict().values(), *indexers.state_dict().values()]
            agree(ranks, {"model": digest(*(x.contiguous().cpu().view(-1).view(torch.uint8).numpy() for x in held))}, device)
        writes = ranks is None or ranks.rank == 0
        with torch.inference_mode():
            decoder = _read(model, indexers, ids, None if ranks is None else plan[0].placement, ranks)
            dealt = decoder if plan[0].placement == decoder.placement else decoder.dealt(plan[0].placement)
            first = _collect(stream(dealt, plan, ids[-1], max_tokens, tokenizer), write if writes else lambda piece: None)
    if writes:
        write("\n")
    if writes and other is not None:
        with torch.inference_mode():
            if ranks is None:
                decoder.rollback(len(ids) - 1)
            else:
                decoder = _read(model, indexers, ids)
            second = _collect(stream(decoder, other, ids[-1], max_tokens, tokenizer), lambda piece: None)
        write(parting(first, second, compare or "") + "\n")


def _read(
    model: Llama, indexers: nn.ModuleList, ids: list[int], placement: Placement | None = None, ranks: Collectives | None = None
) -> Decoder:
    """A decoder that holds all but the last token."""
    decoder = Decoder(model, indexers, placement, ranks=ranks)
    if len(ids) > 1:
        decoder.prefill(torch.tensor(ids[:-1], device=model.device))
    return decoder


def digest(*held: Any) -> str:
    """Of bytes, arrays of bytes among them, one after the other."""
    made = blake2b(digest_size=8)
    for piece in held:
        made.update(piece)
    return made.hexdigest()


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
