"""One rank of a run that kills itself (SIGKILL) at a chosen point: `python -m tests.train.chaos_rank key=value ...`.

The points are armed from outside, by wrapping what the trainer calls; the trainer knows nothing of them. CHAOS names
the point and the count at which it strikes, as "save:2" or "time:3.5"; without it nothing happens. Each step's samples
go to CHAOS_LOG, so that a test can see what was consumed.
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


def strike(owner, name: str, count: float, after: bool = False, condition=lambda *args: True) -> None:
    """Die in the `count`-th call of owner.name, before it begins or after it ended."""
    inner, calls = getattr(owner, name), 0

    def outer(*args, **kwargs):
        nonlocal calls
        if not condition(*args):
            return inner(*args, **kwargs)
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
    import torch.distributed.checkpoint as dcp

    if point == "hang":
        hang(count)
        return
    from train import checkpoint, engine, feed, loop, saver

    name = {"marker": checkpoint.MARKER, "committed": checkpoint.MARKER}.get(point)
    points = {
        "step": (loop, "forward_backward", False),
        "update": (engine.ShardedEngine, "step", False),
        "updated": (engine.ShardedEngine, "step", True),
        "sums": (loop.StepSignals, "post", True),
        "data": (feed, "draw", False),
        "copy": (saver.HostCopy, "take", True),
        "shards": (dcp.FileSystemWriter, "write_data", False),
        "written": (dcp.FileSystemWriter, "write_data", True),
        "checksums": (saver, "checksum", False),
        "marker": (saver, "write_atomically", False),
        "committed": (saver, "write_atomically", True),
        "prune": (saver.shutil, "rmtree", False),
        "load": (checkpoint.dcp, "load", False),
        "metrics cut": (loop, "cut_metrics", False),
        "resumed": (loop, "cut_metrics", True),
    }
    owner, function, after = points[point]
    strike(owner, function, count, after, lambda *args: name is None or args[0].name == name)


def hang(count: float) -> None:
    """Stand still in the `count`-th step, as in a lock that nobody opens."""
    from train import loop

    inner, calls = loop.forward_backward, 0

    def outer(*args, **kwargs):
        nonlocal calls
        calls += 1
        while calls >= count:
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
    if point and point != "time":
        arm(point, float(count))
    sys.argv[0] = "train"
    runpy.run_module("train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
