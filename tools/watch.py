"""Generate clips from the checkpoints of a run while it trains, in a separate process, so that training does not wait.

    mova watch runs/first                                   # every new checkpoint; ends with the run
    mova watch runs/first every=5000 kinds=[image,sound] clips=4 sampler.steps=30
    torchrun --nproc-per-node 8 -m tools.watch run=runs/big parallel.ulysses=8 parallel.compute_dtype=bfloat16
    mova launch cluster=slurm ... watch.enabled=true                      # submitted beside the training job

The model's inputs come from the run's held-out set, the same for each checkpoint, so that they can be compared: a
caption ("text"), a caption and the first frame ("image"), the picture ("picture": its sound is generated) or the sound
("sound": its picture is generated). Clips with both are used; if the set has none, those without sound (or picture),
and the generated ones lack it too. The clips are in runs/<id>/samples/ and on the report page (docs/watching.md).
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from core.compose import Schema
from core.errors import NoRoomError, RunError
from core.locks import lock_now
from core.program import Call, Program
from core.run_dir import RunDir
from core.terminal import print_without_fail
from data.codec import Codecs, check_codec
from data.errors import DataError
from launch.attempts import is_finished
from launch.room import obstacle
from tools.clip_requests import ClipRequest, WatchConfig, geometry_keys, orders_of, write_whole
from tools.measures import Measures
from tools.sample import Clip, SampleConfig, clips_of, codecs_of_run
from train.checkpoint.checkpoint import committed, damage, read_state, step_of
from train.generate import as_trained, load_model
from train.monitor.samples import SampleRecord, add_samples, folder_of, read_samples
from train.parallel.collectives import on_first_rank
from train.parallel.mesh import Layout, make_layout, start_process_group

LOCK = ".watch-lock"
PINNED = ".pinned"  # folder of the checkpoint in use


class StopOnSignal:
    """Whether this process was asked to end (SIGINT, SIGTERM): after the current clip, immediately at a second
    request."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: object) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)


def lock(run: RunDir) -> IO[str]:
    """Keep other watchers of this run out while the file is open. RunError if there is one."""
    folder_of(run.root).mkdir(parents=True, exist_ok=True)
    file = open(folder_of(run.root) / LOCK, "a+")  # noqa: SIM115  the caller holds it
    if not lock_now(file):
        file.close()
        raise RunError(f"run {run.root.name!r} is already being watched; stop the other watcher, or let it continue")
    return file


def next_checkpoint(run: RunDir, done: int, every: int, finished: bool) -> Path | None:
    """The checkpoint to sample after that of step `done`: the oldest that is `every` steps later, at the end the last.
    One that is deleted before its turn is skipped."""
    later = [path for path in committed(run.checkpoints) if step_of(path) > done]
    due = [path for path in later if done < 0 or step_of(path) >= done + every]
    return due[0] if due else (later[-1] if later and finished else None)


def pin(path: Path, run: RunDir) -> Path | None:
    """The checkpoint under another name, by hard links: the run may delete its own meanwhile, no bytes are copied.

    None if it is already gone. On a file system without hard links, the checkpoint itself.
    """
    pinned = folder_of(run.root) / PINNED / path.name
    shutil.rmtree(pinned.parent, ignore_errors=True)
    try:
        for file in [file for file in path.rglob("*") if file.is_file()]:
            target = pinned / file.relative_to(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, target)
    except FileNotFoundError:
        return None
    except OSError:
        return path
    # A folder that was emptied while it was listed gives fewer files, which the marker knows of.
    return pinned if damage(pinned) is None or path.exists() else None


