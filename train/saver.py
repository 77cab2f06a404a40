"""Writes checkpoints while training goes on: a copy to host memory at a step boundary, then a thread of its own.

The thread talks to the other ranks' threads in a process group that serves nothing else (gloo), so it never meets
training's collectives. Its steps: a fresh directory, enough free space, the shards (torch's DCP), checksums, the commit
marker, then old checkpoints go. One save is in flight at most. All ranks end a save with the same outcome, which
training takes over at a step boundary (`settle`): a failed save costs nothing but itself, until too many fail in a row.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import shutil
import subprocess
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from train.checkpoint import (
    MARKER,
    STATE,
    CheckpointConfig,
    TrainState,
    checksum,
    committed,
    damage,
    parameters_of,
    step_of,
)
from train.errors import RunError
from train.guard import gather
from train.optim import local
from train.run_dir import write_atomically

SLOWEST = timedelta(minutes=30)  # that ranks may stand apart within one save: a loaded file system


@dataclass(frozen=True)
class Event:
    """Something about a checkpoint that the user should know. `details`: plain values for the record."""

    kind: str  # "checkpoint", "checkpoint failed", "uploaded", "upload failed", "old checkpoints stay"
    step: int
    text: str
    details: dict[str, Any]


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
    stopped: float  # seconds that training stood still
    error: BaseException | None = None


class HostCopy:
    """A copy of tensors in host memory, in buffers that are used again: memory for one copy, allocated once."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._meshes: dict[DeviceMesh, DeviceMesh] = {}

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same keys over host memory; sharded tensors stay sharded. Complete when it returns."""
        copies, waits = {}, False
        for key, tensor in tensors.items():
            shard = local(tensor.detach())
            buffer = self._buffers.get(key)
            if buffer is None or buffer.shape != shard.shape or buffer.dtype != shard.dtype:
                buffer = torch.empty(shard.shape, dtype=shard.dtype, pin_memory=shard.is_cuda)
                self._buffers[key] = buffer
            buffer.copy_(shard, non_blocking=shard.is_cuda)
            waits = waits or shard.is_cuda
            copies[key] = self._placed(tensor, buffer)
        if waits:
            torch.cuda.current_stream().synchronize()
        return copies

    def _placed(self, tensor: Tensor, buffer: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return buffer
        mesh = tensor.device_mesh
        if mesh.device_type != "cpu":  # a tensor over a mesh of devices would be moved there
            if mesh not in self._meshes:
                self._meshes[mesh] = DeviceMesh(
                    "cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names, _init_backend=False
                )
            mesh = self._meshes[mesh]
        return DTensor.from_local(
            buffer, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )


class Saver:
    """The checkpoints of one run. All ranks make the same calls at the same step boundaries, but where it says so."""

    def __init__(self, folder: Path, config: CheckpointConfig, resolved: dict[str, Any], layout: str) -> None:
        self._folder, self._config, self._resolved, self._layout = folder, config, resolved, layout
        self._group = dist.new_group(backend="gloo", timeout=SLOWEST)
        self._copy = HostCopy()
        self._job: _Job | None = None
        self._thread: threading.Thread | None = None
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._uploads = _Uploads(config.upload, self._events.put) if config.upload and dist.get_rank() == 0 else None
        self._failures = 0
        self._clock = time.monotonic()
        self.last = -1  # step of the newest save begun
        self.seconds = 0.0  # that the longest complete save took
        warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")

    def due_by_clock(self) -> bool:
        """Whether the interval in minutes is over; true once for each. Ask one rank, and tell the others."""
        if not self._config.minutes or time.monotonic() - self._clock < 60 * self._config.minutes:
            return False
        self._clock = time.monotonic()
        return True

    def begin(
        self, state: TrainState, before_commit: Callable[[], None] = lambda: None, needed: int | None = None
    ) -> None:
        """Copy the state and write it in the background; waits for the save before, and raises as `settle` does.

        `before_commit` runs on the first rank, in the thread; with an OSError the save has failed. The
        newest one of at most `needed` steps stays, however old.
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
            "history": state.history,
            "seen": state.seen,
            "config": self._resolved,
            "layout": self._layout,
            "torch": torch.__version__,
        }
        every = self._config.keep_every
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
        """Whether this rank's writer is at work."""
        return self._thread is not None and self._thread.is_alive()

    def failed(self) -> bool:
        """Whether a save failed that training has not heard of. Any rank may ask at any time."""
        return self._job is not None and self._job.error is not None and not self.busy()

    def settle(self, last: bool = False) -> None:
        """Wait for the save in flight, if there is one, and take over its outcome.

        RunError when it failed and was the `last` one of the run, or one too many in a row; else it is recorded.
        """
        if self._thread is None or self._job is None:
            return
        self._thread.join()
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
            raise RunError(f"checkpoint {job.path} could not be written{count}: {reason}", retry=True) from job.error
        text = (
            f"WARNING: checkpoint {job.path} could not be written: {reason}. Training goes on; "
            f"{self._failures} of {self._config.max_failures} failures in a row that are put up with"
        )
        self._events.put(Event("checkpoint failed", job.step, text, {"error": reason}))

    def finish(self) -> None:
        """Settle the last save, and wait for uploads. RunError when the save failed."""
        self.settle(last=True)
        if self._uploads is not None:
            self._uploads.close()

    def events(self) -> list[Event]:
        """What has happened since the last call. Any rank may ask at any time (the first one has all)."""
        events = []
        while not self._events.empty():
            events.append(self._events.get())
        return events

    # What follows runs in the thread.

    def _write(self, job: _Job) -> None:
        start = time.perf_counter()
        first = dist.get_rank() == 0
        try:
            self._agree(lambda: _prepare(job.path, job.bytes))
            dcp.save(
                job.tensors, storage_writer=dcp.FileSystemWriter(job.path, overwrite=False), process_group=self._group
            )
            mine = {file.name: checksum(file) for file in job.path.glob(f"__{dist.get_rank()}_*")}
            found: list[Any] = [None] * dist.get_world_size() if first else []
            dist.gather_object(mine, found if first else None, dst=0, group=self._group)
            sums = {name: value for part in found for name, value in part.items()}
            self._agree(lambda: _commit(job, sums))
        except (Exception, CheckpointException) as error:
            job.error = error
            if first:
                shutil.rmtree(job.path, ignore_errors=True)  # what lies there may be what fills the disk
            return
        seconds = time.perf_counter() - start
        self.seconds = max(self.seconds, seconds)
        if first:
            details = {"seconds": round(seconds, 3), "stopped": round(job.stopped, 3), "bytes": job.bytes}
            size = f"{job.bytes / 1e6:,.0f} MB in {seconds:.1f} s; training stood {job.stopped:.2f} s"
            self._events.put(Event("checkpoint", job.step, f"checkpoint {job.path} ({size})", details))
            if self._uploads is not None:
                self._uploads.add(job.path)
            try:
                waiting = self._uploads.waiting() if self._uploads is not None else set()
                _prune(self._folder, self._config.keep, waiting, job.needed)
            except OSError as error:
                text = f"WARNING: old checkpoints could not be deleted: {_reason(error)}"
                self._events.put(Event("old checkpoints stay", job.step, text, {"error": _reason(error)}))

    def _agree(self, action: Callable[[], object]) -> None:
        """Run an action on the first rank; its error is raised on all of them."""
        error: list[Exception | None] = [None]
        if dist.get_rank() == 0:
            try:
                action()
            except Exception as caught:
                error[0] = caught if isinstance(caught, RunError | OSError) else RuntimeError(repr(caught))
        dist.broadcast_object_list(error, src=0, group=self._group)
        if error[0] is not None:
            raise error[0]


