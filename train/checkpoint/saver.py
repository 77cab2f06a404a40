"""Writes checkpoints during training: a copy to host memory at a step boundary, then a background thread.

The thread communicates with the other ranks' threads in a process group of its own (gloo), so it never interferes with
training's collectives. It creates a fresh directory, checks the free space, writes the shards with their checksums
(train/checkpoint/dcp_files.py) and the commit marker, then deletes old checkpoints. At most one save is in progress.
All ranks end a save with the same outcome, which training learns at a step boundary (`settle`): a failed save is only
recorded, until too many fail in a row.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import queue
import shutil
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from core.durable import write_atomically
from core.errors import NoRoomError, RunError, lacks_room
from train.checkpoint.checkpoint import (
    MARKER,
    STATE,
    CheckpointConfig,
    TrainState,
    committed,
    damage,
    is_held,
    parameters_of,
    step_of,
    write_marker,
)
from train.checkpoint.dcp_files import METADATA, FilePlan, placements_of, write_file
from train.checkpoint.uncommitted import ASIDE, delete_older, set_aside
from train.checkpoint.uploads import CheckpointEvent, Uploads
from train.engine.optim import local
from train.parallel.collectives import gather
from train.parallel.host_memory import allocate
from train.parallel.mesh import host_mesh


@dataclass
class _Job:
    """One save, from the copy to its outcome."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    content: dict[str, Any]  # of STATE
    kept: bool
    before_commit: Callable[[], None]
    needed: int | None
    bytes: int
    stopped: float  # seconds for which training was paused
    error: BaseException | None = None


@dataclass
class Written:
    """One rank's report on its part of a save."""

    digest: str  # of its FilePlan
    checksums: dict[str, int] = field(default_factory=dict)
    error: Exception | None = None


