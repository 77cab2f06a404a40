"""Many cases in one launch of several gloo processes: a launch costs time, a case does not.

    results = run_cases(2, {"name": (function, arguments)})     # functions live in an importable module
    results["name"][rank]                                       # what the function returned there

A case that raises ends its launch, and the error is raised here with the rank's traceback.

Importing what a rank needs costs seconds of processor time. A rank is therefore forked off a program that has imported
it and runs nothing else (`python -m tests.distributed`): one program for each rank number, each with its own order of
sets, as ranks that a user starts have.
"""

import atexit
import contextlib
import datetime
import faulthandler
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Case = tuple[Callable[..., Any], tuple]
TIMEOUT = datetime.timedelta(seconds=300)  # while one rank prepares files for the others, on a slow machine
GRACE = 30.0  # seconds that a rank has to end after one has failed
LIMIT = 900.0  # seconds of a launch; the longest takes 150 on two idle cores
JOB = "job"


def run_cases(world: int, cases: dict[str, Case]) -> dict[str, list[Any]]:
    """Run every case on `world` ranks, in order, in one launch."""
    with tempfile.TemporaryDirectory() as folder:
        here = (dict(os.environ), sys.path, os.getcwd())
        Path(folder, JOB).write_bytes(pickle.dumps((*here, pickle.dumps(cases))))
        ended = _launch(world, folder)
        files = [f"{folder}/rank{rank}" for rank in range(world)]
        begun = [Path(folder, f"case{rank}") for rank in range(world)]
        last = [file.read_text() if file.exists() else "(the start)" for file in begun]
        outcomes = [torch.load(file, weights_only=False) if os.path.exists(file) else {} for file in files]
    for rank, outcome in enumerate(outcomes):
        if "error" in outcome:
            raise AssertionError(f"case {outcome['case']!r} failed on rank {rank}:\n{outcome['error']}")
    # After the news of a rank that failed: the others met its closed connection, and may have ended by that.
    if any(ended.values()):
        raise AssertionError(f"exit statuses of ranks, by the order of their end: {ended}; their last cases: {last}")
    return {name: [outcome[name] for outcome in outcomes] for name in cases}


def _launch(world: int, folder: str) -> dict[int, int]:
    """{rank: exit status, as a Process has it}, in the order of their end. When one fails, the others are ended."""
    for rank in range(world):
        if rank == len(_servers):
            _servers.append(_ForkServer())
        elif not _servers[rank].alive():  # a test ended all children of this process, as launchers do
            _servers[rank].end()
            _servers[rank] = _ForkServer()
    ranks = _servers[:world]
    try:
        for rank, server in enumerate(ranks):
            server.channel.send((rank, world, folder))
        pids = [server.channel.recv() for server in ranks]
        ended: dict[int, int] = {}
        begin, deadline = time.monotonic(), float("inf")
        while len(ended) < world:
            left = [rank for rank in range(world) if rank not in ended]
            for channel in wait([ranks[rank].channel for rank in left], 1.0):
                rank = next(rank for rank in left if ranks[rank].channel is channel)
                ended[rank] = channel.recv()
            if time.monotonic() > begin + LIMIT and deadline == float("inf"):
                for rank in set(range(world)) - ended.keys():
                    os.kill(pids[rank], signal.SIGABRT)  # it prints its stack
                deadline = time.monotonic() + GRACE
            late = time.monotonic() > deadline
            if any(ended.values()) or late:
                for rank in set(left) - ended.keys():
                    if late or deadline == float("inf"):
                        os.kill(pids[rank], signal.SIGKILL if late else signal.SIGTERM)
                deadline = min(deadline, time.monotonic() + GRACE)
        return ended
    except BaseException:  # Ctrl-C, or a server that died: what they forked ends with them
        while _servers:
            _servers.pop().end()
        raise


class _ForkServer:
    """The program that all ranks of one number are forked off."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        root = Path(__file__).parents[1]
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.distributed", str(theirs.fileno())],
                cwd=root, env=os.environ | {"PYTHONPATH": path}, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
            )  # fmt: skip
        self.channel = Connection(ours.detach())

    def alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self.channel.close()


_servers: list[_ForkServer] = []
atexit.register(lambda: [server.end() for server in _servers])


def _serve(channel: Connection) -> None:
    """Fork ranks, one after the other, until the tests end."""
    import deepspeed  # noqa: F401

    import train.loop  # noqa: F401

    fork = get_context("fork").Process
    while True:
        rank, world, folder = channel.recv()
        process = fork(target=_worker, args=(rank, world, folder, channel))
        process.start()
        channel.send(process.pid)
        process.join()
        channel.send(process.exitcode)


def _end_with_parent() -> None:
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)


def _worker(rank: int, world: int, folder: str, channel: Connection) -> None:
    _end_with_parent()
    faulthandler.enable()  # a rank that crashes prints its stack
    channel.close()
    environment, sys.path[:], here, cases = pickle.loads(Path(folder, JOB).read_bytes())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(here)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    results: dict[str, Any] = {}
    for name, (function, arguments) in pickle.loads(cases).items():
        Path(folder, f"case{rank}").write_text(name)
        try:
            results[name] = function(*arguments)
        except BaseException:
            torch.save({"case": name, "error": traceback.format_exc()}, f"{folder}/rank{rank}")
            return  # the other ranks meet a closed connection and end as well
    torch.save(results, f"{folder}/rank{rank}")
    Path(folder, f"case{rank}").write_text("(the end)")
    dist.destroy_process_group()


if __name__ == "__main__":
    _end_with_parent()
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        # Of the module that the cases know, not of this program's own.
        importlib.import_module("tests.distributed")._serve(Connection(int(sys.argv[1])))
