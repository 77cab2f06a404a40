"""Runs the processes of one training run on this machine, and passes stop requests on to them.

Built on torch's elastic agent (the engine of torchrun): it starts the workers with their ranks, watches them, and ends
all of them when one fails. Whether all are then started again is decided here, as on a cluster: see launch/attempts.py.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from launch.attempts import CRASHED, STOPPED, Attempts, Limits, how_it_ended
from launch.cluster import ClusterConfig
from launch.rendezvous import LOOPBACK, LoopbackRendezvous
from train.errors import EXIT_FAILED, EXIT_OK, EXIT_RETRY, RunError
from train.run_dir import RunDir

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
SECOND_PRESS = 2.0  # seconds: a Ctrl-C that comes later than that after the first request means "now"


@dataclass
class LocalConfig(ClusterConfig):
    """conf/cluster/local.yaml. `processes` on this machine; 0: one a GPU, or one where there is no GPU.

    `restarts`: how often all of them are started again after one has died or lost another; not after an error that
    would come again, and not after `fruitless` attempts in a row that gained no step.
    """

    processes: int = 0
    restarts: int = 0
    fruitless: int = 3

    def __post_init__(self) -> None:
        if self.processes < 0:
            raise ValueError(f"cluster.processes is {self.processes}; give the number of processes, or 0 for one a GPU")
        if self.restarts < 0 or self.fruitless < 1:
            raise ValueError(
                f"cluster.restarts={self.restarts} must be 0 or more, cluster.fruitless={self.fruitless} 1 or more"
            )

    @property
    def world(self) -> int:
        """Processes that will run."""
        return self.processes or max(1, torch.cuda.device_count())


@dataclass(frozen=True)
class Ending:
    """How the workers ended. `failure`: of the worker that failed first, in words; None when all ended well.

    `early`: they were asked to stop before they could save anything, and did; `asked`: they were asked to stop.
    """

    failure: str | None
    early: bool
    asked: bool


def run_local(config: LocalConfig, run: RunDir, code: Path, overrides: Sequence[str]) -> Ending:
    """Start the workers of a run with these overrides of conf/train.yaml and the code in that folder, and wait until
    all have ended; start them again as `config` says.

    SIGTERM, SIGINT, SIGHUP and SIGUSR2 reach the workers as SIGTERM: they save a checkpoint and end, in their own time.
    A second Ctrl-C kills them. Must be called in the main thread. RunError when another process trains the run.
    """
    if (holder := run.holder()) is not None:
        raise RunError(f"run {run.root.name!r} is being trained already, by {holder}; wait for it, or stop it")
    _set_environment(config.world, code)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its pages say what Ending says
    attempts, job = Attempts(run), f"local-{os.getpid()}"
    attempts.submitted()
    number = 0
    while True:
        attempts.begin(job, number, socket.gethostname())
        ending, status = _run_once(config, run, overrides)
        ended = STOPPED if ending.failure is None or ending.early else CRASHED
        if ended == CRASHED or not ending.early:
            ended = how_it_ended(run, status)
        attempts.end(job, number, ended, status)
        if ended != CRASHED or ending.asked or config.restarts == 0:
            return ending
        objection = attempts.objection(Limits(config.restarts, config.fruitless))
        if objection is not None:
            return Ending(f"{ending.failure}; given up: {objection}", ending.early, ending.asked)
        number += 1
        print(
            f"{ending.failure}: all workers start again from step {run.committed_step()} "
            f"(restart {number} of at most {config.restarts})",
            file=sys.stderr, flush=True,
        )  # fmt: skip


def _run_once(config: LocalConfig, run: RunDir, overrides: Sequence[str]) -> tuple[Ending, int]:
    """One attempt, with a rendezvous of its own. Returns also the exit status of all workers together."""
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        spec = WorkerSpec(
            role="train",
            local_world_size=config.world,
            rdzv_handler=LoopbackRendezvous(run.root.name),
            entrypoint=sys.executable,
            # "$" starts a macro of the agent, which has no way to write the character itself but this one.
            args=("-m", "launch.worker", *(override.replace("$", "$$") for override in overrides)),
            max_restarts=0,
            monitor_interval=0.1,
            local_addr=LOOPBACK,
        )
        agent = LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=folder))
        with _Forwarder(agent) as forwarder:
            result = agent.run()
    failures = result.failures.values()
    if not failures:
        return Ending(None, early=False, asked=forwarder.asked), EXIT_OK
    first = min(failures, key=lambda failure: (failure.timestamp, failure.exitcode < 0))
    early = forwarder.asked and all(failure.exitcode == -signal.SIGTERM for failure in failures)
    status = EXIT_FAILED if any(failure.exitcode == EXIT_FAILED for failure in failures) else EXIT_RETRY
    return Ending(_describe(first), early, forwarder.asked), status


class _Forwarder:
    """Passes this process's stop signals on to the workers, as soon as there are any."""

    def __init__(self, agent: LocalElasticAgent) -> None:
        self._agent = agent
        self._requested = threading.Event()
        self._kill = threading.Event()
        self._ended = threading.Event()
        self._first: float | None = None

    @property
    def asked(self) -> bool:
        """Whether a stop was asked for. (`_requested` also wakes the thread at the end.)"""
        return self._first is not None

    def __enter__(self) -> _Forwarder:
        # The agent would install handlers that kill the workers 30 s after a signal: too early for a large checkpoint.
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
        self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        # A thread, since a handler may run when the agent has started some of the workers only.
        self._thread = threading.Thread(target=self._forward, name="stop-forwarder", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._requested.set()
        self._thread.join()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
        elif number == signal.SIGINT and now - self._first > SECOND_PRESS:
            self._kill.set()
        self._requested.set()

    def _forward(self) -> None:
        self._requested.wait()
        pids = self._pids()
        while not self._ended.is_set() and not pids:
            time.sleep(0.05)
            pids = self._pids()
        if self._ended.is_set():
            return
        print("stopping: waiting for the checkpoint (Ctrl-C again ends it without)", file=sys.stderr, flush=True)
        _send(pids, signal.SIGTERM)
        while not self._ended.is_set():
            if self._kill.wait(0.1):
                _send(pids, signal.SIGKILL)
                return

    def _pids(self) -> list[int]:
        return [worker.id for worker in self._agent.get_worker_group().workers if worker.id is not None]


def _send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _set_environment(world: int, code: Path) -> None:
    """What the workers inherit; what the user has set stays."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(code.absolute()), os.environ.get("PYTHONPATH")]))
    os.environ["PYTHONSAFEPATH"] = "1"  # the folder that we are in, perhaps the checkout, comes before PYTHONPATH else
    os.environ["MOVA_CODE"] = str(code.absolute())
    os.environ["MOVA_STARTED"] = str(time.time())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // world)))
    names = {name for _, name in socket.if_nameindex()}
    loopback = next((name for name in ("lo", "lo0") if name in names), None)
    if loopback is not None:  # one machine: its processes meet there, and nothing listens on the network
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    os.environ["LAUNCHER_PID"] = str(os.getpid())


def _describe(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return f"rank {failure.local_rank} was killed by {signal.Signals(-failure.exitcode).name}"
    return f"rank {failure.local_rank} ended with exit status {failure.exitcode}"
