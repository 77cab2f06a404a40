"""The time axis: attempts as bars, checkpoints and events as marks, positions in the viewBox of an SVG."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tools.report.facts import MOST_EVENTS, REMARKABLE, Facts

WIDTH, LEFT = 1100.0, 96.0
STEPS = (60, 300, 900, 3600, 6 * 3600, 86400, 7 * 86400, 30 * 86400)  # seconds between ticks
MOST_TICKS = 9


@dataclass(frozen=True)
class Bar:
    """One attempt."""

    x: float
    width: float
    ended: str
    text: str


@dataclass(frozen=True)
class Mark:
    """A checkpoint or an event."""

    x: float
    kind: str
    text: str


@dataclass(frozen=True)
class Timeline:
    """Attempts, checkpoints and events over time."""

    bars: list[Bar]
    checkpoints: list[Mark]
    events: list[Mark]
    ticks: list[tuple[float, str]]


def make_timeline(facts: Facts) -> Timeline | None:
    """None if nothing with a time is known."""
    shown = [event for event in facts.events if event.kind in REMARKABLE][-MOST_EVENTS:]
    saved = [event for event in facts.events if event.kind == "checkpoint"][-MOST_EVENTS:]
    times = [event.time for event in facts.events] + [one.begin for one in facts.attempts]
    times += [one.end or time.time() for one in facts.attempts if one.end or one.ended == "runs"]
    if not times:
        return None
    first, last = min(times), max(max(times), min(times) + 1)

    def x(when: float) -> float:
        return LEFT + WIDTH * (when - first) / (last - first)

    bars = []
    for number, one in enumerate(facts.attempts):
        # A killed one wrote no end: use the last thing it did.
        following = facts.attempts[number + 1].begin if number + 1 < len(facts.attempts) else last
        heard = [event.time for event in facts.events if one.begin <= event.time < following]
        end = one.end or (last if one.ended == "runs" else max(heard, default=one.begin))
        said = f"attempt {number + 1}: {one.ended}, {one.where}, from step {one.first:,}"
        said += f" to {one.last:,}" if one.last is not None else ""
        bars.append(Bar(x(one.begin), max(x(end) - x(one.begin), 1.5), one.ended, said))
    return Timeline(
        bars,
        [Mark(x(one.time), "checkpoint", f"checkpoint of step {one.step}") for one in saved],
        [Mark(x(one.time), one.kind, f"{one.kind}, step {one.step}: {one.details}") for one in shown],
        [(x(when), text) for when, text in _ticks(first, last)],
    )


def _ticks(first: float, last: float) -> list[tuple[float, str]]:
    step = next((one for one in STEPS if (last - first) / one <= MOST_TICKS), STEPS[-1])
    form = "%m-%d" if step >= 86400 else "%m-%d %H:%M" if last - first > 86400 else "%H:%M"
    away = time.localtime(first).tm_gmtoff
    when, found = -(-(first + away) // step) * step - away, []
    while when <= last:
        found.append((when, time.strftime(form, time.localtime(when))))
        when += step
    return found
