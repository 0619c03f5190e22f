"""An end for a process whose GPU waits for other ranks in vain: over NCCL nothing on the host waits, and so nothing there would fail."""

from __future__ import annotations

import os
import sys
import time
from queue import SimpleQueue
from threading import Thread

import torch

POLL_S = 0.05


class Watch:
    """Looks from a thread of its own whether what the GPU was given is done in time; if not, it says so in one line and ends the process.

    Args:
        timeout_s: seconds that work may take from when it was given.
        line: what is said.
    """

    def __init__(self, timeout_s: float, line: str) -> None:
        self.timeout_s, self.line = timeout_s, line
        self._given: SimpleQueue[tuple[torch.cuda.Event, float]] = SimpleQueue()
        Thread(target=self._look, daemon=True).start()

    def expect(self) -> None:
        """What the current stream was given by now must be done in time. Of what a CUDA graph records nothing is known."""
        if torch.cuda.is_current_stream_capturing():
            return
        event = torch.cuda.Event()
        event.record()
        self._given.put((event, time.monotonic() + self.timeout_s))

    def _look(self) -> None:
        while True:
            event, end = self._given.get()
            while not event.query():
                if time.monotonic() > end:
                    sys.stderr.write(f"thresher: {self.line}\n")
                    sys.stderr.flush()
                    os._exit(2)  # nothing else ends a process whose GPU never answers
                time.sleep(POLL_S)