class _Uploads:
    """Runs the user's upload command for each committed checkpoint, one after the other, off the training thread."""

    def __init__(self, command: list[str], tell: Callable[[Event], None]) -> None:
        self._command, self._tell = command, tell
        self._paths: list[Path] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="checkpoint upload", daemon=True)
        self._thread.start()

    def add(self, path: Path) -> None:
        """Upload this one when those before it are done."""
        with self._changed:
            self._paths.append(path)
            self._changed.notify_all()

    def waiting(self) -> set[Path]:
        """Those that must not be deleted yet."""
        with self._changed:
            return set(self._paths)

    def close(self) -> None:
        """Wait until all are done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._paths) or self._closed)
                if not self._paths:
                    return
                path = self._paths[0]
            self._tell(self._upload(path))
            with self._changed:
                self._paths.pop(0)

    def _upload(self, path: Path) -> Event:
        words, step = [word.replace("{path}", str(path)) for word in self._command], step_of(path)
        try:
            done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        except OSError as error:
            problem = f"{words[0]} can't be run ({error.strerror})"
        else:
            if done.returncode == 0:
                return Event("uploaded", step, f"uploaded {path}", {})
            problem = f"exit status {done.returncode}: {done.stderr.strip()[-500:]}"
        text = f"WARNING: upload of {path} failed: {problem}. The checkpoint itself is whole; training goes on"
        return Event("upload failed", step, text, {"error": problem})


def _reason(error: BaseException) -> str:
    """One line of why a save failed, from whichever rank knows it."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_reason(cause)}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _prepare(path: Path, size: int) -> None:
    """A fresh directory with room for `size` bytes."""
    if damage(path) is None:
        raise RunError(f"checkpoint {path} exists already; a run never writes over one")
    shutil.rmtree(path, ignore_errors=True)  # left by a run that died while writing it
    free = shutil.disk_usage(path.parent).free
    if free < size:
        words = f"it takes {size / 1e9:.3f} GB, {free / 1e9:.3f} GB are free; make room or lower checkpoint.keep"
        raise OSError(errno.ENOSPC, words, str(path.parent))
    path.mkdir(parents=True)


def _commit(job: _Job, sums: dict[str, int]) -> None:
    """`sums`: checksums of the files that ranks wrote."""
    path = job.path
    job.before_commit()
    write_atomically(path / STATE, json.dumps(job.content))
    files = sorted(file for file in path.iterdir() if file.is_file())
    for file in files:
        if file.name not in sums:
            sums[file.name] = checksum(file)
    entries = {file.name: {"bytes": file.stat().st_size, "crc32": sums[file.name]} for file in files}
    write_atomically(path / MARKER, json.dumps({"step": job.step, "kept": job.kept, "files": entries}))
    for folder in (path, path.parent):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _prune(folder: Path, keep: int, waiting: set[Path], needed: int | None) -> None:
    """Delete all committed ones but the newest `keep`, those that are kept for good, those still `waiting`, and the
    newest of at most `needed` steps."""
    paths = committed(folder)
    if needed is not None:
        waiting = waiting | set([path for path in paths if step_of(path) <= needed][-1:])
    for path in paths[:-keep]:
        if path in waiting or json.loads((path / MARKER).read_text()).get("kept"):
            continue
        (path / MARKER).unlink()  # first, so that a half-deleted one is never taken for whole
        shutil.rmtree(path, ignore_errors=True)
