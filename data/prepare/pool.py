"""Runs files through the pipeline in many processes, in a fixed order.

A file that kills its process, or does not end, is tried once more in a fresh process; then that is its verdict.
"""

import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any

from data.errors import DataError
from data.prepare.pipeline import Pipeline, PipelineConfig
from data.prepare.spool import FileResult, WindowResult, read_spool
from data.prepare.worker import UNKNOWN, Alive, Ready, Worker, WorkerFailure
from data.sources import SourceFile

TIMEOUT = 600.0  # s
TRIES = 2  # a file that ended its process gets one more, a fresh one
STARTS = 3  # failed starts of workers in a row after which the work ends
AHEAD = 16  # files a worker that may be done before their turn comes; their results wait on the disk
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
WAIT = 1.0  # s between two looks at the deadlines


@dataclass
class Listener:
    """Told how the work goes: `file` when one is done, `window` with (name, windows done, of how many) within one."""

    file: Callable[[], None] = lambda: None
    window: Callable[[str, int, int], None] = lambda name, done, windows: None


@dataclass
class _Job:
    """A file on its way. tries: processes that it was given to and that ended; alone: no other file beside it."""

    source: SourceFile
    folder: Path
    number: int
    tries: int = 0
    alone: bool = False
    result: FileResult | None = None

    @property
    def spool(self) -> Path:
        return self.folder / f"{self.number}-{self.tries}"  # a try's own: what an orphan still writes harms nobody

    @property
    def allowance(self) -> float:
        """Seconds for one step beyond the timeout: big files take longer to open and to cut."""
        return self.source.size / 1e6


