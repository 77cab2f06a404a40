"""A process that takes one file at a time through the pipeline, and the parent's side of it.

What a file gives goes through a file on disk (data.prepare.spool); the pipe between the processes carries only the job,
signs of life and the end.
"""

import contextlib
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from core.child import environment_kept
from data.errors import DataError
from data.prepare.pipeline import Pipeline, PipelineConfig
from data.prepare.spool import FileResult, Spool
from data.sources import SourceFile

SIGN = 1.0  # s between two signs of life
START = 600.0  # s that a worker may take to start: it loads the weights of the scores
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
UNKNOWN = 255  # exit status of a worker whose fork server died: what became of it nobody saw


@dataclass
class Ready:
    """The worker has its pipeline."""


@dataclass
class Alive:
    """A step was done: so many of the file's windows, of so many (0: not cut yet)."""

    done: int
    windows: int


@dataclass
class WorkerFailure:
    """The work can't go on, and it is no fault of the file: why."""

    reason: str


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """What starts in here computes with one thread a process. By the environment, which libraries read when they are
    loaded: OpenBLAS's threads don't survive the fork from the server, and a product of matrices would wait for them for
    ever."""
    with environment_kept():
        os.environ.update(dict.fromkeys(THREADS, "1"))
        yield


class Worker:
    """The parent's side of one process. `source` is what it is at, None when it is idle."""

    def __init__(self, config: PipelineConfig, make: Callable[[PipelineConfig], Pipeline]):
        """OSError or EOFError when no process can be started."""
        # torch's threads don't survive a fork, but importing it for every worker takes long: one clean process
        # imports it and is forked from
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["data.prepare.worker"])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_main, args=(theirs, config, make), daemon=True)
        try:
            with _one_thread_each():
                self.process.start()
        except BaseException:
            self.connection.close()
            raise
        finally:
            theirs.close()
        self.ready, self.fresh = False, True
        self.job: Any = None
        self.deadline = time.monotonic() + START

    def give(self, job: Any, source: SourceFile, spool: Path) -> None:
        """Hand over a file. Whether the process still lives is seen at its next message."""
        self.job, self.fresh = job, False
        with contextlib.suppress(OSError):
            self.connection.send((source, spool))

    def receive(self) -> list[Ready | Alive | WorkerFailure | FileResult]:
        """All messages that have come; none from one that was ready to be heard: the process is gone."""
        messages = []
        with contextlib.suppress(EOFError, OSError):
            while self.connection.poll():
                messages.append(self.connection.recv())
        return messages

    def end(self) -> int:
        """Kill the process if it lives; returns its exit status, negative for a signal."""
        pid, status = self.process.pid, self.process.exitcode
        if pid is not None and status in (None, UNKNOWN):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.join(10)  # one that waits for a dead network disk can't be ended before the disk answers
        self.connection.close()
        return UNKNOWN if self.process.exitcode is None else self.process.exitcode


def run_file(pipeline: Pipeline, source: SourceFile, spool: Path, alive: Callable[[int, int], None]) -> FileResult:
    """One file; its windows lie in `spool` then."""
    with Spool(spool) as windows:
        return pipeline.run(source, windows, alive)


def _main(pipe: connection.Connection, config: PipelineConfig, make: Callable[[PipelineConfig], Pipeline]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches all processes; the parent ends its workers
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a decoder's crash is a verdict, not a file of gigabytes
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # when memory runs out a worker goes, not the parent nor the user's other programs
    torch.set_num_threads(1)  # sums in another order would give other bits
    said = -SIGN

    def alive(done: int, windows: int) -> None:
        nonlocal said
        if time.monotonic() - said >= SIGN:
            said = time.monotonic()
            pipe.send(Alive(done, windows))

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent has gone, or wants no more
        try:
            pipeline = make(config)
            pipe.send(Ready())
            while True:
                source, spool = pipe.recv()
                pipe.send(run_file(pipeline, source, spool, alive))
        except DataError as error:  # the disk is full, or a score's weights are no longer there
            pipe.send(WorkerFailure(str(error)))


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])  # ready when the process is gone, however it went: its workers would wait forever
    os._exit(1)
