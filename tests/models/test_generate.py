"""Text in pieces, plans from text, and where two texts part."""

from types import SimpleNamespace

import pytest
import torch

from thresher.distributed import IDSA, ExactMerge, Single
from thresher.errors import ThresherError
from thresher.models.generate import TOPK, parting, plan_from_text, read_prompt, stream
from thresher.selectors import DSA, HISA, MISA, Dense, Shared


class Bytes:
    """One token a byte."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


class Script:
    """A decoder that says what it is told."""

    def __init__(self, text):
        self.text, self.model, self.asked = text, SimpleNamespace(device=torch.device("cpu")), None

    def generate(self, ids, plan, max_tokens):
        self.asked = ids.tolist()
        yield from list(self.text.encode())[:max_tokens]


@pytest.mark.parametrize("text", ["plain", "naïve café", "你好, world", "🙂👩‍👩‍👧", ""])
def test_pieces_are_whole_characters(text):
    script = Script(text)
    pieces = list(stream(script, [], 7, 1000, Bytes()))
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert script.asked == [7], "the prompt's last token runs under the selector"


def test_a_character_cut_by_the_end_is_not_shown():
    assert "".join(stream(Script("aé"), [], 7, 2, Bytes())) == "a"


@pytest.mark.parametrize(
    ("text", "other", "want"),
    [
        ("same", "same", "[same text as x]"),
        ("abcd", "abXd", "[parts from x after 2 characters: 'cd' where x has 'Xd']"),
        ("ab", "abcd", "[parts from x after 2 characters: '' where x has 'cd']"),
        ("abcd", "", "[parts from x after 0 characters: 'abcd' where x has '']"),
        ("a\nb", "a b", "[parts from x after 1 characters: '\\nb' where x has ' b']"),
    ],
)
def test_parting(text, other, want):
    assert parting(text, other, "x") == want


def test_plans_from_text():
    assert plan_from_text("dsa", "single", 3) == [Single(DSA(TOPK))] * 3
    assert plan_from_text("misa:active_heads=4", "idsa:ranks=2", 2) == [IDSA(MISA(4, topk=TOPK), 2)] * 2
    assert plan_from_text("hisa:topk=64", "exact:ranks=3", 1) == [ExactMerge(HISA(topk=64), 3)]
    hybrid = plan_from_text(" 0=dense; 1=dsa:topk=9; 2-3=shared:layer=1", "single", 4)
    assert [method.selector for method in hybrid] == [Dense(), DSA(9), Shared(1), Shared(1)]


def test_prompts_keep_every_character(tmp_path):
    path = tmp_path / "p.txt"
    text = "  leading, trailing \u200b and naïve\n\n"
    path.write_bytes(text.encode())
    assert read_prompt(str(path)) == text
    path.write_bytes(b"\n")
    with pytest.raises(ThresherError, match="must hold text"):
        read_prompt(str(path))
