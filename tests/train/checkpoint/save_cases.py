"""What ranks do in test_checkpoint.py and test_faults.py: savers over a small state, and runs with faults planted."""

import errno
import os
import signal
import time
from collections import namedtuple
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from core.errors import RunError
from data.loader.state import DataState
from tests.train import runs
from train import dataloader, loop
from train.checkpoint import checkpoint, saver
from train.checkpoint.checkpoint import CheckpointConfig, TrainState
from train.checkpoint.saver import Saver
from train.faults.straggler import StragglerProbe

CONFIG = {"model": {"dim": 4}, "objective": {}, "optim": {}}


class Values:
    """An engine that holds a few plain tensors: enough for a checkpoint."""

    def __init__(self, value: float) -> None:
        self.held = {f"model.video_dit.w{i}": torch.full((64, 64), value + i) for i in range(4)}

    def tensors(self):
        return self.held

    def update_counts(self):
        return {"video_dit.w0": 3}

    def average_counts(self):
        return {}

    def restore(self, counts, read, averaged=None):
        read(self.held)

    def set(self, value: float) -> None:
        for i, tensor in enumerate(self.held.values()):
            tensor.fill_(value + i)


def state_at(step: int, value: float) -> TrainState:
    return TrainState(Values(value), DataState.start("f" * 8, [4], 0, 2), step)  # type: ignore[arg-type]


def slow_writer(seconds: float):
    inner = saver.write_file

    def write(*args):
        time.sleep(seconds)
        return inner(*args)

    return mock.patch.object(saver, "write_file", write)


def full_disk(times: int, rank: int = 1):
    """No space left, on one rank, in the first `times` saves (its files get half of their bytes)."""
    inner, left = saver.write_file, times

    def write(plan, tensors, folder, of_rank):
        nonlocal left
        result = inner(plan, tensors, folder, of_rank)
        if left > 0:
            left -= 1
            if dist.get_rank() == rank:
                for file in folder.glob(f"__{rank}_*"):
                    os.truncate(file, file.stat().st_size // 2)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return result

    return mock.patch.object(saver, "write_file", write)


def in_the_background(folder: Path) -> dict:
    """Training goes on and changes all tensors while the writer is slow; a second save waits for the first."""
    state = state_at(1, 1.0)
    keeper = Saver(folder, CheckpointConfig(keep=5), CONFIG, "two ranks")
    with slow_writer(1.0):
        begin = time.perf_counter()
        keeper.begin(state)
        stopped = time.perf_counter() - begin
        half = not (folder / "step-00000001" / checkpoint.MARKER).exists()
        state.engine.set(100.0)  # type: ignore[attr-defined]
        ones = torch.ones(8)
        for _ in range(20):  # training's own collectives, meanwhile
            dist.all_reduce(ones)
        state.step = 2
        keeper.begin(state)
        waited = time.perf_counter() - begin
        first_done = (folder / "step-00000001" / checkpoint.MARKER).exists()
        keeper.finish()
    values = {}
    for step in (1, 2):
        back = state_at(0, 0.0)
        checkpoint.load(back, folder / f"step-{step:08d}", CONFIG, {})
        values[step] = [tensor.unique().tolist() for tensor in back.engine.tensors().values()]
    kinds = [event.kind for event in keeper.events()]
    return {
        "stopped": stopped,
        "half": half,
        "waited": waited,
        "first_done": first_done,
        "values": values,
        "kinds": kinds,
    }


def failing(folder: Path, times: int, saves: int, config: CheckpointConfig) -> dict:
    """Saves on a disk that is full in the first `times` of them."""
    state, keeper = state_at(0, 1.0), Saver(folder, config, CONFIG, "two ranks")
    with full_disk(times):
        try:
            for step in range(1, saves + 1):
                state.step = step
                keeper.begin(state)
            keeper.finish()
            error = None
        except RunError as caught:
            error = (str(caught), caught.retry)
    return {
        "error": error,
        "events": [(event.kind, event.step, event.text) for event in keeper.events()],
        "left": sorted(path.name for path in folder.iterdir()),
    }


def rotated(folder: Path, config: CheckpointConfig, steps: int) -> list[str]:
    state, keeper = state_at(0, 1.0), Saver(folder, config, CONFIG, "two ranks")
    for step in range(1, steps + 1):
        state.step = step
        keeper.begin(state)
    keeper.finish()
    return [path.name for path in checkpoint.committed(folder)] + [event.kind for event in keeper.events()]


def no_room(folder: Path) -> dict:
    usage = namedtuple("usage", "total used free")
    with mock.patch.object(saver.shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000)):
        return failing(folder, 0, 2, CheckpointConfig(max_failures=5))


