"""One rank of ``test_dsa_ranks.py``: ``python -m tests.models.dsa_worker FAMILIES FOLDER``, as ``torchrun`` starts it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from thresher.bench.model import Settings, run_model
from thresher.bench.model_check import Beside, _beside
from thresher.distributed.collectives import Collectives, ProcessGroup, own_heads
from thresher.distributed.group import started
from thresher.errors import ThresherError
from thresher.models import dsa_dealt
from thresher.models.dsa_decoder import DsaDecoder
from thresher.models.dsa_weights import load_model, places, share_model
from thresher.selectors import DSA, HISA, MISA, Dense
from thresher.types import PartialAttention

from ..distributed.launch import as_a_rank
from .dsa_peer import FAMILIES, FOLDER, TOPK, text, tiny_folder, tiny_model

SMALL = {"dsa": DSA(TOPK), "misa": MISA(active_heads=4, block_size=8, topk=TOPK), "hisa": HISA(block_size=8, num_blocks=6, topk=TOPK)}


class Unrounded(ProcessGroup):
    """Outputs travel as fp32: as bf16 they would now and then move a token of these small models to another expert."""

    def merge_heads(self, part: PartialAttention, shares: Sequence[int]) -> PartialAttention:
        own, whole = own_heads(shares, self.rank), self.merge(part)
        return PartialAttention(whole.out[:, own], whole.lse[:, own])


def runs(family: str, ranks: Collectives) -> dict[str, list[float]]:
    """What ran -> how far hidden states are off those of the whole model over the same tokens, as a share of their length; and the largest
    share of a set that one process which simulates the ranks did not select, in layer 0 and in all. Prefills, steps, a rollback, two
    requests."""
    whole, model = tiny_model(family), share_model(tiny_model(family), ranks)
    found: dict[str, list[float]] = {}
    ways = (
        ("replicated", SMALL["hisa"]), ("exact", SMALL["dsa"]), ("exact:granularity=3", SMALL["hisa"]), ("idsa", SMALL["dsa"]),
        ("idsa:granularity=16", SMALL["misa"]), ("idsa", Dense()),
    )  # fmt: skip
    for placement, selector in ways if ranks.ranks == 2 else ways[::2]:
        here, there = DsaDecoder(model, 160, 2, placement=placement), DsaDecoder(whole, 160, 2)
        off, first, odd = [], [], []
        for turn in ((0, 70), (1, 33), (0, 70, 73), 71, (1, 33, 34), (0, 71, 72)):
            if isinstance(turn, int):
                for decoder in (here, there):
                    decoder.rollback(turn)
                continue
            request, *ends = turn
            ids = text(80, seed=request)[slice(*([0, *ends])[-2:])]
            of = torch.full_like(ids, request)
            got = here.run(ids, selector, of)
            plan = _beside(here.model.config, selector, here, there)
            want = there.run(ids, plan, of)
            off.append(float((got - want).norm() / want.norm()))
            first += plan[0].odd
            odd += [share for chosen in plan if isinstance(chosen, Beside) for share in chosen.odd]
        kept = [here.table.length(request) for request in (0, 1)]
        if placement == "idsa" and not all(abs(ranks.ranks * held - all_) < ranks.ranks for held, all_ in zip(kept, (72, 34), strict=True)):
            raise AssertionError(f"{kept} of 72 and 34 are held")
        found[f"{family} {placement} {selector}"] = [max(off), max(first), max(odd)]
    return found


def others(ranks: Collectives) -> list[str]:
    """Logits, whole texts, fp32, and shares that come off the disk; what differs."""
    wrong = []
    for family in FAMILIES:
        whole, model = tiny_model(family), share_model(tiny_model(family), ranks)
        read = load_model(tiny_folder(family), torch.float32, write=lambda line: None, ranks=ranks)
        if not all(torch.equal(a.memory, b.memory) for (_, a), (_, b) in zip(places(model), places(read), strict=True)):
            wrong.append(f"{family}: a share read and one cut are not the same")
        held = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in whole.parameters())
        if not held < 0.9:
            wrong.append(f"{family}: {held:.2f} of the weights are held")
        ids = text(150)
        one, all_ = DsaDecoder(whole, 160, precision="fp32"), DsaDecoder(model, 160, precision="fp32")
        got, want = all_.prefill(ids), one.prefill(ids)
        if got.shape != want.shape or (got - want).abs().max() > 1e-4:
            wrong.append(f"{family}: logits in fp32 are off by {(got - want).abs().max():.2g}")
        said = [list(DsaDecoder(made, 160, precision="fp32").generate(ids[:40], 12)) for made in (whole, model)]
        if said[0] != said[1]:
            wrong.append(f"{family}: {said}")
    return wrong


def refused(ranks: Collectives) -> list[str]:
    model, found = share_model(tiny_model(FAMILIES[0]), ranks), []
    for options in ({"placement": "idsa", "precision": "fp32"}, {"placement": "idsa:ranks=7"}, {"placement": "single"}):
        try:
            DsaDecoder(model, 64, **options)
        except ThresherError as error:
            found.append(str(error))
    return found


def bench(ranks: Collectives, folder: Path) -> dict[str, Any]:
    """``thresher bench-model`` over ranks; then with attention that goes wrong on the last rank alone, of which no time may be taken."""
    small = {"experts": 8, "context": ("96",), "device": "cpu", "repeats": 1}
    asked = Settings("deepseek-v3.2", selector=("dense", "dsa"), out=folder / "a.jsonl", **small)
    lines: list[str] = []
    run_model(asked, lines.append, ranks)
    found, right = {"right": lines}, dsa_dealt.attend_merged

    def wrong(*given: Any) -> Any:
        part = right(*given)
        return replace(part, out=1.5 * part.out)

    broken = patch.object(dsa_dealt, "attend_merged", wrong if ranks.rank == ranks.ranks - 1 else right)
    for name, placement in (("attention", "idsa"), ("placement", "idsa:ranks=5")):
        with patch("thresher.bench.timing._samples", lambda *given: sys.exit("it was timed")), broken:
            try:
                run_model(replace(asked, placement=(placement,), selector=("dsa",)), print, ranks)
            except ThresherError as error:
                found[name] = [str(error)]
    return found


def main(families: str, folder: str) -> None:
    torch.set_num_threads(1)
    with started("cpu", 60.0) as ranks, torch.inference_mode():
        found = {"runs": {what: seen for family in families.split("+") for what, seen in runs(family, Unrounded()).items()}}
        if ranks.ranks == 2:
            found |= {"others": others(ranks), "refused": refused(ranks), "bench": bench(ranks, Path(folder))}
        (Path(folder) / f"{ranks.rank}.json").write_text(json.dumps(found))
    FOLDER.cleanup()


if __name__ == "__main__":
    as_a_rank(main)
