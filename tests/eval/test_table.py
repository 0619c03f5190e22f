"""The demo's table: every column lines up and nothing is lost."""

from thresher.eval.table import COLUMNS, demo_table

ROW = {
    "found": 9,
    "total": 9,
    "recall": 0.98765,
    "recall_worst_layer": 0.9,
    "chance": 0.0667,
    "mass": 0.5,
    "tokens_read": 512.4,
    "index_flops_ratio": 0.266,
    "index_bytes_ratio": 1.0156,
    "time_per_token_ms": 123.4,
}
ROWS = {
    "dense": {**ROW, "tokens_read": 7680.0},
    "a_very_long_selector_name": {**ROW, "found": 10, "total": 10},
    "x": {**ROW, "time_per_token_ms": None},
}


def test_columns_line_up():
    lines = demo_table(ROWS, 7680, 30, 9).splitlines()
    head, rule, *rows = lines[: 2 + len(ROWS)]
    assert len({len(line) for line in (head, rule, *rows)}) == 1
    assert head.split() == list(COLUMNS)
    ends = [i for i, (a, b) in enumerate(zip(rule, rule[1:] + " ", strict=True)) if a == "-" and b == " "]
    assert len(ends) == len(COLUMNS)
    for line in (head, *rows):
        assert all(line[end] != " " for end in ends[1:]), "numbers end where their column ends"
        assert all(line[end + 1 : end + 3] in ("  ", "") for end in ends), "columns do not touch"


def test_values_are_rounded_and_complete():
    lines = demo_table(ROWS, 7680, 30, 9).splitlines()
    assert lines[2].split() == ["dense", "9/9", "0.988", "0.900", "0.067", "0.500", "7680", "0.27", "1.02", "123"]
    assert lines[3].split()[:2] == ["a_very_long_selector_name", "10/10"]
    assert lines[4].split()[-1] == "-"


def test_notes_name_the_sizes():
    notes = demo_table(ROWS, 4096, 7, 5).split("\n\n", 1)[1]
    assert "4096 tokens" in notes
    assert "7 layers" in notes
    assert "5 cases" in notes