def fall_back(folder: Path, damage) -> dict:
    """Two checkpoints; the newest is damaged on disk before it is looked for."""
    state, keeper = state_at(1, 1.0), Saver(folder, CheckpointConfig(), CONFIG, "two ranks")
    keeper.begin(state)
    state.step = 2
    keeper.begin(state)
    keeper.finish()
    if dist.get_rank() == 0:
        damage(folder)
    dist.barrier()
    said: list[str] = []
    with mock.patch.object(checkpoint.logger, "warning", lambda text, *args: said.append(text % args)):
        try:
            found = checkpoint.newest(folder)
        except RunError as error:
            return {"error": str(error), "said": said}
    return {"found": found and found.name, "said": said, "left": sorted(path.name for path in folder.iterdir())}


def other_parameters(folder: Path) -> str:
    keeper = Saver(folder, CheckpointConfig(), CONFIG, "two ranks")
    keeper.begin(state_at(1, 1.0))
    keeper.finish()
    other = state_at(0, 0.0)
    held = other.engine.tensors()
    held["model.dual_tower_bridge.w1"] = held.pop("model.video_dit.w1")
    held["model.video_dit.w2"] = torch.zeros(2, 2)
    try:
        checkpoint.load(other, folder / "step-00000001", CONFIG, {})
    except RunError as error:
        return str(error)
    return "loaded"


def flip(folder: Path) -> None:
    file = max((folder / "step-00000002").glob("*.distcp"), key=lambda path: path.stat().st_size)
    octets = bytearray(file.read_bytes())
    octets[len(octets) // 2] ^= 1
    file.write_bytes(octets)


def cut(folder: Path) -> None:
    file = max((folder / "step-00000002").glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size - 1)


def unmark(folder: Path) -> None:
    (folder / "step-00000002" / checkpoint.MARKER).unlink()


def all_damaged(folder: Path) -> None:
    flip(folder)
    (folder / "step-00000001" / checkpoint.STATE).write_text("{")


def run(root: Path, data: Path, run_id: str, *overrides: str, faults: tuple = ()) -> dict:
    """A whole run with faults planted: {name of a function here: arguments}."""
    with ExitStack() as stack:
        for name, *arguments in faults:
            stack.enter_context(globals()[name](*arguments))
        return runs.train(root, data, run_id, *overrides)


def loss_times(factor: float, steps: tuple[int, ...]):
    """The losses, and with them the gradients, of some steps are multiplied."""
    inner = loop.forward_backward

    def outer(model, micro_batches, objective, expert, layout, backward, *rest):
        step = micro_batches[0].batch.step
        times = factor if step in steps else 1.0
        more = lambda loss, last: backward(loss * times, last)  # noqa: E731
        losses = inner(model, micro_batches, objective, expert, layout, more, *rest)
        losses.share = losses.share * times
        return losses

    return mock.patch.object(loop, "forward_backward", outer)


def signal_in_save(number: int):
    """The first rank gets a signal while it writes its shards."""
    inner = saver.write_file

    def write(*args):
        if dist.get_rank() == 0:
            os.kill(os.getpid(), number)
            time.sleep(0.3)
        return inner(*args)

    return mock.patch.object(saver, "write_file", write)


def deadline(seconds: float):
    return mock.patch.dict(os.environ, {"MOVA_DEADLINE": str(time.time() + seconds)})


def slow_data(rank: int, seconds: float):
    inner = dataloader.draw

    def draw(*args):
        if dist.get_rank() == rank:
            time.sleep(seconds)
        return inner(*args)

    return mock.patch.object(dataloader, "draw", draw)


def slow_device(rank: int, times: int):
    """The probe does its work several times on one rank, as on a throttled device."""
    inner = StragglerProbe._multiply

    def multiply(self):
        return sum(inner(self) for _ in range(times if dist.get_rank() == rank else 1))

    return mock.patch.object(StragglerProbe, "_multiply", multiply)


def slow_steps(seconds: float):
    inner = loop.forward_backward

    def outer(*args):
        time.sleep(seconds)
        return inner(*args)

    return mock.patch.object(loop, "forward_backward", outer)


USR2 = int(signal.SIGUSR2)
