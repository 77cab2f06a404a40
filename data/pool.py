"""Files through the pipeline in many processes, in one order."""

import contextlib
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from types import TracebackType

import torch

from data.errors import DataError
from data.pipeline import Pipeline, PipelineConfig, Result
from data.source import Source

_pipeline: Pipeline | None = None  # of this worker process


class Pool:
    """`workers` processes that stay for many units. A context manager. With one worker everything runs right here."""

    def __init__(self, config: PipelineConfig, workers: int):
        self.config, self.workers = config, workers
        self._pool: ProcessPoolExecutor | None = None
        self._local: Pipeline | None = None

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, sources: list[Source]) -> Iterator[tuple[Source, Result]]:
        """Each source with what it gave, in the order of `sources`. DataError when a worker dies."""
        if self.workers == 1 or len(sources) == 1:
            with _one_thread():
                self._local = self._local or Pipeline(self.config)
                for source in sources:
                    yield source, self._local.run(source)
            return
        pool = self._start()
        waiting: deque[tuple[Source, Future[Result]]] = deque()
        remaining = iter(sources)  # few are in flight: results are big
        try:
            while True:
                while len(waiting) < 2 * self.workers and (following := next(remaining, None)) is not None:
                    waiting.append((following, pool.submit(_work, following)))
                if not waiting:
                    return
                source, job = waiting.popleft()
                try:
                    result = job.result()
                except BrokenProcessPool as error:
                    names = ", ".join(str(entry.path) for entry, _ in [(source, job), *waiting])
                    raise DataError(
                        f"a worker died (out of memory, or a decoder crashed) at one of: {names}. Use fewer workers "
                        "(workers=1), or move the file away; then run the same command again"
                    ) from error
                yield source, result
        finally:
            for _, job in waiting:
                job.cancel()

    def _start(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # torch's threads don't survive a fork, but importing it for every worker takes long: one clean process
            # imports it and is forked from
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["data.pool"])
            self._pool = ProcessPoolExecutor(self.workers, context, initializer=_start_worker, initargs=(self.config,))
        return self._pool


def _work(source: Source) -> Result:
    assert _pipeline is not None
    return _pipeline.run(source)


def _start_worker(config: PipelineConfig) -> None:
    """One thread for sums (other numbers of threads give other bits), and no life after the parent's."""
    global _pipeline
    torch.set_num_threads(1)
    _pipeline = Pipeline(config)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """As in the workers: sums in another order would give other bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])  # ready when the process is gone, however it went: its workers would wait forever
    os._exit(1)
