"""Requests to stop: signals, the run's stop file, an approaching time limit.

All ranks learn of a request in the sums of the step (train/parallel/step_sums.py).
"""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


def deadline_ahead() -> float | None:
    """The time limit that the environment gives, in seconds since the epoch; None where there is none, or where it is
    over: it was of a job in whose shell this process was started."""
    limit = _number(os.environ.get("MOVA_DEADLINE"))
    return limit if limit is not None and limit > time.time() else None


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


class StopRequest:
    """Records that this rank was asked to stop: by SIGTERM, SIGINT, SIGHUP, SIGUSR2, the run's stop file (first rank),
    or an approaching time limit. Create it early: a signal before that ends the process, as usual.

    `lead`: seconds before the time limit (MOVA_DEADLINE, see core/errors.py) at which the run must begin to stop.
    """

    def __init__(self) -> None:
        self.lead = 0.0
        self._asked = False  # no Event: a second signal within its set() would wait for the first one's lock for ever
        self._stop_file: Path | None = None
        self._started = _number(os.environ.get("MOVA_STARTED")) or time.time()
        self._deadline = deadline_ahead() or math.inf
        for number in STOP_SIGNALS:
            # An ignored signal stays ignored: nohup ignores SIGHUP, a shell SIGINT for what runs in its background.
            if number not in (signal.SIGINT, signal.SIGHUP) or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def watch(self, stop_file: Path) -> None:
        """Obey this file too, if it is newer than the launch; delete an older one. One rank only."""
        self._stop_file = stop_file
        if stop_file.exists() and stop_file.stat().st_mtime < self._started:
            stop_file.unlink()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def requested(self) -> bool:
        """Whether this rank knows of a request."""
        return (
            self._asked
            or time.time() >= self._deadline - self.lead
            or (self._stop_file is not None and self._stop_file.exists())
        )
