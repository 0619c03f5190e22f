"""A run's folder is never emptied by surprise and its files are whole or absent."""

import json
import os

import pytest

from thresher.errors import ThresherError
from thresher.eval.rundir import atomic_path, create_run_dir, write_json, write_text


def test_new_and_empty_folders_are_fine(tmp_path):
    made = create_run_dir(tmp_path / "runs" / "demo")
    assert made.is_dir()
    assert create_run_dir(made) == made


def test_a_used_folder_needs_a_word(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "file").write_text("x")
    with pytest.raises(ThresherError, match="new or empty"):
        create_run_dir(tmp_path)
    create_run_dir(tmp_path, resume=True)
    assert (tmp_path / "deep" / "er" / "file").read_text() == "x"
    create_run_dir(tmp_path, overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_run_is_never_emptied(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ThresherError, match=r"must hold config\.json"):
        create_run_dir(tmp_path, overwrite=True)
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_overwrite_does_not_follow_links(tmp_path):
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    (outside / "kept").write_text("x")
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / "link").symlink_to(outside)
    create_run_dir(run, overwrite=True)
    assert (outside / "kept").exists()
    (tmp_path / "alias").symlink_to(outside)
    with pytest.raises(ThresherError, match="symbolic link"):
        create_run_dir(tmp_path / "alias", overwrite=True)


@pytest.mark.parametrize("inside", ["", "below"])
def test_a_file_in_the_way_is_one_line(tmp_path, inside):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ThresherError) as caught:
        create_run_dir(tmp_path / "file" / inside)
    assert "\n" not in str(caught.value)


def test_both_words_at_once(tmp_path):
    with pytest.raises(ThresherError, match="only one"):
        create_run_dir(tmp_path / "new", resume=True, overwrite=True)


def test_json_round_trip_and_ordinary_permissions(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"recall": 0.5, "name": "misa†"})
    assert json.loads(path.read_text()) == {"recall": 0.5, "name": "misa†"}
    (tmp_path / "plain").write_text("x")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["metrics.json", "plain"]


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "metrics.json"
    write_text(path, "old")
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"recall": float("nan")})

    def stop_halfway():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stop_halfway()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_a_reader_never_sees_half(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.suffix == ".txt"
    assert path.read_text() == "new"
