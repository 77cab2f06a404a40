"""One rank of a run that kills itself (SIGKILL) at a chosen point: `python -m tests.train.chaos_rank key=value ...`.

The points are armed from outside, by wrapping what the trainer calls; the trainer knows nothing of them. CHAOS names
the point and the count at which it strikes, as "shards:2" or "time:3.5"; "passed:FILE" kills nobody and notes which
points were passed; without it nothing happens. Each step's samples go to CHAOS_LOG, so that a test can see what was
consumed.
"""

import json
import os
import runpy
import signal
import sys
import threading
import time

BEGAN = time.monotonic()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal comes at once, or in a moment


def strike(owner, name: str, count: float, after: bool = False) -> None:
    """Die in the `count`-th call of owner.name, before it begins or after it ended."""
    inner, calls = getattr(owner, name), 0

    def outer(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls >= count and not after:
            die()
        result = inner(*args, **kwargs)
        if calls >= count:
            die()
        return result

    setattr(owner, name, outer)


def arm(point: str, count: float) -> None:
    """Prepare to die at `point` (see POINTS in chaos.py)."""
    if point == "time":  # anywhere, also while modules are imported
        threading.Timer(max(0.0, count - (time.monotonic() - BEGAN)), die).start()
        return
    if point in ("hang", "gil"):
        hang(count, hold_lock=point == "gil")
        return
    from train import ready

    if point == "asleep":
        ready.open_data = lambda *_: time.sleep(1000)
        return
    owner, function, after = points()[point]
    strike(owner, function, count, after)


def points() -> dict[str, tuple]:
    """{point: (owner, name of a function, whether its end is meant)} of all points inside the trainer."""
    from train import dataloader, loop, ready
    from train.checkpoint import dcp_metadata, saver
    from train.engine import engine

    return {
        "step": (loop, "forward_backward", False),
        "update": (engine.ShardedEngine, "step", False),
        "updated": (engine.ShardedEngine, "step", True),
        "sums": (ready.StepSignals, "post", True),
        "data": (dataloader, "draw", False),
        "copy": (saver.HostCopy, "take", True),
        "shards": (saver, "write_file", False),
        "written": (saver, "write_file", True),
        "described": (saver.FilePlan, "metadata", True),
        "marker": (saver, "write_marker", False),
        "committed": (saver, "write_marker", True),
        "prune": (saver.shutil, "rmtree", False),
        "load": (dcp_metadata, "read_tensors", False),
        "metrics cut": (ready, "cut_metrics", False),
        "resumed": (ready, "cut_metrics", True),
    }


def note_passed(path: str) -> None:
    """Append the name of each point to `path` when it is passed first."""
    passed = set()

    def noted(owner, name: str, point: str) -> None:
        inner = getattr(owner, name)

        def outer(*args, **kwargs):
            if point not in passed:
                passed.add(point)
                with open(path, "a") as file:
                    file.write(point + "\n")
            return inner(*args, **kwargs)

        setattr(owner, name, outer)

    for point, (owner, name, _) in points().items():
        noted(owner, name, point)


def hang(count: float, hold_lock: bool) -> None:
    """Wait for ever in the `count`-th step, as for a lock that nobody opens; or in C code that keeps Python's."""
    import ctypes

    from train import loop

    inner, calls = loop.forward_backward, 0

    def outer(*args, **kwargs):
        nonlocal calls
        calls += 1
        while calls >= count:
            if hold_lock:
                ctypes.PyDLL(None).sleep(1000)  # PyDLL, unlike CDLL, keeps the interpreter's lock
            time.sleep(1)
        return inner(*args, **kwargs)

    loop.forward_backward = outer


def record(path: str) -> None:
    """Append what each step consumes: [step, sample numbers of weight above 0]."""
    from train import loop

    inner = loop.forward_backward

    def outer(model, micro_batches, *args, **kwargs):
        batches = [prepared.batch for prepared in micro_batches]
        numbers = [int(n) for b in batches for n, w in zip(b.sample_numbers, b.weight.tolist(), strict=True) if w > 0]
        with open(path, "a") as file:
            file.write(json.dumps([batches[0].step, numbers]) + "\n")
        return inner(model, micro_batches, *args, **kwargs)

    loop.forward_backward = outer


def main() -> None:
    """Arm what the environment says, and train."""
    point, _, count = os.environ.get("CHAOS", "").partition(":")
    if point == "time":
        arm(point, float(count))
    if "CHAOS_LOG" in os.environ:
        record(os.environ["CHAOS_LOG"])
    if point == "passed":
        note_passed(count)
    elif point and point != "time":
        arm(point, float(count))
    sys.argv[0] = "train"
    runpy.run_module("train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
