"""The pictures: what is drawn where, read back from the pixels, and no trace left in the caller's matplotlib."""

import subprocess
import sys

import numpy as np
import pytest

from thresher.errors import ThresherError
from thresher.eval import plots

image = pytest.importorskip("matplotlib.image")
colors = pytest.importorskip("matplotlib.colors")

LENGTHS, DEPTHS = (2048, 7680), (0.1, 0.5, 0.9)


def share(path, colour):
    pixels = image.imread(path)[..., :3]
    return float((np.abs(pixels - colors.to_rgb(colour)).max(-1) < 0.01).mean())


def test_heatmap_cells_have_the_colour_of_their_result(tmp_path):
    cases = [(length, depth) for length in LENGTHS for depth in DEPTHS]
    found = {"dense": dict.fromkeys(cases, True), "random": dict.fromkeys(cases, False), "hisa": {cases[0]: True, cases[1]: False}}
    path = plots.needle_heatmap(tmp_path / "needle.png", found, LENGTHS, DEPTHS)
    hits, misses, empty = (share(path, colour) for colour in (plots.FOUND, plots.MISSED, plots.NOT_RUN))
    assert hits > 0.1
    assert misses == pytest.approx(hits, rel=0.1)
    assert empty == pytest.approx(hits * 4 / 7, rel=0.15)
    assert [file.name for file in tmp_path.iterdir()] == ["needle.png"]


def test_heatmap_rows_stand_in_the_given_order(tmp_path):
    found = {"first": {(2048, 0.1): True}, "second": {(2048, 0.1): False}}
    pixels = image.imread(plots.needle_heatmap(tmp_path / "n.png", found, [2048], [0.1]))[..., :3]
    rows = [np.nonzero((np.abs(pixels - colors.to_rgb(c)).max(-1) < 0.01).any(1))[0].mean() for c in (plots.FOUND, plots.MISSED)]
    assert rows[0] < rows[1]


def test_recall_lines_draw_in_different_styles(tmp_path):
    names = ["dense", "dsa", "misa", "misa_rerank", "hisa", "idsa", "random", "dsa_wide", "misa_static", "misa_random"]
    recalls = {name: [0.9 - 0.05 * i, float("nan"), 0.8 - 0.05 * i, 0.8] for i, name in enumerate(names)}
    path = plots.recall_by_layer(tmp_path / "recall.png", recalls, chance=0.067)
    assert all(share(path, colour) > 1e-4 for colour in plots.COLOURS)
    assert len({tuple(plots._line_style(i).items()) for i in range(len(names))}) == len(names)


def test_loss_curve_takes_zero_and_many_points(tmp_path):
    curves = {"training": [(i, 3.0 / (i + 1)) for i in range(300)], "held out": [(0, 3.0), (299, 0.0)]}
    path = plots.loss_curve(tmp_path / "loss.png", curves, "KL, nats a token", "Warm-up")
    assert share(path, plots.COLOURS[0]) > 1e-3
    assert share(path, plots.COLOURS[1]) > 1e-4


def test_nothing_to_draw_is_one_line(tmp_path):
    for draw in (
        lambda: plots.needle_heatmap(tmp_path / "x.png", {}, LENGTHS, DEPTHS),
        lambda: plots.recall_by_layer(tmp_path / "x.png", {"dsa": []}),
        lambda: plots.loss_curve(tmp_path / "x.png", {}, "KL", "t"),
    ):
        with pytest.raises(ThresherError, match="needs"):
            draw()
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_loaded_only_to_draw_and_pyplot_never():
    probe = (
        "import sys, thresher.eval.plots as p; a = 'matplotlib' in sys.modules;"
        "import tempfile, pathlib; p.recall_by_layer(pathlib.Path(tempfile.mkdtemp()) / 'r.png', {'dsa': [1.0]});"
        "print(a, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
