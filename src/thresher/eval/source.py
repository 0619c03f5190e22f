"""Which version of the code a record was made by."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def source_state() -> tuple[str | None, bool | None]:
    """The commit this package runs from and whether its sources differ from it; None for both outside a repository.

    THRESHER_COMMIT names the commit where git history is not at hand; whether the sources differ is then unknown.
    """
    if "THRESHER_COMMIT" in os.environ:
        return os.environ["THRESHER_COMMIT"], None
    folder = Path(__file__).parent
    try:
        commit, status = (
            subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", ":/src"])
        )
    except (OSError, subprocess.SubprocessError):
        return None, None
    return commit, bool(status)
