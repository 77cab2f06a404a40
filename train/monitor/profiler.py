"""Profiles a run on request: profiler traces, memory snapshots and stacks of chosen steps on chosen ranks.

    inspect.at=[100]                                     # by config: steps 100 to 102 of rank 0
    echo '{"steps": 5, "ranks": [0, 8]}' > RUN/profile   # while it runs: the next steps; empty: as configured

Results are in RUN/inspect/ (stacks: where train/faults/watchdog.py writes them). Profiling never ends a run.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.cuda import _memory_viz
from torch.profiler import ProfilerActivity, profile, record_function

from core.durable import write_atomically
from core.errors import RunError
from core.ranges import bounded
from core.run_dir import RunDir
from train.monitor.kernel_kinds import seconds_by_kind
from train.parallel.collectives import on_first_rank

REQUEST = "profile"
WHAT = ("trace", "memory", "stacks")


@dataclass
class ProfilerConfig:
    """Profiling of chosen steps. A file `profile` in the run directory replaces all keys but `at`, for one profile.

    at: steps at which a profile begins
    steps: number of steps in a profile
    ranks: ranks that are profiled
    what: trace (of the profiler), memory (what occupies the GPU's memory), stacks
    """

    at: list[int] = bounded([], "[0, inf)")
    steps: int = bounded(3, "[1, inf)")
    ranks: list[int] = bounded([0], "[0, inf)")
    what: list[str] = field(default_factory=lambda: ["trace"])

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"inspect.steps is {self.steps!r}; give a number of steps, from 1 on")
        for name in ("at", "ranks"):
            value = getattr(self, name)
            if not isinstance(value, list) or not all(isinstance(item, int) and item >= 0 for item in value):
                raise ValueError(f"inspect.{name} is {value!r}; give a list of numbers, from 0 on")
        if not isinstance(self.what, list) or not self.what or not set(self.what) <= set(WHAT):
            raise ValueError(f"inspect.what is {self.what!r}; give a list of some of {', '.join(WHAT)}")


class Profiler:
    """The profiles of one run. All ranks make the same calls; ranks that are not selected do nothing."""

    def __init__(
        self,
        run: RunDir,
        config: ProfilerConfig,
        device: torch.device,
        say: Callable[[str, int, str], None],
        dump_stacks: Callable[[str], None],
    ) -> None:
        """say(kind, step, text): informs the user, on the first rank. RunError for a rank that does not exist."""
        self._request, self._folder = run.root / REQUEST, run.root / "inspect"
        self._config, self._device, self._say, self._dump_stacks = config, device, say, dump_stacks
        self._rank = dist.get_rank()
        try:
            _check_ranks(config)
        except ValueError as error:
            raise RunError(str(error)) from None
        self._plan = dict.fromkeys(config.at, config)
        self._taken = 0  # the last request read, in case it cannot be removed
        self._look: _Look | None = None
        self._begin = time.perf_counter()

    def requested(self) -> bool:
        """Whether a file requests a profile. One rank checks, once per step, and tells the others."""
        try:
            return self._look is None and self._request.stat().st_mtime_ns != self._taken
        except OSError:
            return False

    def take(self, step: int) -> None:
        """Read that file, for a profile from `step` on."""
        found = on_first_rank(self._read)
        if isinstance(found, ProfilerConfig):
            self._plan[step] = found
        elif found is not None:
            self._say("not inspected", step, f"{self._request} is ignored: {found}")

    def _read(self) -> ProfilerConfig | str | None:
        try:
            self._taken = self._request.stat().st_mtime_ns
            text = self._request.read_text()
            with suppress(OSError):
                self._request.unlink()
            asked = json.loads(text) if text.strip() else {}
            if not isinstance(asked, dict) or not asked.keys() <= {"steps", "ranks", "what"}:
                return f'{text.strip()!r} is not an object of "steps", "ranks", "what"'
            config = replace(self._config, at=[], **asked)
            _check_ranks(config)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            return str(error)
        return config

    def step(self, step: int) -> dict[str, float]:
        """Called before step `step`, and thus after the previous one. Returns the metrics of a profile that ended."""
        seconds, self._begin = time.perf_counter() - self._begin, time.perf_counter()
        found = self.close() if self._look is not None and step >= self._look.end else {}
        asked = self._plan.pop(step, None)
        if asked is not None and self._look is not None:
            self._say("not inspected", step, f"step {step}: no profile begins while one is in progress")
        elif asked is not None:
            if "memory" in asked.what and self._device.type != "cuda":
                self._say("not inspected", step, "inspect: memory snapshots are of GPUs; this run has none")
            self._look = _Look(step, asked, self._device, self._rank in asked.ranks)
            self._try(self._look.start)
        if self._look is not None:
            self._look.mark(step)
            if self._look.stacks:
                wait = seconds / 2  # in the middle of the step, if it takes as long as the last one
                timer = threading.Timer(wait, self._dump_stacks, (f"{wait:.3g} s after step {step} began",))
                timer.daemon = True
                timer.start()
        return found

    def close(self) -> dict[str, float]:
        """End a profile in progress, and keep its results; also after an error. Returns metrics of its trace."""
        look, self._look = self._look, None
        if look is None:
            return {}
        self._try(lambda: look.write(self._folder, f"step-{look.first:08d}-rank{self._rank}"))
        ranks = ", ".join(map(str, look.config.ranks))
        text = f"profiled {look.marked} steps from {look.first} on, rank {ranks}: {', '.join(look.config.what)}"
        self._say("inspected", look.first, f"{text}; see {self._folder}")
        return {f"perf/profiled_{kind}_time": seconds for kind, seconds in look.kinds.items()}

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # of torch's internals too: a profile ends no run
            print(f"rank {self._rank}: parts of the profile failed: {error}", file=sys.stderr, flush=True)


class _Look:
    """Consecutive steps; recorded on the ranks where it is `mine`."""

    def __init__(self, first: int, config: ProfilerConfig, device: torch.device, mine: bool) -> None:
        self.first, self.config, self.end, self.marked = first, config, first + config.steps, 0
        self._gpu = device.type == "cuda"
        self._trace, self._memory = mine and "trace" in config.what, mine and self._gpu and "memory" in config.what
        self.stacks = mine and "stacks" in config.what
        self._profile: profile | None = None
        self._marker: record_function | None = None
        self.kinds: dict[str, float] = {}  # seconds of a step by kind of kernel

    def start(self) -> None:
        """Record from now on."""
        if self._memory:
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        if self._trace:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._gpu else [])]
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()

    def mark(self, step: int) -> None:
        """Mark the beginning of step `step` in the trace."""
        self._unmark()
        self.marked += 1
        if self._profile is not None:
            self._marker = record_function(f"step {step}")
            self._marker.__enter__()

    def _unmark(self) -> None:
        if self._marker is not None:
            self._marker.__exit__(None, None, None)
            self._marker = None

    def write(self, folder: Path, name: str) -> None:
        """Stop, and write folder/name.trace.json and folder/name.memory.html."""
        self._unmark()
        page = ""
        if self._profile is not None:
            self._profile.stop()
        if self._memory:
            page = _memory_viz.trace_plot(torch.cuda.memory._snapshot())
            torch.cuda.memory._record_memory_history(enabled=None)
        folder.mkdir(parents=True, exist_ok=True)
        if page:
            write_atomically(folder / f"{name}.memory.html", page)
        if self._profile is not None:
            partial = folder / f"{name}.trace.json.partial"
            self._profile.export_chrome_trace(str(partial))  # says nothing when it can't write; the next line does
            os.replace(partial, folder / f"{name}.trace.json")
            inner: Any = self._profile.profiler
            self.kinds = seconds_by_kind(inner.kineto_results.events(), self._gpu, self.marked)


def _check_ranks(config: ProfilerConfig) -> None:
    wrong = [rank for rank in config.ranks if rank >= dist.get_world_size()]
    if wrong:
        raise ValueError(f"inspect.ranks {wrong}: this run has ranks 0 to {dist.get_world_size() - 1}")
