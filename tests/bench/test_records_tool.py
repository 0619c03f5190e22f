"""tools/records: its cases exist, are timed on what it says, and suit the peers it names."""

from __future__ import annotations

import importlib.util
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from thresher.bench.cases import parse_case
from thresher.bench.peers import PEERS
from thresher.bench.work import check_op, default_op
from thresher.selectors.parse import parse

TOOL = Path(__file__).parents[2] / "tools" / "records"


def load():
    loader = SourceFileLoader("records_tool", str(TOOL))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


ROWS = [(op, peer, selector, case) for group in load().GROUPS.values() for op, peer, selector, cases in group for case in cases]


@pytest.mark.parametrize(("op", "peer", "selector", "name"), ROWS)
def test_a_case_suits_its_op_its_selector_and_its_peer(op, peer, selector, name):
    case = parse_case(name)
    assert (op is None) == (selector is not None)
    if selector is not None:
        parse(selector)
    op = op or default_op(case)
    check_op(case, op)
    if peer is not None:
        assert op in PEERS[peer].ops
        assert PEERS[peer].fits(case, op) is None


def test_no_case_is_timed_twice():
    assert len(set(ROWS)) == len(ROWS)


def test_wrong_words_are_refused(capsys, monkeypatch):
    for words, why in ((["nonsense"], "groups are score"), ([], "a CUDA device is needed")):
        monkeypatch.setattr("sys.argv", ["records", *words])
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(SystemExit, match="2"):
            load().main()
        assert why in capsys.readouterr().err
