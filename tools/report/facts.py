"""Facts of the page besides the curves: state, events on the time axis, checkpoints, data, layout, config, clips.

Everything is read from the run's folder; a missing or damaged piece is listed on the page (`missing`).
"""

from __future__ import annotations

import base64
import json
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from core.errors import RunError
from core.jsonl import read_lines
from core.run_dir import RunDir
from core.terminal import clock
from data.dataset.index import DatasetIndex
from data.errors import DataError
from data.inspect import describe
from data.storage.storage import is_remote
from launch.attempts import Attempts
from train.checkpoint.checkpoint import STATE, committed, damage, step_of
from train.monitor.samples import clip_file, held_out_name, read_samples

MOST_EVENTS = 400  # rows of the table, and marks on the time axis; the newest
WORDS = {"event", "step", "time"}  # of an event's line; the others are its details
REMARKABLE = ("resumed", "went back", "checkpoint failed", "upload failed", "not finite", "spike", "slow rank")


@dataclass(frozen=True)
class ReportEvent:
    """An event. `time`: seconds since the epoch."""

    time: float
    kind: str
    step: int | None
    details: str


@dataclass(frozen=True)
class Attempt:
    """One start of the run; `end` None: it still runs, or was killed without writing its end."""

    begin: float
    end: float | None
    ended: str
    first: int
    last: int | None
    where: str


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint. `fault`: why it cannot be used, or ""; `layout`, `note`: of the newest only."""

    step: int
    time: float
    bytes: int
    fault: str
    layout: str = ""
    note: str = ""


@dataclass(frozen=True)
class ReportClip:
    """A clip for the page; `url`: data of the mp4."""

    step: int
    name: str
    kind: str
    prompt: str
    measures: dict[str, float]
    url: str


@dataclass
class Facts:
    """All that the page needs, as plain values. `missing`: sentences about what could not be read."""

    run: str
    state: str
    error: str
    tiles: list[tuple[str, str]] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    events: list[ReportEvent] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    datasets: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)
    layout: list[tuple[str, str]] = field(default_factory=list)
    config: list[tuple[str, str]] = field(default_factory=list)
    clips: list[ReportClip] = field(default_factory=list)
    clips_left_out: int = 0
    held_out: list[ReportClip] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def resumed(self) -> list[int]:
        """Steps at which the run resumed after a stop or a death."""
        return sorted({event.step for event in self.events if event.kind == "resumed" and event.step is not None})

    @property
    def counts(self) -> Counter[str]:
        """The number of events of each kind."""
        return Counter(event.kind for event in self.events)


def read_facts(run: RunDir, steps: int, most_clips: int, most_bytes: int) -> Facts:
    """Read a run directory. steps: those in metrics.jsonl; most_bytes: limit for all clips on the page."""
    status = run.read_status()
    facts = Facts(run.root.absolute().name, str(status.get("state", "unknown")), str(status.get("error", "")))
    if facts.state == "running" and run.holder() is None:
        facts.error = "status.json contains running, but no process on this machine holds the run"
    if not status:
        facts.missing.append("status.json: the state of the run")
    config = _config(run, facts)
    facts.events = _events(run, facts)
    facts.attempts = _attempts(run, facts)
    facts.checkpoints = _checkpoints(run, facts)
    _data(config, facts)
    _layout(run, config, status, facts)
    _clips(run, facts, most_clips, most_bytes)
    asked = config.get("steps")
    first = facts.attempts[0].begin if facts.attempts else None
    facts.tiles = [
        ("state", facts.state),
        ("step", f"{steps:,}" + (f" of {asked:,}" if isinstance(asked, int) else "")),
        ("begun", time.strftime("%Y-%m-%d %H:%M", time.localtime(first)) if first else "?"),
        ("at work", clock(busy_seconds(facts.attempts)) if facts.attempts else "?"),
        ("restarts", str(max(len(facts.attempts) - 1, 0)) if facts.attempts else "?"),
        ("last checkpoint", f"{facts.checkpoints[-1].step:,}" if facts.checkpoints else "none"),
    ]
    return facts


def busy_seconds(attempts: list[Attempt]) -> float:
    """Seconds for which the run was active. A killed attempt counts up to the beginning of the next one."""
    total = 0.0
    for number, attempt in enumerate(attempts):
        after = attempts[number + 1].begin if number + 1 < len(attempts) else time.time()
        total += (attempt.end or after) - attempt.begin
    return total


def _config(run: RunDir, facts: Facts) -> dict[str, Any]:
    try:
        config = run.read_config()
    except (OSError, RunError) as error:
        facts.missing.append(f"config.yaml: {error}")
        return {}
    facts.config = list(_flat(config))
    return config


def _flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in config.items():
        rows += (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [(f"{prefix}{key}", f"{value}")]
        )
    return rows


def _events(run: RunDir, facts: Facts) -> list[ReportEvent]:
    path = run.root / "events.jsonl"
    if not path.exists():
        facts.missing.append("events.jsonl: events besides the steps")
        return []
    found = []
    for record in read_lines(path):
        try:
            when = datetime.strptime(record["time"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
            details = ", ".join(f"{key} {value}" for key, value in record.items() if key not in WORDS)
            found.append(ReportEvent(when, str(record["event"]), record.get("step"), details))
        except (ValueError, KeyError, TypeError):
            continue  # of another version, or no event
    return found


def _attempts(run: RunDir, facts: Facts) -> list[Attempt]:
    record = Attempts(run)
    if not record.path.exists():
        facts.missing.append("attempts.jsonl: when the run was started (only mova launch writes it)")
        return []
    found: list[Attempt] = []
    try:
        lines = [line for line in record.read() if isinstance(line, dict)]
    except ValueError as error:
        facts.missing.append(f"attempts.jsonl: {error}")
        return []
    for line in lines:
        if line["event"] == "begin":
            found.append(
                Attempt(line["time"], None, "", line["step"], None, f"{line.get('job')} on {line.get('nodes')}")
            )
        elif line["event"] == "end" and found and found[-1].end is None:
            one = found[-1]
            found[-1] = Attempt(one.begin, line["time"], line["ended"], one.first, line["step"], one.where)
    alive = run.holder() is not None
    return [
        one if one.end is not None else Attempt(
            one.begin, None, "runs" if alive and one is found[-1] else "killed", one.first, None, one.where)
        for one in found
    ]  # fmt: skip


def _checkpoints(run: RunDir, facts: Facts) -> list[Checkpoint]:
    rows: list[Checkpoint] = []
    for path in committed(run.checkpoints):
        try:  # one may be rotated away while we look
            size = sum(file.stat().st_size for file in path.iterdir())
            when = (path / "COMMITTED").stat().st_mtime
            rows.append(Checkpoint(step_of(path), when, size, damage(path) or ""))
        except OSError:
            continue
    if not rows:
        facts.missing.append("checkpoints: none yet")
        return rows
    try:
        state = json.loads((committed(run.checkpoints)[-1] / STATE).read_text())
        layout, quarantined = f"{state['layout']}; torch {state['torch']}", len(state["data"]["quarantine"])
        rows[-1] = replace(rows[-1], layout=layout, note=f"{quarantined:,} samples in quarantine")
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        pass
    return rows


def _data(config: dict[str, Any], facts: Facts) -> None:
    data = config.get("data", {})
    paths = [("training", data.get("path")), ("validation", data.get("valid_path"))]
    paths += [("training", one.get("path")) for one in data.get("datasets") or []]
    paths += [
        (f"training, from step {part.get('first_step')}", one.get("path"))
        for part in data.get("segments") or []
        for one in part.get("datasets") or []
    ]
    for use, path in paths:
        if path is None:
            continue
        if is_remote(path):
            facts.datasets.append((f"{use}: {path}", [("", "is remote; mova inspect examines it")]))
            continue
        try:
            index = DatasetIndex.open(Path(path), check_files=False)
            rows = [tuple(part.strip() for part in line.partition("  ")[::2]) for line in describe(index, 0)]
            index.close()
            facts.datasets.append((f"{use}: {path}", rows[1:]))  # type: ignore[arg-type]
        except (DataError, OSError) as error:
            facts.missing.append(f"dataset {path} ({use}): {error}")


def _layout(run: RunDir, config: dict[str, Any], status: dict[str, Any], facts: Facts) -> None:
    if status.get("layout"):
        facts.layout.append(("this attempt", str(status["layout"])))
    if facts.checkpoints and facts.checkpoints[-1].layout:
        facts.layout.append(("of the last checkpoint", facts.checkpoints[-1].layout))
    try:
        facts.layout += [(str(what), str(value)) for what, value in json.loads(run.layout.read_text()).items()]
    except (OSError, ValueError, AttributeError):
        facts.missing.append("layout.json: the table that an attempt begins with")
    facts.layout += [(f"parallel.{key}", str(value)) for key, value in config.get("parallel", {}).items()]
    if not facts.layout:
        facts.missing.append("layout: recorded neither in status.json nor in config.yaml")


def _clips(run: RunDir, facts: Facts, most: int, most_bytes: int) -> None:
    samples = read_samples(run.root)
    if not samples:
        facts.missing.append("samples: none yet (mova watch generates them during a run)")
    room = most_bytes
    for sample in reversed(samples[-most:] if most else []):  # the newest first
        url = _data_url(clip_file(run.root, sample.file), room)
        if url is None:
            break
        room -= len(url)
        facts.clips.append(ReportClip(sample.step, sample.file, sample.kind, sample.prompt, sample.measures, url))
    facts.clips.sort(key=lambda clip: (-clip.step, clip.name))
    facts.clips_left_out = len(samples) - len(facts.clips)
    shown = {clip.name for clip in facts.clips}
    given = {sample.source: sample.prompt for sample in samples if sample.file in shown and sample.source}
    for key, prompt in given.items():
        url = _data_url(clip_file(run.root, held_out_name(key)), room)
        if url is not None:
            room -= len(url)
            facts.held_out.append(ReportClip(0, key, "held-out", prompt, {}, url))


def _data_url(path: Path | None, most: int) -> str | None:
    """The file as a data URL, None if it is missing or too long."""
    if path is None:
        return None
    try:
        url = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
    except OSError:
        return None
    return url if len(url) <= most else None
