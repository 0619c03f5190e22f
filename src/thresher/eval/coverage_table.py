"""What a run of ``thresher eval coverage`` found, as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from thresher.eval.coverage import Coverage
from thresher.eval.coverage_error import DENSE_ROW, DSA_ROW, OutputError
from thresher.eval.table import aligned

Results = Mapping[str, Mapping[str, Sequence[Coverage]]]
"""text -> placement -> one ``Coverage`` for each number of ranks."""

RULE_COLUMNS = ("text", "ranks", "m", "expected", "held", "worst", "missing", "needs", "rule")
ERROR_COLUMNS = ("text", "way", "tokens", "from dsa", "worst", "from dense", "worst", "as dsa", "as dense")


def rule_table(results: Results, placement: str) -> str:
    """One line for each text and number of ranks: one placement against the rule."""
    lines: list[tuple[str, ...]] = [RULE_COLUMNS]
    for text, by_placement in results.items():
        for c in by_placement[placement]:
            numbers = (f"{c.ranks}", f"{c.local_topk}", f"{c.expected:.6f}", f"{c.held:.4f}", f"{c.worst:.4f}", f"{c.missing:.4f}")
            lines.append((text, *numbers, f"{c.needed}", "holds" if c.obeys else "BROKEN"))
    return aligned(lines, 1)


def placement_table(results: Results) -> str:
    """One line for each text and number of ranks: the share held and the m needed, for every placement; ``!`` where the rule is broken."""
    names = list(next(iter(results.values())))
    lines: list[tuple[str, ...]] = [("text", "ranks", "m", *names)]
    for text, by_placement in results.items():
        for row in zip(*by_placement.values(), strict=True):
            cells = (f"{c.held:.4f} {c.needed:4d}{' ' if c.obeys else '!'}" for c in row)
            lines.append((text, f"{row[0].ranks}", f"{row[0].local_topk}", *cells))
    return aligned(lines, 1)


def error_table(errors: Mapping[str, OutputError]) -> str:
    """One line for each text and way of choosing: errors of the attention's output, and next tokens that stay the same."""
    lines: list[tuple[str, ...]] = [ERROR_COLUMNS]
    for text, error in errors.items():
        for way in error.methods:
            layers = (error.from_dsa[way], error.from_dense[way])
            numbers = [f"{figure:.4f}" for part in layers for figure in (mean(part), max(part))]
            agree = [f"{error.agreeing(way, of)}/{len(error.following[way])}" for of in (DSA_ROW, DENSE_ROW)]
            lines.append((text, way, f"{mean(error.tokens[way]):.0f}", *numbers, *agree))
    return aligned(lines, 2)


def findings(results: Results) -> list[str]:
    """One sentence for each text and placement: where the rule held, where it did not, and the worst case with the m it needed."""
    said = []
    for text, by_placement in results.items():
        for name, row in by_placement.items():
            held, broken = [c for c in row if c.obeys], [c for c in row if not c.obeys]
            parts = [f"holds for R = {', '.join(str(c.ranks) for c in held)}"] if held else []
            if broken:
                c = max(broken, key=lambda c: c.needed / c.local_topk)
                worst = f"R = {c.ranks}: {c.missing:.4f} of rows lose a token, m = {c.local_topk} had to be {c.needed}"
                parts.append(f"BROKEN for R = {', '.join(str(c.ranks) for c in broken)} ({worst})")
            said.append(f"{text}, {name}: {'; '.join(parts)}")
    return said


def error_findings(errors: Mapping[str, OutputError], rule: int) -> list[str]:
    """One sentence for each text: what IDSA at the rule's m changes, beside what DSA changes."""
    said = []
    for text, error in errors.items():
        name = f"m={rule}"
        moved, own, left = (mean(part) for part in (error.from_dsa[name], error.from_dense[DSA_ROW], error.from_dense[name]))
        at = f"{text}: at the rule's m = {rule} the output is"
        said.append(f"{at} {moved:.3f} from DSA's and {left:.3f} from dense attention's; DSA's is {own:.3f} from that")
    return said


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
