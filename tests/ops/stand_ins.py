"""Stand-ins for an operation's kernels, on tensors that count as a GPU's for it; for other operations they are a CPU's."""

from __future__ import annotations

from types import SimpleNamespace

from thresher.ops import dispatch


def stand_in(operation, name, worthwhile, answer):
    """Kernels that note what they are asked and given; ``why`` is why they cannot run."""
    made = SimpleNamespace(__name__=f"kernels.{name}", why=None, seen=[], asked=[])
    made.unsupported = lambda *given: made.why
    made.worthwhile = lambda *given: made.asked.append(given) or worthwhile(*given)
    setattr(made, operation, lambda *given: made.seen.append(given) or answer)
    return made


def put_in(monkeypatch, operation, modules):
    """Implementation -> stand-in: these are all that the operation has beside its reference."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    candidates, reason, load = dispatch._candidates, dispatch.reason, dispatch._module
    monkeypatch.setattr(dispatch, "_candidates", lambda op, device: dispatch.TABLE[op] if op == operation else candidates(op, device))
    monkeypatch.setattr(dispatch, "reason", lambda op, impl, device: None if op == operation else reason(op, impl, device))
    monkeypatch.setattr(dispatch, "_module", lambda op, impl: modules[impl] if op == operation else load(op, impl))
