"""What ranks must agree on: stop requests, non-finite steps, and errors that only the first rank sees.

Every step sums one small vector over all ranks, asynchronously: posted in step k, read in step k+1 (no host sync waits
for the device). A stop request that reached any rank in step k is acted on by all of them after step k+1.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from train.errors import EXIT_RETRY, RunError, exit_status

T = TypeVar("T")


class StopRequest:
    """Remembers that this rank was asked to stop: by SIGTERM, SIGINT, SIGUSR2, the run's stop file (first rank), or a
    time limit that comes near. Make it as early as possible: a signal before that ends the process, as usual.

    `lead`: seconds before the time limit (MOVA_DEADLINE, see train/errors.py) at which the run must begin to stop.
    """

    def __init__(self) -> None:
        self.lead = 0.0
        self._asked = False  # no Event: a second signal within its set() would wait for the first one's lock for ever
        self._stop_file: Path | None = None
        self._started = float(os.environ.get("MOVA_STARTED", time.time()))
        self._deadline = float(os.environ.get("MOVA_DEADLINE", "inf"))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self._handle)

    def watch(self, stop_file: Path) -> None:
        """Obey this file too, if it is younger than the launch; take away an older one. One rank only."""
        self._stop_file = stop_file
        if stop_file.exists() and stop_file.stat().st_mtime < self._started:
            stop_file.unlink()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def requested(self) -> bool:
        """Whether this rank knows of a request."""
        return (
            self._asked
            or time.time() >= self._deadline - self.lead
            or (self._stop_file is not None and self._stop_file.exists())
        )


class Flags(NamedTuple):
    """What one rank has to say at the end of a step; over all ranks: whether any of them said so."""

    stop: bool = False  # asked to stop
    save: bool = False  # the interval between checkpoints is over
    save_failed: bool = False  # the save in flight came to nothing
    inspect: bool = False  # a file asks for a look inside


@dataclass(frozen=True)
class StepSums:
    """What a step's vector says once all ranks have added theirs."""

    step: int
    loss: float  # of the global batch
    loss_video: float  # mean squared error over the samples that have video (nan: none had)
    loss_audio: float
    grad_norm: float
    flags: Flags
    finite: bool
    extra: dict[str, list[float]]  # what else was posted, summed
    wait: float  # seconds that this rank waited for the sums


class _Sums:
    """A vector [n] float64 that is summed over all ranks and then read on the host.

    On a GPU it comes to the host on the stream `side`: who reads it waits for that, not for what was launched since.
    """

    def __init__(self, vector: Tensor, side: torch.cuda.Stream | None) -> None:
        self._vector = vector  # held until it is read: its memory belongs to the stream that computes
        work = dist.all_reduce(vector, async_op=True)
        assert work is not None
        self._wait: Callable[[], object] = work.wait
        self._host = vector
        if side is not None:
            with torch.cuda.stream(side):
                work.wait()
                self._host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
                self._host.copy_(vector, non_blocking=True)
                self._wait = side.record_event().synchronize

    def read(self) -> list[float]:
        """The sums."""
        self._wait()
        return self._host.tolist()


class StepSignals:
    """One asynchronous all-reduce a step over all ranks."""

    def __init__(self) -> None:
        self._pending: tuple[int, _Sums, dict[str, int]] | None = None
        self._side: torch.cuda.Stream | None = None

    def post(
        self,
        step: int,
        loss: Tensor,
        video: Tensor,
        audio: Tensor,
        norm: Tensor,
        flags: Flags,
        extra: dict[str, Tensor] | None = None,
    ) -> None:
        """Start summing. loss: this rank's share; video, audio [2]: (weighted sum of MSE, sum of weights); norm: the
        same on all ranks; extra: whatever else is to be summed, [n] each, of the same names on all ranks."""
        assert self._pending is None, "collect the last step's sums first"
        norm_share = norm / dist.get_world_size()
        # Filled, not copied from the host: a copy would wait for the device.
        said = torch.stack([torch.full((), float(flag), device=loss.device) for flag in flags])
        extra = extra or {}
        parts = [loss.view(1), video, audio, norm_share.view(1), said, *extra.values()]
        vector = torch.cat([part.to(torch.float64) for part in parts])
        if vector.is_cuda and self._side is None:
            self._side = torch.cuda.Stream()
        self._pending = (step, _Sums(vector, self._side), {name: len(values) for name, values in extra.items()})

    def collect(self) -> StepSums | None:
        """The sums of the step posted last, or None when there is none."""
        if self._pending is None:
            return None
        step, sums, sizes = self._pending
        self._pending = None
        begin = time.perf_counter()
        loss, video, video_weight, audio, audio_weight, norm, *rest = sums.read()
        wait = time.perf_counter() - begin
        said, rest = rest[: len(Flags._fields)], rest[len(Flags._fields) :]
        extra: dict[str, list[float]] = {}
        for name, size in sizes.items():
            extra[name], rest = rest[:size], rest[size:]
        finite = bool(torch.isfinite(torch.tensor([loss, norm])).all())
        return StepSums(
            step,
            loss,
            video / video_weight if video_weight else float("nan"),
            audio / audio_weight if audio_weight else float("nan"),
            norm,
            Flags(*(value > 0 for value in said)),
            finite,
            extra,
            wait,
        )


def on_first_rank(action: Callable[[], T]) -> T:
    """Run an action on rank 0 and give its result to all ranks; its RunError is raised on all of them."""
    outcome: list[object] = [None, None, False]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except RunError as error:
            outcome[1:] = str(error), error.retry
        except OSError as error:
            message = f"{error.filename or 'a file of the run'}: {error.strerror or error}"
            outcome[1:] = message, exit_status(error) == EXIT_RETRY
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise RunError(str(outcome[1]), retry=bool(outcome[2]))
    return outcome[0]  # type: ignore[return-value]


def gather(mine: list[T]) -> list[T]:
    """The lists of all ranks, one after the other, on every rank."""
    found: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, mine)
    return [item for items in found for item in items]
