"""Run directories: one folder for each run, never overwritten silently, each file whole or absent."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from thresher.errors import ThresherError, require

RUN_MARK = "config.json"


def create_run_dir(path: str | Path, resume: bool = False, overwrite: bool = False) -> Path:
    """Make ``path`` ready for a run and return it.

    A folder that does not exist or is empty is always fine. One with files in it is kept as it is with ``resume``; with
    ``overwrite`` it is emptied, but only if it holds ``config.json``, the mark of a run: no other folder is ever emptied.

    Raises:
        ThresherError: when the folder has files and neither was asked for, when both were, when a folder to overwrite is not
            a run's, or when ``path`` cannot be a folder.
    """
    run_dir = Path(path)
    require(not (resume and overwrite), "only one of resume and overwrite may be given", "both", "choose one")
    require(not run_dir.is_symlink(), "the run directory must not be a symbolic link", run_dir, "name its target")
    require(not run_dir.exists() or run_dir.is_dir(), "the run directory must be a folder", run_dir, "choose another name")
    if run_dir.is_dir() and any(run_dir.iterdir()):
        require(
            resume or overwrite,
            "the run directory must be new or empty",
            f"{run_dir}, which holds an earlier run",
            "choose another, or ask to resume or to overwrite it",
        )
        if overwrite:
            marked = (run_dir / RUN_MARK).is_file()
            require(marked, f"a folder to overwrite must hold {RUN_MARK}", run_dir, "empty it by hand or choose another")
            for entry in run_dir.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ThresherError(f"the run directory must be creatable; got {run_dir} ({error.strerror}); choose another place") from error
    return run_dir


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary name beside ``path``, with its suffix, renamed to ``path`` when the block ends well and removed when it does not.

    For writers that take a file name, such as a picture's. A reader sees the old file or the new one, never half of one.
    """
    final = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{final.stem}-", suffix=final.suffix, dir=final.parent)
    temporary = Path(name)
    try:
        # mkstemp makes the file private; a run's results are as readable as any other file of the user's.
        os.fchmod(handle, 0o666 & ~_umask())
        os.close(handle)
        yield temporary
        os.replace(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON with a closing newline, atomically.

    Raises:
        ValueError: for nan or infinity, which JSON has no words for; the earlier file, if any, is untouched.
        TypeError: for a value JSON cannot hold.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
