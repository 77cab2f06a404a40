"""Runs the processes of one training run on this machine, and passes stop requests on to them.

A process of the run's own code starts the ranks of an attempt, watches them, and ends all of them when one fails
(launch/local/ranks.py). Whether they are then restarted is decided here, as on a cluster: see launch/attempts.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil
import torch

from core.child import environment_kept
from core.errors import EXIT_FAILED, EXIT_OK, EXIT_RETRY, NO_ROOM
from core.ranges import bounded
from core.run_dir import RunDir
from core.terminal import clock
from launch.attempts import CRASHED, STOPPED, Attempts, Limits, how_it_ended
from launch.cluster import ALLOCATOR, ClusterConfig
from launch.local.ranks import KILL, Ended, early
from launch.room import Patience, obstacle_to_saving
from train.faults.ending import end_children
from train.faults.stop import STOP_SIGNALS, deadline_ahead

ALLOCATOR_KEYS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # its older name, which torch prefers, and its newer
ORPHANS = 3.0  # seconds given to processes that an attempt's workers left behind
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)
SECOND_PRESS = 2.0  # seconds: a Ctrl-C that comes later than that after the first request means "now"


@dataclass
class LocalConfig(ClusterConfig):
    """Processes on this machine (conf/cluster/local.yaml).

    processes: number of processes; 0: one per GPU, or one without GPUs
    restarts: how often all of them are restarted after one has died or lost another; not after an error that would
        recur
    max_failed_restarts: consecutive attempts without a new step after which there are no more restarts
    """

    processes: int = bounded(0, "[0, 4096]")
    restarts: int = bounded(0, "[0, inf)")
    max_failed_restarts: int = bounded(3, "[1, inf)")

    @property
    def world(self) -> int:
        """Processes that will run."""
        return self.processes or max(1, torch.cuda.device_count())

    @property
    def on_gpus(self) -> bool:
        """Whether each of them will have a GPU."""
        return torch.cuda.is_available()


@dataclass(frozen=True)
class Ending:
    """How the workers ended. `failure`: that of the first worker that failed, as text; None if there is none.

    `early`: they stopped on request before there was anything to save; `asked`: they were asked to stop.
    """

    failure: str | None
    early: bool
    asked: bool


@environment_kept()
def run_local(config: LocalConfig, run: RunDir, code: Path, overrides: Sequence[str]) -> Ending:
    """Start the workers of a run with these overrides of conf/train.yaml and the code in that folder, and wait until
    all have ended; restart them as configured.

    SIGTERM, SIGINT, SIGHUP and SIGUSR2 reach the workers as SIGTERM: they save a checkpoint and end, without a time
    limit. A second Ctrl-C kills them. Call in the main thread, holding the run's launch.lock. Meanwhile the variables
    that workers inherit are set in this process, and what workers leave behind becomes its child. Afterwards it is as
    it was before, with the children that it had.
    """
    _set_environment(config.world, code)
    with _orphans_adopted() as others, _StopSignals() as stop:
        return _run_attempts(config, run, overrides, stop, others)


def _run_attempts(
    config: LocalConfig, run: RunDir, overrides: Sequence[str], stop: _StopSignals, others: list[psutil.Process]
) -> Ending:
    """One attempt after another. `others`: children of this process that are not the run's."""
    attempts, job, patience = Attempts(run), f"local-{os.getpid()}", Patience(config)
    attempts.submitted()
    number = counted = 0
    while True:
        attempts.begin(job, number, socket.gethostname())
        os.environ["MOVA_ATTEMPT"] = str(number)
        ending, status = _run_once(config, run, overrides, stop, others)
        ended = STOPPED if ending.early else how_it_ended(run, status)
        attempts.end(job, number, ended, status)
        if ended not in (CRASHED, NO_ROOM) or stop.asked or (ended == CRASHED and config.restarts == 0):
            return ending
        number += 1
        if ended == CRASHED:
            objection = attempts.objection(Limits(config.restarts, config.max_failed_restarts))
            counted += 1
            what = f"restart {counted} of at most {config.restarts}"
        else:
            objection = _wait_for_room(run, attempts, patience, stop)
            what = "the folder is writable again"
        if objection is not None:
            return Ending(f"{ending.failure}; given up: {objection}", ending.early, ending.asked)
        if stop.asked:
            return Ending(ending.failure, early=True, asked=True)
        print(
            f"{ending.failure}: all workers restart from step {attempts.committed_step()} ({what})",
            file=sys.stderr, flush=True,
        )  # fmt: skip


def _wait_for_room(run: RunDir, attempts: Attempts, patience: Patience, stop: _StopSignals) -> str | None:
    """Return once the run's folder can be written to, or a stop was requested; otherwise tell why the run is given
    up."""
    words: str | None = "its last attempt ended because nothing could be written"
    while words is not None and not stop.asked:
        now = time.time()
        pause = patience.pause(attempts.committed_step(), now)
        if pause is None:
            return f"not writable for {clock(now - patience.since)} (cluster.disk_wait_hours): {words}"
        words = obstacle_to_saving(run) or words
        run.write_status("waiting", error=words, step=attempts.committed_step())
        print(f"cannot write: {words}; next check in {clock(pause)}, free space meanwhile", file=sys.stderr, flush=True)
        stop.wait(pause, run.stop_file)
        words = obstacle_to_saving(run)
    return None


