"""Tables as plain text, the demo's among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("selector", "found", "recall", "worst", "chance", "mass", "tokens", "FLOPs", "bytes", "ms/token")


def demo_table(selectors: Mapping[str, Mapping[str, Any]], length: int, num_layers: int, cases: int) -> str:
    """One line for each selector.

    Args:
        selectors: the ``selectors`` entry of ``metrics.json``.
        length: the context that recall, mass and costs were measured at.
        num_layers: layers averaged over.
        cases: questions asked of each selector.
    """
    lines = [COLUMNS]
    for name, row in selectors.items():
        time = row["time_per_token_ms"]
        lines.append(
            (
                name,
                f"{row['found']}/{row['total']}",
                f"{row['recall']:.3f}",
                f"{row['recall_worst_layer']:.3f}",
                f"{row['chance']:.3f}",
                f"{row['mass']:.3f}",
                f"{row['tokens_read']:.0f}",
                f"{row['index_flops_ratio']:.2f}",
                f"{row['index_bytes_ratio']:.2f}",
                "-" if time is None else f"{time:.0f}",
            )
        )
    notes = f"""
found     the planted number stands in the first 16 tokens of the answer, of {cases} cases
recall    share of DSA's tokens that the selector picks too, mean over {num_layers} layers; worst: the lowest layer; chance: picked blindly
mass      share of the attention's probability on the picked tokens
FLOPs, bytes   of the indexer for one token, next to DSA's
Recall, mass, tokens and costs at {length} tokens of context; ms/token is the median over all cases, on this machine."""
    return aligned(lines, 1) + "\n" + notes


def aligned(lines: Sequence[Sequence[str]], left: int) -> str:
    """Columns as wide as their widest cell, a rule under the first line; the first ``left`` columns to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = [
        "  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    ]
    return "\n".join([rows[0], "  ".join("-" * w for w in widths), *rows[1:]])
