"""README's performance table, generated from the records: ``python -m thresher.bench.table README.md benchmarks/results``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from thresher.bench.cases import parse_case
from thresher.bench.ranks import PLACED
from thresher.bench.record import HOW, OVER_RANKS, Record, read
from thresher.errors import require

BEGIN = "<!-- performance: generated from benchmarks/results by thresher.bench.table -->"
END = "<!-- end of performance -->"
COLUMNS = ("case", "op", "selector", "inputs", "impl", "us", "peer", "peer us", "peer / ours", "floor us", "GPU", "date", "commit")
SHARED = ("selector", "inputs", "exchange", "impl", "GPU", "date", "commit")


def load(folder: Path) -> list[Record]:
    """All records of ``*.jsonl`` in a folder, oldest first; none when there is no such folder."""
    records = [record for path in sorted(folder.glob("*.jsonl")) for record in read(path)]
    return sorted(records, key=lambda record: record.date)


def table(records: Sequence[Record]) -> str:
    """Markdown: the newest record of everything that was timed, medians. A record of an uncommitted tree is marked with *.

    What is the same in every row stands in a line above it. Parts of a layer's step are left to the picture that stacks them (``parts``).
    Cases over ranks, where there are any, have a table of their own with all ways beside one another.
    """
    newest = {_key(record): record for record in records if record.op == "layer" or parse_case(record.case).kind != "layer"}
    ordered = [record for _, record in sorted(newest.items(), key=lambda item: (_place(item[1]), item[0]))]
    alone, over = ([record for record in ordered if (record.ranks > 1) == ranks] for ranks in (False, True))
    tables = [_table(COLUMNS, [_cells(record) for record in alone])] if alone or not over else []
    if over:
        ways = [way for way in PLACED if any(way in record.ways for record in over)]
        columns = (*SHARED[:3], *(f"{way} us" for way in ways), "best other / ours", "MB held", *SHARED[3:])
        tables.append(_table(("case", *columns), [_cells_over_ranks(record, ways) for record in over]))
    return "\n".join(tables)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    same = [at for at, name in enumerate(columns) if name in SHARED and len({row[at] for row in rows}) == 1]
    said = ", ".join(f"{columns[at]} {rows[0][at]}" for at in same if rows[0][at] != "-")
    lines = [[cell for at, cell in enumerate(row) if at not in same] for row in (columns, *rows)]
    return (f"In every row: {said}.\n\n" if said else "") + markdown(lines) + "\n"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, of which the first row names the columns."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ("---",) * len(rows[0]), *rows[1:]))


def updated(text: str, records: Sequence[Record]) -> str:
    """A page with the table of ``records`` between its marks; the page as it is when there are no records.

    Raises:
        ThresherError: there are records, and not one pair of marks.
    """
    return between(text, BEGIN, END, table(records)) if records else text


def between(text: str, begin: str, end: str, made: str) -> str:
    """A page with what was ``made``, whole lines, between its marks.

    Raises:
        ThresherError: not one pair of marks.
    """
    marks = (text.count(begin), text.count(end))
    require(marks == (1, 1) and text.index(begin) < text.index(end), f"the page must hold {begin} and {end} once", marks, "add them")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{made}{end}{rest.partition(end)[2]}"


def _place(record: Record) -> tuple[str, str, str, int, int, int]:
    case = parse_case(record.case)
    return record.gpu, record.op, case.kind, -case.heads, case.rows, max(case.lengths(record.seed))


def _key(record: Record) -> tuple[str, ...]:
    options = sorted((name, str(value)) for name, value in record.settings.items() if name not in (*HOW, *OVER_RANKS))
    ours = (record.gpu, record.op, record.case, record.selector or "", str(options), record.inputs, record.impl)
    over = (*(record.settings[name] for name in ("exchange", "way")), *record.settings["others"]) if record.ranks > 1 else ()
    return (*ours, record.peer or "", str(record.ranks), *over)


def _cells(record: Record) -> tuple[str, ...]:
    star = "*" if record.dirty else ""
    theirs = ("-", "-", "-")
    if record.peer is not None and record.peer_time_us is not None:
        theirs = (record.peer, _us(record.peer_time_us["p50"]), f"{record.ratio:.2f}")
    floor = "-" if record.floor_us is None else _us(record.floor_us)
    ours = (record.case, record.op, record.selector or "-", record.inputs, record.impl, _us(record.time_us["p50"]) + star)
    return (*ours, *theirs, floor, record.gpu, record.date, (record.commit or "-")[:8])


def _cells_over_ranks(record: Record, ways: Sequence[str]) -> tuple[str, ...]:
    times, way, star = record.ways, record.settings["way"], "*" if record.dirty else ""
    cells = [_us(times[name]) + (star if name == way else "") if name in times else "-" for name in ways]
    best = min((time for name, time in times.items() if name != way), default=None)
    ratio = "-" if best is None else f"{best / times[way]:.2f}"
    held = f"{record.settings['cache_bytes'][way] / 1e6:.1f}"
    what = (record.case, record.selector or "-", record.inputs, record.settings["exchange"])
    where = (record.impl, record.gpu, record.date, (record.commit or "-")[:8])
    return (*what, *cells, ratio, held, *where)


def _us(time: float) -> str:
    return f"{time:.1f}" if time < 1000 else f"{time:.0f}"


if __name__ == "__main__":
    page, results = (Path(argument) for argument in sys.argv[1:3])
    page.write_text(updated(page.read_text(encoding="utf-8"), load(results)), encoding="utf-8")