def _run_once(
    config: LocalConfig, run: RunDir, overrides: Sequence[str], stop: _StopSignals, others: list[psutil.Process]
) -> tuple[Ending, int]:
    """One attempt. Also returns the exit status of all workers together."""
    code, ended = _until_all_ended(config.world, overrides, stop)
    end_children(ORPHANS, others)
    if ended is None:  # it was killed itself, or could start none
        failure, codes = f"the process that starts the ranks {_describe(code)}", {code}
    elif ended.code is None:
        return Ending(None, early=False, asked=stop.asked), EXIT_OK
    else:
        failure, codes = f"rank {ended.rank} {_describe(ended.code)}", set(ended.codes)
    status = EXIT_FAILED if EXIT_FAILED in codes else EXIT_RETRY
    return Ending(failure, stop.asked and early(codes), stop.asked), status


def _until_all_ended(world: int, overrides: Sequence[str], stop: _StopSignals) -> tuple[int, Ended | None]:
    """Start the ranks and wait for their end: the exit code of the process that starts them, and what it told."""
    reader, writer = os.pipe()
    os.environ |= {"MOVA_RANKS": str(world), "MOVA_REPORT": str(writer)}
    command = [sys.executable, "-m", "launch.local.ranks", *overrides]
    # A session of its own: Ctrl-C in a terminal reaches this process only, which passes it on.
    ranks = subprocess.Popen(command, start_new_session=True, pass_fds=(writer,))
    os.close(writer)
    with open(reader, encoding="utf-8") as report:
        with stop.forwarded_to(ranks):
            code = ranks.wait()
        os.set_blocking(reader, False)  # an orphan may hold the other end
        line = report.readline()
    return code, Ended.of_line(line) if line else None


class _StopSignals:
    """Catches this process's stop signals from its first attempt to its last, and passes them on to the workers."""

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._kill = threading.Event()
        self._first: float | None = None

    @property
    def asked(self) -> bool:
        """Whether a stop was requested."""
        return self._first is not None

    def __enter__(self) -> _StopSignals:
        # What is ignored already stays so: nohup ignores SIGHUP, a shell SIGINT for what runs in its background.
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
        elif number == signal.SIGINT and now - self._first > SECOND_PRESS:
            self._kill.set()
        self._requested.set()

    def wait(self, seconds: float, stop_file: Path) -> None:
        """Return after this many seconds, or when a stop is requested, by a signal or by the file."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._requested.wait(min(left, 1.0)):
            if stop_file.exists():
                self._first = time.monotonic()
                return

    @contextlib.contextmanager
    def forwarded_to(self, ranks: subprocess.Popen[bytes]) -> Iterator[None]:
        """While entered, requests reach the process that starts the ranks, which passes them on."""
        ended = threading.Event()
        # A thread, since a handler may run before the process is there, and must not print.
        thread = threading.Thread(target=self._forward, args=(ranks, ended), name="stop-forwarder", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _forward(self, ranks: subprocess.Popen[bytes], ended: threading.Event) -> None:
        while not self._requested.wait(0.1):
            if ended.is_set():
                return
        print("stopping: waiting for the checkpoint (Ctrl-C again ends it without)", file=sys.stderr, flush=True)
        ranks.send_signal(signal.SIGTERM)
        while not ended.is_set():
            if self._kill.wait(0.1):
                ranks.send_signal(KILL)
                return


@contextlib.contextmanager
def _orphans_adopted() -> Iterator[list[psutil.Process]]:
    """While entered, processes that workers leave behind, even killed ones, become children of this process; on Linux.
    Gives the children that it has already."""
    before = ctypes.c_int(0)
    with contextlib.suppress(AttributeError, OSError):
        control = ctypes.CDLL(None).prctl
        control(SUBREAPER + 1, ctypes.byref(before), 0, 0, 0)  # PR_GET_CHILD_SUBREAPER
        control(SUBREAPER, 1, 0, 0, 0)
    try:
        yield psutil.Process().children()
    finally:
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(SUBREAPER, before.value, 0, 0, 0)


def _set_environment(world: int, code: Path) -> None:
    """Set the variables that workers inherit; the user's own are kept."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(code.absolute()), os.environ.get("PYTHONPATH")]))
    os.environ["PYTHONSAFEPATH"] = "1"  # the folder that we are in, perhaps the checkout, comes before PYTHONPATH else
    if (ends := os.environ.get("MOVA_DEADLINE")) is not None:
        holds = deadline_ahead() is not None
        if not holds:  # of a job that this shell was once in
            del os.environ["MOVA_DEADLINE"]
        print(f"MOVA_DEADLINE={ends} of the environment {'holds' if holds else 'has passed: ignored'}", file=sys.stderr)
    os.environ["MOVA_CODE"] = str(code.absolute())
    os.environ["MOVA_STARTED"] = str(time.time())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // world)))
    for name in (*ALLOCATOR_KEYS, "CUDA_VISIBLE_DEVICES"):
        if value := os.environ.get(name):
            print(f"{name}={value} of the environment holds", file=sys.stderr)
    if not any(os.environ.get(name) for name in ALLOCATOR_KEYS):
        os.environ[ALLOCATOR_KEYS[0]] = ALLOCATOR
    names = {name for _, name in socket.if_nameindex()}
    loopback = next((name for name in ("lo", "lo0") if name in names), None)
    if loopback is not None:  # one machine: its processes meet there, and nothing listens on the network
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    os.environ["LAUNCHER_PID"] = str(os.getpid())


def _describe(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
