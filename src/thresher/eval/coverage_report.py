"""A run of ``thresher eval coverage`` on paper: tables, what follows from them, pictures, and the figures as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from thresher.eval.coverage_error import DENSE_ROW, DSA_ROW, OutputError
from thresher.eval.coverage_table import Results, error_findings, error_table, findings, mean, placement_table, rule_table
from thresher.eval.plots import error_by_budget, missing_by_ranks
from thresher.eval.rundir import write_json, write_text

NOTES = """\
expected  share of the global top-k that the union of local sets holds at m, if which tokens they are says nothing about their rank
held      the share measured, mean over layers; worst: the lowest layer
missing   share of rows in which some rank has more than m of the global top-k, so that one is lost
needs     the smallest m that loses one in no more rows than promised; the rule holds where that is at most m
Neighbouring queries and layers are alike, so the rows weigh less than as many independent ones; what is rarer than one row is not seen."""
ERROR_NOTES = """\
from dsa, from dense   relative L2 error of a layer's attention output, the mean over layers and the worst layer
as dsa, as dense       next tokens that agree, each method used in every layer"""


def write_report(run: Path, topk: int, results: Results, errors: Mapping[str, OutputError], rule: int) -> str:
    """Write ``metrics.json``, ``table.txt``, ``coverage.png`` and, where there are errors, ``error.png``.

    Args:
        run: the run directory.
        topk: k.
        results: what was counted.
        errors: text -> what was collected; may be empty.
        rule: m by the rule for the ranks of ``errors``.

    Returns:
        the text of ``table.txt``, without its closing newline.
    """
    first = next(iter(next(iter(results.values()))))
    some = next(iter(results.values()))[first][0]
    parts = [
        f"k = {topk}, {some.rows} rows (queries x layers) a text, placement {first}; m by the rule, for a miss in {some.promise:g} of rows",
        rule_table(results, first),
        "share held and m needed, by placement (!: the rule is broken)",
        placement_table(results),
        "\n".join(findings(results)),
        NOTES,
    ]
    if errors:
        error = next(iter(errors.values()))
        ranks = error.methods[f"m={rule}"].placement.ranks
        last = len(error.following[DSA_ROW])
        heading = f"attention's output and next token of the last {last} tokens, by DSA on one device and IDSA over {ranks} ranks"
        parts += [heading, error_table(errors), "\n".join(error_findings(errors, rule)), ERROR_NOTES]
        budgets = {int(name[2:]): name for name in error.methods if name.startswith("m=")}
        lines = {text: [(m, mean(each.from_dsa[name])) for m, name in budgets.items()] for text, each in errors.items()}
        scale = {text: mean(each.from_dense[DSA_ROW]) for text, each in errors.items()}
        error_by_budget(run / "error.png", lines, scale, f"Attention output of IDSA against DSA, k = {topk}, {ranks} ranks")
    panels = {text: {name: [(c.ranks, c.missing) for c in row] for name, row in named.items()} for text, named in results.items()}
    missing_by_ranks(run / "coverage.png", panels, some.promise, f"Rows that lose a token of the top {topk}, at the rule's m")
    write_json(run / "metrics.json", {"coverage": _coverage(results), "error": {text: _error(each) for text, each in errors.items()}})
    table = "\n\n".join(parts)
    write_text(run / "table.txt", table + "\n")
    return table


def _coverage(results: Results) -> dict[str, object]:
    """text -> placement -> a list with an entry for each number of ranks."""
    return {
        text: {
            name: [{**asdict(c), "held": c.held, "worst": c.worst, "missing": c.missing, "obeys": c.obeys} for c in row]
            for name, row in named.items()
        }
        for text, named in results.items()
    }


def _error(error: OutputError) -> dict[str, object]:
    """way -> its figures."""
    return {
        name: {
            "tokens": mean(error.tokens[name]),
            "from_dsa_by_layer": error.from_dsa[name],
            "from_dense_by_layer": error.from_dense[name],
            "next_as_dsa": error.agreeing(name, DSA_ROW),
            "next_as_dense": error.agreeing(name, DENSE_ROW),
            "next_of": len(error.following[name]),
        }
        for name in error.methods
    }
