"""Estimates how long a run takes from a stop request to its end, from its measurements so far.

lead = Lead(60.0)
lead.took("step", seconds)
lead.took("clip", seconds)          # whatever else cannot be left before its end
lead.seconds(save_seconds)          # so much before a time limit it must begin to stop
"""

from __future__ import annotations

from collections import defaultdict, deque

RECENT = 50  # of each kind are remembered
# A request that comes in a step is acted on after the next one, and steps differ, those of other buckets most.
TIMES = {"step": 5}


class Lead:
    """The estimate of one attempt."""

    def __init__(self, margin: float) -> None:
        """`margin`: seconds that are always added."""
        self._margin = margin
        self._recent: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))

    def took(self, what: str, seconds: float) -> None:
        """Record the duration of something that cannot be interrupted: a step, a clip of a validation, a comparison of
        replicas. Not of saves, nor of one that took longer than the next will, because of compilation."""
        self._recent[what].append(seconds)

    def seconds(self, saving: float) -> float:
        """Seconds that stopping takes. `saving`: those of a save; one may be in progress when another is due."""
        slowest = sum(TIMES.get(what, 1) * max(recent) for what, recent in self._recent.items())
        return self._margin + 2 * saving + slowest