class HostCopy:
    """A copy of tensors in host memory, in reused buffers: memory for one copy, in one allocation (two if the moments
    of an expert are added later)."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._meshes: dict[DeviceMesh, DeviceMesh] = {}

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same keys in host memory; sharded tensors stay sharded. The copy is complete on return."""
        shards = {key: local(tensor.detach()) for key, tensor in tensors.items()}
        on_device = any(shard.is_cuda for shard in shards.values())
        fresh = {key: shard for key, shard in shards.items() if not self._fits(key, shard)}
        if fresh:
            for key in fresh:
                self._buffers.pop(key, None)
            self._buffers |= allocate(fresh, page_locked=on_device)
        for key, shard in shards.items():
            self._buffers[key].copy_(shard, non_blocking=shard.is_cuda)
        if on_device:
            torch.cuda.current_stream().synchronize()
        return {key: self._placed(tensor, self._buffers[key]) for key, tensor in tensors.items()}

    def _fits(self, key: str, shard: Tensor) -> bool:
        buffer = self._buffers.get(key)
        return buffer is not None and buffer.shape == shard.shape and buffer.dtype == shard.dtype

    def _placed(self, tensor: Tensor, buffer: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return buffer
        mesh = tensor.device_mesh
        if mesh.device_type != "cpu":  # a tensor over a mesh of devices would be moved there
            if mesh not in self._meshes:
                self._meshes[mesh] = host_mesh(mesh)
            mesh = self._meshes[mesh]
        return DTensor.from_local(
            buffer, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )


class Saver:
    """The checkpoints of one run. All ranks make the same calls at the same step boundaries, unless noted."""

    def __init__(self, folder: Path, config: CheckpointConfig, resolved: dict[str, Any], layout: str) -> None:
        self._folder, self._config, self._resolved, self._layout = folder, config, resolved, layout
        self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=config.timeout_minutes))
        self._copy = HostCopy()
        self._metadata = "", b""  # of the last save: digest of its plan, and what METADATA held
        self._job: _Job | None = None
        self._thread: threading.Thread | None = None
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._events: queue.SimpleQueue[CheckpointEvent] = queue.SimpleQueue()
        self._uploads: Uploads | None = None
        if config.upload and dist.get_rank() == 0:
            self._uploads = Uploads(folder, config.upload, self._events.put)
        self._failures = 0
        self._clock = time.monotonic()
        self.last = -1  # step of the newest save begun
        self.seconds = 0.0  # duration of the longest complete save

    def due_by_clock(self) -> bool:
        """Whether the interval in minutes is over; true once for each. One rank asks, and tells the others."""
        if not self._config.minutes or time.monotonic() - self._clock < 60 * self._config.minutes:
            return False
        self._clock = time.monotonic()
        return True

    def begin(
        self, state: TrainState, before_commit: Callable[[], None] = lambda: None, needed: int | None = None
    ) -> None:
        """Copy the state and write it in the background; first waits for the previous save, and raises as `settle`
        does.

        `before_commit` runs on the first rank, in the thread; with an OSError the save has failed. The
        newest one of at most `needed` steps is kept, however old.
        """
        self.settle()
        start = time.perf_counter()
        state.data.absorb(gather(state.data.quarantine))  # each rank sees only its own samples
        tensors = self._copy.take(state.engine.tensors())
        content = {
            "step": state.step,
            "data": state.data.to_json(),
            "optimizer_steps": state.engine.update_counts(),
            "averages": state.engine.average_counts(),
            "parameters": parameters_of(tensors),
            "history": [*state.history],  # as it is now: the file is written later
            "seen": state.seen,
            "balance": copy.deepcopy(state.balance),
            "encoders": state.encoders,
            "origin": state.origin,
            "config": self._resolved,
            "layout": self._layout,
            "torch": torch.__version__,
        }
        every = self._config.permanent_every
        job = _Job(
            self._folder / f"step-{state.step:08d}",
            state.step,
            tensors,
            content,
            kept=every > 0 and state.step % every == 0,
            before_commit=before_commit,
            needed=needed,
            bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
            stopped=time.perf_counter() - start,
        )
        self._job, self.last, self._clock = job, state.step, time.monotonic()
        self._thread = threading.Thread(target=self._write, args=(job,), name="checkpoint writer", daemon=True)
        self._thread.start()

    def busy(self) -> bool:
        """Whether this rank's writer is busy."""
        return self._thread is not None and self._thread.is_alive()

    def failed(self) -> bool:
        """Whether a save failed that has not been settled yet. Any rank may ask at any time."""
        return self._job is not None and self._job.error is not None and not self.busy()

    def settle(self, last: bool = False, waiting: Callable[[], None] = lambda: None) -> None:
        """Wait for the save in progress, if any, and record its outcome; `waiting` is called meanwhile.

        RunError if it failed and was the `last` one of the run, or one failure too many in a row.
        """
        if self._thread is None or self._job is None:
            return
        while self._thread.is_alive():
            self._thread.join(2.0)
            waiting()
        job, self._job, self._thread = self._job, None, None
        if job.error is None:
            self._failures = 0
            return
        if isinstance(job.error, RunError) and not job.error.retry:
            raise job.error
        self._failures += 1
        reason = _reason(job.error)
        if last or self._failures > self._config.max_failures:
            count = f" ({self._failures} failed in a row)" if self._failures > 1 else ""
            message = f"checkpoint {job.path} could not be written{count}: {reason}"
            raise (NoRoomError(message) if lacks_room(job.error) else RunError(message, retry=True)) from job.error
        text = (
            f"WARNING: checkpoint {job.path} could not be written: {reason}. Training continues; "
            f"{self._failures} of at most {self._config.max_failures} failures in a row"
        )
        self._events.put(CheckpointEvent("checkpoint failed", job.step, text, {"error": reason}))

    def finish(self, waiting: Callable[[], None] = lambda: None) -> None:
        """Settle the last save, and give uploads `upload_seconds` more. RunError when the save failed."""
        try:
            self.settle(last=True, waiting=waiting)
        finally:
            if self._uploads is not None:
                self._uploads.close(self._config.upload_seconds)

    def events(self) -> list[CheckpointEvent]:
        """Events since the last call. Any rank may ask at any time (the first one has all)."""
        events = []
        while not self._events.empty():
            events.append(self._events.get())
        return events

    # What follows runs in the thread.

    def _write(self, job: _Job) -> None:
        start = time.perf_counter()
        first, prepared = dist.get_rank() == 0, False
        try:
            if self._device is not None:  # a new thread stands on the first one of the node
                torch.cuda.set_device(self._device)
            self._agree(lambda: _prepare(job.path, job.bytes))
            prepared = True  # the folder is of this save
            plan, written = self._write_shards(job)
            found: list[Any] = [None] * dist.get_world_size() if first else []
            dist.gather_object(written, found if first else None, dst=0, group=self._group)
            self._agree(lambda: self._complete(job, plan, found))
        except Exception as error:
            job.error = error
            if first and prepared:
                shutil.rmtree(job.path, ignore_errors=True)  # what is there may be what fills the disk
            return
        seconds = time.perf_counter() - start
        self.seconds = max(self.seconds, seconds)
        if first:
            details = {"seconds": round(seconds, 3), "stopped": round(job.stopped, 3), "bytes": job.bytes}
            size = f"{job.bytes / 1e6:,.0f} MB in {seconds:.1f} s; training paused {job.stopped:.2f} s"
            self._events.put(CheckpointEvent("checkpoint", job.step, f"checkpoint {job.path} ({size})", details))
            if self._uploads is not None:
                self._uploads.add(job.path)
            try:
                waiting = self._uploads.waiting() if self._uploads is not None else set()
                _prune(self._folder, self._config.keep, waiting, job.needed)
            except OSError as error:
                text = f"WARNING: old checkpoints could not be deleted: {_reason(error)}"
                self._events.put(CheckpointEvent("old checkpoints stay", job.step, text, {"error": _reason(error)}))

    def _write_shards(self, job: _Job) -> tuple[FilePlan, Written]:
        """Write this rank's file. An error is passed to the first rank, since the others wait for it."""
        plan = FilePlan({})
        try:
            plan = FilePlan(placements_of(job.tensors))
            return plan, Written(plan.digest(), write_file(plan, job.tensors, job.path, dist.get_rank()))
        except Exception as error:
            kept = error if isinstance(error, OSError | RunError) else RuntimeError(_reason(error))
            return plan, Written(plan.digest(), error=kept)

    def _complete(self, job: _Job, plan: FilePlan, found: list[Written]) -> None:
        """First rank: commit what all ranks wrote. Raises the first error among theirs."""
        for rank, written in enumerate(found):
            if written.error is not None:
                raise _of_rank(rank, written.error)
        for rank, written in enumerate(found):
            if written.digest != found[0].digest:
                raise RuntimeError(f"rank {rank} does not hold the tensors, or the parts of them, that rank 0 expects")
        if self._metadata[0] != found[0].digest:
            self._metadata = found[0].digest, plan.metadata()
        content = self._metadata[1]
        with open(job.path / METADATA, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        sums = {name: value for written in found for name, value in written.checksums.items()}
        _commit(job, {**sums, METADATA: zlib.crc32(content)})

    def _agree(self, action: Callable[[], object]) -> None:
        """Run an action on the first rank; its error is raised on all of them."""
        error: list[Exception | None] = [None]
        if dist.get_rank() == 0:
            try:
                action()
            except Exception as caught:
                error[0] = caught if isinstance(caught, RunError | OSError) else RuntimeError(_reason(caught))
        dist.broadcast_object_list(error, src=0, group=self._group)
        if error[0] is not None:
            raise error[0]


def _reason(error: BaseException) -> str:
    """One line about why a save failed, from whichever rank knows."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _of_rank(rank: int, error: Exception) -> Exception:
    """The error of a rank, with the rank's name."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, f"rank {rank}: {error.strerror}", error.filename)
    text = f"rank {rank}: {_reason(error)}"
    return RunError(text, error.retry) if isinstance(error, RunError) else RuntimeError(text)


def _prepare(path: Path, size: int) -> None:
    """Create a fresh directory, on a disk with `size` bytes free."""
    if damage(path) is None:
        raise RunError(f"checkpoint {path} already exists; a run never overwrites one")
    if path.exists():  # left by a save that failed
        set_aside(path.parent)
    free = shutil.disk_usage(path.parent).free
    if free < size:
        words = f"it needs {size / 1e9:.3f} GB, {free / 1e9:.3f} GB are free; free disk space or lower checkpoint.keep"
        if aside := [entry.name for entry in path.parent.glob(f"{ASIDE}*")]:
            words += f" (half-written ones may be deleted: {', '.join(aside)})"
        raise OSError(errno.ENOSPC, words, str(path.parent))
    path.mkdir(parents=True)


def _commit(job: _Job, sums: dict[str, int]) -> None:
    """`sums`: checksums of the files, by name."""
    path = job.path
    job.before_commit()
    entries = {name: {"bytes": (path / name).stat().st_size, "crc32": sums[name]} for name in sorted(sums)}
    # The checksums are recorded here too: a folder that lost its marker can be proved complete.
    write_atomically(path / STATE, json.dumps({**job.content, "kept": job.kept, "files": entries}))
    write_marker(path)
    for folder in (path, path.parent):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _prune(folder: Path, keep: int, waiting: set[Path], needed: int | None) -> None:
    """Delete all committed ones but the newest `keep`, permanent ones, those still `waiting`, those being read, and the
    newest of at most `needed` steps; and whatever was set aside before the newest."""
    delete_older(folder)
    paths = committed(folder)
    if needed is not None:
        waiting = waiting | set([path for path in paths if step_of(path) <= needed][-1:])
    for path in paths[:-keep]:
        if path in waiting or _is_kept(path) or is_held(path):
            continue
        (path / MARKER).unlink()  # first, so that a half-deleted one never counts as complete
        shutil.rmtree(path, ignore_errors=True)


def _is_kept(path: Path) -> bool:
    """Whether it stays for good; so does one whose marker is damaged, for the user to look at."""
    try:
        return bool(json.loads((path / MARKER).read_text()).get("kept"))
    except (ValueError, AttributeError):
        return True
