"""What is asked of a planner: a run, on how many GPUs of which kind, with clips of which size; and what is assumed."""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from core.errors import UserError
from core.keys import nearest
from core.ranges import bounded
from data.errors import DataError
from train.config import TrainConfig
from train.dataloader import close_data, open_data
from train.plan.gpu import GpuConfig, read_sheet

WIDE = 1024  # a video tower from this width on is a model of MOVA's size


@dataclass
class Assumptions:
    """What nobody can count. The values are assumptions until you give your own.

    slack: share of a step's memory that the allocator and kernels' workspaces take on top
    reserved_gib: GiB of a GPU that CUDA, NCCL and other processes hold
    encoder_tflops: of encoding clips by the video VAE, TFLOP/s of one GPU
    save_gb_s: from a GPU to host memory while a checkpoint is copied and the step waits, GB/s
    failure_hours: hours of one GPU between failures that end a run (419 in 54 days of 16,384 GPUs: Llama 3, table 5)
    restart_minutes: from a failure to the next new step
    price: of an hour of one GPU, in your currency (null: unknown)
    """

    slack: float = bounded(0.05, "[0, 1]")
    reserved_gib: float = bounded(2.5, "[0, 1000]")
    encoder_tflops: float = bounded(300.0, "(0, inf)")
    save_gb_s: float = bounded(20.0, "(0, inf)")
    failure_hours: float = bounded(50700.0, "(0, inf)")
    restart_minutes: float = bounded(10.0, "[0, inf)")
    price: float | None = bounded(None, "[0, inf)")


@dataclass(frozen=True)
class ClipSize:
    """The largest clip of the data, in pixels."""

    frames: int
    height: int
    width: int
    fps: float = 24.0

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns."""
        return (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8

    @property
    def audio_steps(self) -> int:
        """Latent steps of its sound, 50 a second."""
        return math.ceil(50 * self.frames / self.fps)

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.frames / self.fps


@dataclass(frozen=True)
class Question:
    """What is asked. world: GPUs; per_node: of them in one host; hours: of video in the data (None: unknown, then the
    config's steps count)."""

    config: TrainConfig
    world: int
    per_node: int
    gpu: GpuConfig
    clip: ClipSize
    assumed: Assumptions = field(default_factory=Assumptions)
    rate: str = "middle"
    hours: float | None = None

    @property
    def on_gpus(self) -> bool:
        """Whether kernels of GPUs are counted."""
        return self.gpu.device == "cuda"

    @property
    def steps(self) -> int:
        """Of the run: one pass through the hours, else those of the config."""
        if self.hours is None:
            return self.config.steps
        return max(1, math.ceil(self.hours * 3600 / self.clip.seconds / self.config.data.batch_size))


def find_sheet(name: str) -> GpuConfig:
    """A sheet of conf/gpu by its name, or of a file of one's own by its path. UserError for one that is not there."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return read_sheet(Path(name).expanduser())
    folder = importlib.resources.files("conf") / "gpu"
    known = sorted(Path(str(entry)).stem for entry in folder.iterdir() if str(entry).endswith(".yaml"))
    if name not in known:
        raise UserError(
            f"gpu={name}: there is no such sheet{nearest(name, known) or ';'} choose one of {', '.join(known)}, or "
            "give the path of a file that `mova bench matmul sheet=FILE.yaml` wrote"
        )
    return read_sheet(Path(str(folder / f"{name}.yaml")))


def clip_of(config: TrainConfig, overrides: Sequence[str]) -> tuple[ClipSize, str]:
    """The largest clip of the config's data where that can be read, else what the model was made for; and which."""
    try:
        parts = open_data(config.data, config.model.video.text_dim)
    except (DataError, UserError, OSError):
        return _usual_clip(config, overrides)
    try:
        buckets = [bucket for part in parts if part.mixture is not None for bucket in part.mixture.buckets]
    finally:
        close_data(parts)
    most = max(buckets, key=lambda bucket: bucket.frames * bucket.height * bucket.width)
    return ClipSize(4 * most.frames - 3, 8 * most.height, 8 * most.width, most.fps), "the largest of the data"


def _usual_clip(config: TrainConfig, overrides: Sequence[str]) -> tuple[ClipSize, str]:
    chosen = [given for given in overrides if given.startswith(("experiment=", "model="))]
    if config.model.video.dim < WIDE:
        return ClipSize(49, 64, 64), "assumed: the quickstart's"
    if any("720p" in given for given in chosen):
        return ClipSize(193, 720, 1280), "assumed: MOVA's at 720p"
    return ClipSize(193, 352, 640), "assumed: MOVA's at 360p"