def sample_checkpoint(
    path: Path,
    config: WatchConfig,
    orders: list[ClipRequest],
    measures: Measures,
    layout: Layout,
    run: RunDir,
    codecs: Codecs,
    asked: Callable[[], bool],
) -> None:
    """Generate the missing clips of one checkpoint, until asked to end. All ranks call. RunError: see
    `load_model`."""
    stated = read_state(path).get("encoders") or {}
    for codec in (codecs.video, codecs.audio, codecs.text):
        check_codec(codec, stated, f"checkpoint {path.name}", config.encoder)
    model, trained = load_model(path, config.parallel, layout)
    step, target = step_of(path), folder_of(run.root) / path.name
    sampler = as_trained(config.sampler, trained)
    made = on_first_rank(lambda: {one.file for one in read_samples(run.root)})
    for order in orders:
        file = f"{path.name}/{order.name}.mp4"
        if file in made:
            continue
        if on_first_rank(asked):
            return
        begin = time.monotonic()
        request = SampleConfig(
            checkpoint=str(path), out="", prompt=order.prompt, seed=config.seed, sampler=sampler,
            image=order.given if order.kind == "image" else None,
            picture_of=order.given if order.kind == "picture" else None,
            sound_of=order.given if order.kind == "sound" else None, picture=order.picture, sound=order.sound,
            **geometry_keys(order),
        )  # fmt: skip
        [clip] = clips_of(model, trained, request, layout, codecs)
        sample = SampleRecord(
            step, file, order.kind, order.prompt, config.seed, order.source, asdict(sampler),
            round(time.monotonic() - begin, 2), encoders=codecs.fingerprints,
        )  # fmt: skip

        def keep(sample: SampleRecord = sample, clip: Clip = clip, name: str = order.name) -> None:
            write_whole(target / f"{name}.mp4", clip)
            found = measures(clip.pixels, clip.sound, clip.fps, clip.rate)
            add_samples(run.root, [replace(sample, measures=found)])
            print(f"{target / name}.mp4: step {sample.step:,}, {sample.kind}, {sample.seconds:.1f} s", flush=True)

        on_first_rank(keep)


@dataclass
class _Work:
    """What is known once a watcher can write: the codecs and the clips to generate; `done`: the step of the last
    checkpoint that needs none any more."""

    codecs: Codecs
    orders: list[ClipRequest]
    done: int


class Watcher:
    """Generates clips from the checkpoints of one run; all ranks call each method. Use as a context: it holds the lock.

    `full`: why nothing can be written, None if something can. While it is not None nothing is tried but whether there
    is space again, at a start as well as later.
    """

    def __init__(self, config: WatchConfig, layout: Layout, stop: StopOnSignal) -> None:
        self.config, self.layout, self.stop = config, layout, stop
        self.run, self.measures = RunDir(Path(config.run)), _measures(config)
        self.full: str | None = None
        self._full_since: float | None = None  # the first of the attempts that have failed in a row
        self._work: _Work | None = None
        self._codecs: Codecs | None = None
        self._held: IO[str] | None = None

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        if self._held is not None:
            shutil.rmtree(folder_of(self.run.root) / PINNED, ignore_errors=True)
            self._held.close()

    def turn(self) -> str:
        """Generate the clips of one checkpoint, or wait for the next. Why watching ends, in words, "" if it does not.
        RunError if this is no run, or if another watcher has it; NoRoomError after too long without space."""
        if on_first_rank(lambda: self.stop.asked):
            return "stopped on request"
        if self.full is not None:
            self.full = on_first_rank(lambda: obstacle(self.run))
        if self.full is None and self._work is None:
            self._retried(self._prepare)
        done = self._work.done if self._work is not None else -1
        finished, path, gone = on_first_rank(lambda: _look(self.run, done, self.config))
        if path is not None and self._work is not None and self.full is None:
            work, chosen = self._work, path
            self._retried(lambda: self._sample(work, chosen))
            if self.full is None:
                return ""
        if finished and path is None:
            return "the run has finished, and its last checkpoint is sampled"
        if gone and self.full is None:
            return (
                f"no activity of the run for {self.config.patience:g} minutes (patience); start again once the run "
                "continues"
            )
        if gone and on_first_rank(self._is_impatient):
            raise NoRoomError(
                f"not writable for {self.config.patience:g} minutes (patience): {self.full}; start again once there is "
                "space"
            )
        _wait(self.config.poll, self.stop)
        return ""

    def _is_impatient(self) -> bool:
        return self._full_since is not None and time.monotonic() - self._full_since > 60 * self.config.patience

    def _retried(self, action: Callable[[], None]) -> None:
        """Call an action that succeeds or finds no space, and say so: once, however often it is tried."""
        try:
            action()
        except NoRoomError as error:
            self.full = str(error)
            if self._full_since is None:
                self._full_since = time.monotonic()
                self._say(f"cannot write: {error}; retried when there is space again")
        else:
            if self._full_since is not None:
                self._full_since = None
                self._say(f"{self.run.root}: there is space again")

    def _say(self, words: str) -> None:
        if self.layout.first:
            print(words, file=sys.stderr, flush=True)

    def _prepare(self) -> None:
        def enter() -> dict[str, Any]:
            if not self.run.config.exists():
                raise RunError(f"{self.run.root} is not a run: it has no config.yaml; give runs/ID")
            self._held = self._held or lock(self.run)
            return self.run.read_config()

        settings = on_first_rank(enter)
        codecs = self._codecs = self._codecs or codecs_of_run(settings, self.config.encoder, self.layout.device)
        orders = on_first_rank(lambda: _orders(self.config, self.run, codecs))
        names = {f"{order.name}.mp4" for order in orders}
        self._work = _Work(codecs, orders, on_first_rank(lambda: _done(self.run, names)))

    def _sample(self, work: _Work, path: Path) -> None:
        """One checkpoint; it is done unless there is no space."""
        pinned = on_first_rank(lambda: pin(path, self.run))
        if pinned is not None:
            try:
                sample_checkpoint(
                    pinned, self.config, work.orders, self.measures, self.layout, self.run, work.codecs,
                    lambda: self.stop.asked,
                )  # fmt: skip
            except NoRoomError:
                raise
            except (RunError, DataError, CheckpointException) as error:  # no reason to miss the next ones
                self._say(f"skipped: {error}")
            work.done = step_of(path)


