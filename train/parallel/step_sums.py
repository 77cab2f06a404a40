"""The sums of a step over all ranks, asynchronously: posted in step k, read in step k+1.

Every step sums one small vector over all ranks (no host sync waits for the device). All ranks act after step k+1 on a
stop request that reached any of them in step k.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

KNOWN = 2  # the sums of step k - 2 are at hand when step k begins, those of k - 1 are still under way


class Flags(NamedTuple):
    """What one rank reports at the end of a step; over all ranks: whether any of them reported it."""

    stop: bool = False  # asked to stop
    save: bool = False  # the interval between checkpoints is over
    save_failed: bool = False  # the save in progress failed
    inspect: bool = False  # a file asks for a profile


@dataclass(frozen=True)
class StepSums:
    """A step's sums over all ranks."""

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

    On a GPU it is copied to the host on the stream `side`: reading waits for that, not for work launched since.
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
    """One asynchronous all-reduce per step over all ranks."""

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
        same on all ranks; extra: further vectors to sum, [n] each, with the same names on all ranks."""
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
        """The sums of the last posted step, or None if there is none."""
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