class Pool:
    """`workers` processes that stay for many units. A context manager; leaving it ends them all.

    timeout: seconds that one step of a file may take (to open it, to cut it, one window), and one more for each
    megabyte of the file. make: builds a worker's pipeline; a class or function of a module, as it is pickled.
    """

    def __init__(
        self,
        config: PipelineConfig,
        workers: int,
        timeout: float = TIMEOUT,
        make: Callable[[PipelineConfig], Pipeline] = Pipeline,
    ):
        self.config, self.count, self.timeout, self.make = config, workers, timeout, make
        self._workers: list[Worker] = []
        self._failed_starts = self._started = 0

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    def run(
        self, sources: Iterable[SourceFile], folder: Path, listener: Listener
    ) -> Iterator[tuple[SourceFile, FileResult, Iterator[WindowResult]]]:
        """Each source with what it gave, in the order of `sources`; its windows must be read before the next one.

        folder: for results that wait, deleted file by file. DataError when it can't be written, or no worker started.
        """
        work = _Work(listener)
        waiting = enumerate(sources)
        try:
            while True:
                while len(work.jobs) < AHEAD * self.count and (following := next(waiting, None)) is not None:
                    work.add(_Job(following[1], folder, following[0]))
                if not work.jobs:
                    return
                job = work.jobs[0]
                self._serve(work, 0 if job.result else WAIT)
                if job.result is not None:
                    yield job.source, job.result, self._windows(job, work)
                    job.spool.unlink(missing_ok=True)
                    work.jobs.popleft()
        finally:
            for worker in [one for one in self._workers if one.job is not None]:  # its file is wanted no longer
                self._end(worker)

    def _windows(self, job: _Job, work: "_Work") -> Iterator[WindowResult]:
        if job.result is None or job.result.rejected:
            return
        for window in read_spool(job.spool):
            yield window
            self._serve(work, 0)  # the others go on while a long film is stored

    def _serve(self, work: "_Work", wait: float) -> None:
        """Hand out what can be, take what has come, see who died or is late."""
        self._hand_out(work.todo)
        worker_of: dict[Any, Worker] = {worker.connection: worker for worker in self._workers}
        worker_of |= {worker.process.sentinel: worker for worker in self._workers}
        found = {id(worker_of[handle]): worker_of[handle] for handle in connection.wait(list(worker_of), wait)}
        for worker in found.values():
            messages = worker.receive()
            for message in messages:
                self._heard(worker, message, work)
            if not messages:
                self._died(worker, work)
        now = time.monotonic()
        for worker in [one for one in self._workers if now > one.deadline and (one.job is not None or not one.ready)]:
            self._late(worker, work)

    def _hand_out(self, todo: deque[_Job]) -> None:
        while todo:
            job, again = todo[0], todo[0].tries > 0
            busy = [worker for worker in self._workers if worker.job is not None]
            if any(worker.job.alone for worker in busy) or (job.alone and busy):
                return
            idle = [worker for worker in self._workers if worker.ready and worker.job is None]
            free = next((worker for worker in idle if worker.fresh or not again), None)
            if free is None:
                if again and idle and len(self._workers) == self.count:
                    self._end(idle[0])  # it has seen other files
                self._staff(1 if again else len(todo))
                return
            todo.popleft()
            free.give(job, job.source, job.spool)
            free.deadline = time.monotonic() + self.timeout + job.allowance

    def _staff(self, wanted: int) -> None:
        """Let so many workers be on their way, within their number."""
        starting = sum(not worker.ready for worker in self._workers)
        for _ in range(min(wanted - starting, self.count - len(self._workers))):
            try:
                config = self.config
                if config.servers:
                    config = replace(config, server=config.servers[self._started % len(config.servers)])
                self._workers.append(Worker(config, self.make))
                self._started += 1
            except (OSError, EOFError) as error:  # no more processes or files, or the fork server died just now
                self._failed(f"{type(error).__name__}: {error}")

    def _failed(self, why: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= STARTS:
            raise DataError(f"no worker process can be started ({why}); use fewer (workers=1) or free memory")

    def _end(self, worker: Worker) -> int:
        self._workers.remove(worker)
        return worker.end()

    def _heard(self, worker: Worker, message: Ready | Alive | WorkerFailure | FileResult, work: "_Work") -> None:
        job: _Job = worker.job
        if isinstance(message, WorkerFailure):
            raise DataError(message.reason)
        if isinstance(message, Ready):
            worker.ready, self._failed_starts = True, 0
        elif isinstance(message, Alive):
            worker.deadline = time.monotonic() + self.timeout + job.allowance
            work.listener.window(job.source.name, message.done, message.windows)
        else:
            worker.job = None
            work.done(job, message)

    def _died(self, worker: Worker, work: "_Work") -> None:
        status = self._end(worker)
        if worker.job is not None:
            # when memory ran out it may have been another file's fault: the second try has the machine to itself
            alone = -status not in CRASHES
            work.again(worker.job, f"decoding it kills the process ({_status(status)})", alone)
        elif not worker.ready:
            self._failed(f"it ended with {_status(status)}")

    def _late(self, worker: Worker, work: "_Work") -> None:
        self._end(worker)
        if worker.job is not None:
            limit = self.timeout + worker.job.allowance
            work.again(worker.job, f"it does not finish: one step took more than {limit:.0f} s (timeout)", False)
        else:
            self._failed("it took too long")


class _Work:
    """The files of one run. jobs: all that were not yielded yet, in order; todo: those of them that no worker has."""

    def __init__(self, listener: Listener):
        self.listener = listener
        self.jobs: deque[_Job] = deque()
        self.todo: deque[_Job] = deque()

    def add(self, job: _Job) -> None:
        self.jobs.append(job)
        if job.source.reason:  # it was refused before it was opened
            self.done(job, FileResult(job.source.reason))
        else:
            self.todo.append(job)

    def done(self, job: _Job, result: FileResult) -> None:
        job.result = result
        self.listener.file()

    def again(self, job: _Job, why: str, alone: bool) -> None:
        """After a process that did not survive it: one more try, then `why` is the verdict."""
        job.spool.unlink(missing_ok=True)
        job.tries, job.alone = job.tries + 1, alone
        if job.tries < TRIES:
            self.todo.appendleft(job)
        else:
            self.done(job, FileResult(why))


def _status(status: int) -> str:
    if status == UNKNOWN:
        return "for an unknown reason"
    if status >= 0:
        return f"exit status {status}"
    memory = ", perhaps out of memory" if status == -signal.SIGKILL else ""
    return f"signal {-status}, {signal.strsignal(-status)}{memory}"