def watch(config: WatchConfig, layout: Layout, stop: StopOnSignal) -> str:
    """Until the run has finished and its last checkpoint is sampled; all ranks call. Returns why it ended, in words."""
    with Watcher(config, layout, stop) as watcher:
        while not (ending := watcher.turn()):
            pass
    return ending


def _measures(config: WatchConfig) -> Measures:
    try:
        return Measures(config.impacts, config.sync_weights)
    except DataError as error:
        raise RunError(f"sync_weights: {error}") from None


def _orders(config: WatchConfig, run: RunDir, codecs: Codecs) -> list[ClipRequest]:
    try:
        return orders_of(config, run, codecs)
    except DataError as error:
        raise RunError(f"held-out set of the run: {error}") from None


def _look(run: RunDir, done: int, config: WatchConfig) -> tuple[bool, Path | None, bool]:
    """(whether the run has finished, the checkpoint to sample now, whether the run has been inactive for too long)."""
    finished = is_finished(run)  # before the folder is looked at: a last checkpoint is never missed
    signs = [path.stat().st_mtime for path in (run.status, run.metrics, run.config) if path.exists()]
    gone = run.holder() is None and time.time() - max(signs, default=0.0) > 60 * config.patience
    return finished, next_checkpoint(run, done, config.every, finished), gone


def _done(run: RunDir, names: set[str]) -> int:
    """Step of the newest checkpoint from which all of these clips were made, -1 where there is none."""
    made: dict[int, set[str]] = {}
    for sample in read_samples(run.root):
        made.setdefault(sample.step, set()).add(Path(sample.file).name)
    return max((step for step, files in made.items() if names <= files), default=-1)


def _wait(seconds: float, stop: StopOnSignal) -> None:
    """All ranks wait equally long; the first one notices a request to end immediately, and the others wait for it."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not stop.asked:
        time.sleep(min(0.2, seconds))


def _begin() -> None:
    print_without_fail("stdout", "stderr")  # the log may lie on the same full disk
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))


def _run(call: Call[WatchConfig]) -> None:
    config = call.config
    stop = StopOnSignal()
    device = start_process_group()
    try:
        layout = make_layout(config.parallel, device)
        ending = watch(config, layout, stop)
        if layout.first:
            print(f"watching {config.run} ends: {ending}")
    finally:
        dist.destroy_process_group()


PROGRAM = Program(
    "watch", __doc__, _run, schema=Schema("watch", WatchConfig, (("encoder", None),)), first="run", before=_begin
)

if __name__ == "__main__":
    PROGRAM.start()
