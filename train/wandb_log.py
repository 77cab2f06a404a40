"""Weights & Biases as a mirror of the run directory: a thread that follows metrics.jsonl and the record of samples.

metrics.jsonl is the truth, and is cut to the checkpoint when a run resumes. Offline, each start therefore writes a new
folder from the whole file, and removes those of earlier starts: the newest folder holds the whole run, each step once,
whatever the starts before lost or did twice. Online, the server has the steps up to the stop; those that are done again
are not sent again. Training neither waits for W&B nor ends with it.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import shutil
import threading
from pathlib import Path
from typing import Any

from train.run_dir import RunDir
from train.samples import folder_of, read_samples

POLL = 1.0  # seconds between looks at the file
PATIENCE = 60.0  # seconds that the end of a run waits for what is left to be written
MOST_SAMPLES = 200  # clips that are attached; of more, the newest

logger = logging.getLogger(__name__)


class WandbLog:
    """One start of a run in W&B. `facts`: what a reader wants beside the config, as the table of the layout."""

    def __init__(
        self, run: RunDir, mode: str, project: str, resolved: dict[str, Any], facts: dict[str, Any] | None = None
    ) -> None:
        self._run, self._mode, self._project = run, mode, project
        self._config = {**resolved, **(facts or {})}
        self._alerts: queue.SimpleQueue[tuple[str, str, str]] = queue.SimpleQueue()
        self._offset, self._rest = 0, b""
        self._wandb: Any = None
        self._first = 0  # the first step that the server does not have
        self._attached: set[str] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def alert(self, title: str, text: str, level: str = "WARN") -> None:
        """A message to whoever follows the run. `level`: INFO, WARN or ERROR."""
        self._alerts.put((title, text, level))

    def close(self) -> str | None:
        """Write what is left. Returns the folder to give to `wandb sync`, where there is one."""
        self._ended.set()
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            logger.warning("W&B did not end within %.0f s; metrics.jsonl has everything", PATIENCE)
        if self._wandb is None or self._mode == "online":
            return None
        return str(Path(self._wandb.dir).parent)

    # What follows runs in the thread.

    def _work(self) -> None:
        try:
            earlier = list((self._run.root / "wandb").glob("offline-run-*"))
            self._wandb = self._start()
            self._follow()
            if self._mode == "offline":
                for folder in earlier:
                    shutil.rmtree(folder, ignore_errors=True)
            while not self._ended.wait(POLL):
                self._follow()
            self._follow()
            self._wandb.finish()
        except Exception as error:
            logger.warning("W&B is off from here on (%s: %s); metrics.jsonl goes on", type(error).__name__, error)

    def _start(self) -> Any:
        import wandb  # slow to import; runs with monitor.wandb=disabled do without

        os.environ.setdefault("WANDB_SILENT", "true")
        # A start of its own process of W&B, also under a sweep or a notebook that has one: there a run that was killed
        # would still be open, and its resume refused.
        os.environ.pop("WANDB_SERVICE", None)
        name, online = self._run.root.name, self._mode == "online"
        (self._run.root / "wandb").mkdir(exist_ok=True)
        started = wandb.init(
            project=self._project, id=name, name=name, dir=str(self._run.root), config=self._config,
            mode="online" if online else "offline", resume="allow" if online else None,
            settings=wandb.Settings(console="off"),  # the run's own logs hold what it says
        )  # fmt: skip
        self._first = started.step if online else 0
        code = self._run.root / "code"
        if code.is_dir():
            started.log_code(str(code), name=f"code-{name}")
        return started

    def _follow(self) -> None:
        """Send what was added to the files since the last time."""
        with open(self._run.metrics, "rb") as file:
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
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
            if step >= self._first:
                self._wandb.log({name: value for name, value in record.items() if value is not None}, step=step)
        for sample in waiting:
            if step is not None:
                self._attach(sample, step)
        while not self._alerts.empty():
            title, text, level = self._alerts.get()
            self._wandb.alert(title=title, text=text, level=level)

    def _attach(self, sample: Any, step: int) -> None:
        import wandb

        self._attached.add(sample.file)
        path = folder_of(self._run.root) / sample.file
        if step < self._first or not path.is_file():
            return
        caption = f"{sample.kind}, seed {sample.seed}, of step {sample.step}: {sample.prompt}"
        media = {f"samples/{path.stem}": wandb.Video(str(path), caption=caption, format="mp4")}
        measures = {f"samples/{name}/{path.stem}": value for name, value in sample.measures.items()}
        self._wandb.log(media | measures, step=step)
