"""Weights & Biases as a mirror of the run directory: a thread that follows metrics.jsonl and the record of samples.

metrics.jsonl is authoritative, and is cut back to the checkpoint when a run resumes. Offline, each start therefore
writes a new folder from the whole file, and removes those of earlier starts: the newest folder holds the whole run,
each step once, whatever earlier starts lost or repeated. Online, the server has the steps up to the stop; repeated
steps are not sent again. Training neither waits for W&B nor fails with it: what a start finds in the file is sent using
a small share of the thread's time, which competes with training (all of it once the run ends).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from core.run_dir import RunDir
from core.secrets import without_secrets
from train.monitor.samples import clip_file, read_samples

POLL = 1.0  # seconds between looks at the file
PATIENCE = 60.0  # seconds that the end of a run waits for what is left to be written
MOST_SAMPLES = 200  # clips that are attached; of more, the newest
SLICE = 1 << 18  # bytes of the file that are sent in one go
SHARE = 0.1  # of the time that sending a backlog may take
OFF = "W&B is off from here on"

logger = logging.getLogger(__name__)


class WandbLog:
    """One start of a run in W&B. `facts`: information beside the config, such as the layout table."""

    def __init__(
        self, run: RunDir, mode: str, project: str, resolved: dict[str, Any], facts: dict[str, Any] | None = None
    ) -> None:
        self._run, self._mode, self._project = run, mode, project
        self._config = {**resolved, **(facts or {})}
        self._alerts: queue.SimpleQueue[tuple[str, str, str]] = queue.SimpleQueue()
        self._offset, self._rest = 0, b""
        self._wandb: Any = None
        self._processes: list[psutil.Process] = []
        self._first = 0  # the first step that the server does not have
        self._sent = -1  # the newest step that was given to W&B
        self._held: dict[str, Any] | None = None  # a validation after that many steps, whose own step is still to come
        self.trouble: str | None = None  # why nothing is sent any more
        self._attached: set[str] = set()
        self._begun = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Called when the first step is done: until then importing and starting W&B would take time of
        the interpreter that prepares it, and all other ranks would wait for that."""
        self._begun.set()

    def alert(self, title: str, text: str, level: str = "WARN") -> None:
        """Send a message to whoever follows the run. `level`: INFO, WARN or ERROR."""
        self._alerts.put((title, text, level))
        self._begun.set()

    def close(self) -> str | None:
        """Write the rest. Returns the folder to pass to `wandb sync`, if there is one."""
        self._ended.set()
        self._begun.set()
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            logger.warning("W&B did not end within %.0f s; metrics.jsonl has everything", PATIENCE)
        if self._wandb is None or self._mode == "online":
            return None
        return str(Path(self._wandb.dir).parent)

    # What follows runs in the thread.

    def _work(self) -> None:
        self._begun.wait()
        try:
            earlier = list((self._run.root / "wandb").glob("offline-run-*"))
            self._wandb = self._start()
            self._follow()
            if self._mode == "offline":
                for folder in earlier:
                    shutil.rmtree(folder, ignore_errors=True)
            while not self._ended.wait(POLL):
                self._look_after()
                self._follow()
            self._follow()
            self._send_held()
            self._look_after()
            self._wandb.finish()
        except Exception as error:
            self.trouble = (
                f"{OFF} ({type(error).__name__}: {error}); training and metrics.jsonl continue, and the run's next "
                "start sends what W&B lacks"
            )
            logger.warning("%s", self.trouble)

    def _look_after(self) -> None:
        """ChildProcessError if the W&B process of this start has died: calls of W&B's library would then wait, or
        lose their data."""
        for process in self._processes:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                raise ChildProcessError(f"its process {process.pid} died")

    def _start(self) -> Any:
        import wandb  # slow to import; runs with monitor.wandb=disabled do without

        os.environ.setdefault("WANDB_SILENT", "true")
        # A start of its own process of W&B, also under a sweep or a notebook that has one: there a run that was killed
        # would still be open, and its resume refused.
        os.environ.pop("WANDB_SERVICE", None)
        sys.argv[1:] = without_secrets(sys.argv[1:])  # W&B records the command; Hydra has read it
        # An earlier start in this process may have lost the one that it had: the library would go on with that one.
        with contextlib.suppress(Exception, SystemExit):
            wandb.teardown()
        others = set(psutil.Process().children())  # among them what has been one of W&B and is dead, ours or adopted
        name, online = self._run.root.name, self._mode == "online"
        (self._run.root / "wandb").mkdir(exist_ok=True)
        started = wandb.init(
            project=self._project, id=name, name=name, dir=str(self._run.root), config=self._config,
            mode="online" if online else "offline", resume="allow" if online else None,
            settings=wandb.Settings(console="off"),  # the run's own logs hold what it says
        )  # fmt: skip
        self._processes = [one for one in psutil.Process().children() if one not in others and _of_wandb(one)]
        self._first = started.step if online else 0
        code = self._run.root / "code"
        if code.is_dir():
            started.log_code(str(code), name=f"code-{name}")
        return started

    def _follow(self) -> None:
        """Send what was added to the files since the last time, one slice after another."""
        while True:
            begin = time.monotonic()
            with open(self._run.metrics, "rb") as file:
                file.seek(self._offset)
                new = file.read(SLICE)
            self._offset += len(new)
            *lines, self._rest = (self._rest + new).split(b"\n")
            self._send(lines)
            if len(new) < SLICE:
                return
            self._ended.wait((time.monotonic() - begin) * (1 / SHARE - 1))
            self._look_after()

    def _send(self, lines: list[bytes]) -> None:
        """Lines of metrics.jsonl, the clips of their steps, and alerts."""
        waiting = [one for one in read_samples(self._run.root)[-MOST_SAMPLES:] if one.file not in self._attached]
        step = None
        for line in lines:
            try:
                record: dict[str, Any] = json.loads(line)
            except ValueError:
                continue  # cut off by the death of an earlier start
            step = record.pop("step")
            while waiting and waiting[0].step <= step:
                self._attach(waiting.pop(0), step)
            values = {name: value for name, value in record.items() if value is not None}
            if self._held is not None and self._held["step"] != step:
                self._send_held(merge=False)
            if "train/loss" not in record and self._mode == "online":
                self._held = {"step": step, "values": values}
            elif step >= self._first:
                if self._held is not None:
                    values, self._held = self._held["values"] | values, None
                self._wandb.log(values, step=step)
                self._sent = step
        for sample in waiting:
            if step is not None:
                self._attach(sample, step)
        while not self._alerts.empty():
            title, text, level = self._alerts.get()
            self._wandb.alert(title=title, text=text, level=level)

    def _send_held(self, merge: bool = True) -> None:
        """Send a validation that no step of its number followed. At the end it is merged into the step before: a row of
        its own would close that number on the server, and the step itself be refused if the run goes on later."""
        if self._held is None:
            return
        step, values, self._held = self._held["step"], self._held["values"], None
        if merge:
            step -= 1
        if step >= self._first and (not merge or step == self._sent):
            self._wandb.log(values, step=step)

    def _attach(self, sample: Any, step: int) -> None:
        import wandb

        self._attached.add(sample.file)
        path = clip_file(self._run.root, sample.file)
        if step < self._first or path is None:
            return
        caption = f"{sample.kind}, seed {sample.seed}, of step {sample.step}: {sample.prompt}"
        media = {f"samples/{path.stem}": wandb.Video(str(path), caption=caption, format="mp4")}
        measures = {f"samples/{name}/{path.stem}": value for name, value in sample.measures.items()}
        self._wandb.log(media | measures, step=step)


def _of_wandb(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return "wandb" in process.name()
    return False
