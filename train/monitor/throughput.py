"""Host-side metrics of a step: speed, utilization of the hardware, memory, amount of data seen.

MFU counts the FLOPs of the model alone (train/parallel/flops.py: 3 x forward of each clip that counts), HFU also the
recomputed ones, both against the peak of the dense bfloat16 unit. docs/monitoring.md has the formula.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import torch

from data.batch import Batch
from data.clip import Bucket
from data.loader.state import Seen
from model.joint import JointConfig
from train.parallel.flops import block_flops, block_outputs_flops, bridge_flops, bridge_outputs_flops, step_flops
from train.parallel.mesh import Layout
from train.parallel.parts import ALL
from train.parallel.recompute import recomputed

PEAKS = {  # dense bfloat16 TFLOP/s by words of the device's name; of several that fit the longest counts
    "GB300": 2500.0, "B300": 2250.0, "GB200": 2500.0, "B200": 2250.0, "GH200": 989.0,
    "H200": 989.0, "H200 NVL": 835.0, "H100": 989.0, "H100 NVL": 835.0, "H100 PCIe": 756.0, "H800": 989.0,
    "H800 PCIe": 756.0, "H20": 148.0, "A100": 312.0, "A800": 312.0, "L40S": 362.0, "RTX 4090": 165.0, "MI300X": 1307.0,
}  # fmt: skip
GIB = 2**30


def peak_flops(device: torch.device, asked: float | None) -> float | None:
    """Peak FLOP/s of one device: `asked` (TFLOP/s), else from the table; None if unknown."""
    if asked is not None:
        return asked * 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return peak_of(name)


def peak_of(name: str) -> float | None:
    """Peak FLOP/s of a device of this name, as torch reports it."""
    fitting = [words for words in PEAKS if re.search(rf"\b{words}\b", name)]
    return 1e12 * PEAKS[max(fitting, key=len)] if fitting else None


class Throughput:
    """Turns the time of steps into metrics."""

    def __init__(
        self,
        model: JointConfig,
        layout: Layout,
        recomputed: Counter[tuple[str, str]],
        peak_tflops: float | None,
        epoch_samples: int,
        trained: Collection[str] = ALL,
    ) -> None:
        """`recomputed`: how many units of each shape are checkpointed in which way (train/parallel/recompute.py);
        `epoch_samples`: of one pass through the data; `trained`: the towers that are not frozen."""
        self._model, self._layout, self._epoch_samples = model, layout, epoch_samples
        self._trained = trained
        self._recomputed = recomputed
        self._peak = peak_flops(layout.device, peak_tflops)
        self._flops: dict[Bucket, tuple[int, int]] = {}

    def metrics(self, batch: Batch, seconds: float, seen: Seen) -> dict[str, float]:
        """Metrics of a step that took `seconds` of wall-clock time, for the global batch that `batch` is part of."""
        clips, ranks = batch.total_weight, self._layout.world
        bucket = batch.bucket
        if bucket not in self._flops:
            grid = (bucket.frames, bucket.height, bucket.width) if bucket.has_video else None
            audio_steps = bucket.audio_steps if bucket.has_audio else None
            needed = step_flops(self._model, grid, audio_steps, self._trained)
            self._flops[bucket] = needed, recomputed_flops(self._model, grid, audio_steps, self._recomputed)
        needed, again = self._flops[bucket]
        tokens = clips * tokens_of(bucket, self._model)
        found = {
            "perf/step_time": seconds,
            "perf/tokens_per_s": tokens / seconds,
            "perf/tokens_per_s_per_gpu": tokens / seconds / ranks,
            "perf/clips_per_s": clips / seconds,
            "perf/clips_per_s_per_gpu": clips / seconds / ranks,
            "data/samples": seen.samples,
            "data/hours": seen.seconds / 3600,
            "data/epoch": seen.samples / max(1, self._epoch_samples),
        }
        if self._peak is not None:
            one = clips / (seconds * ranks * self._peak)
            found["perf/mfu"] = needed * one
            found["perf/hfu"] = (needed + again) * one
        return found


def tokens_of(bucket: Bucket, model: JointConfig) -> int:
    """Video and audio tokens of one clip, for the modalities it has."""
    video = math.prod((bucket.frames, bucket.height, bucket.width)) // math.prod(model.video.patch_size)
    audio = bucket.audio_steps // model.audio.patch_size[0]
    return video * bucket.has_video + audio * bucket.has_audio


def recomputed_flops(
    config: JointConfig,
    grid: tuple[int, int, int] | None,
    audio_steps: int | None,
    units: Counter[tuple[str, str]],
) -> int:
    """FLOPs of one clip that backward recomputes. `units`: how many of a (shape, kind), both experts counted;
    `grid`, `audio_steps`: as of train.parallel.flops.forward_flops."""
    costs = {}  # by shape: products, attention, products that "outputs" keeps
    if grid is not None:
        tokens_v = math.prod(grid) // math.prod(config.video.patch_size)
        flops = block_flops(config.video, tokens_v, tokens_v, config.text_length)
        costs["video"] = *flops, block_outputs_flops(config.video, tokens_v)
    if audio_steps is not None:
        tokens_a = audio_steps // config.audio.patch_size[0]
        flops = block_flops(config.audio, tokens_a, tokens_a, config.text_length)
        costs["audio"] = *flops, block_outputs_flops(config.audio, tokens_a)
    if grid is not None and audio_steps is not None:
        sides = {"to_video": (tokens_v, config.video.dim), "to_audio": (tokens_a, config.audio.dim)}
        for (shape, x), y in zip(sides.items(), reversed(sides.values()), strict=True):
            costs[shape] = *bridge_flops(*x, *y), bridge_outputs_flops(x[1], *y)
    total = 0
    for (shape, kind), count in units.items():
        again = recomputed(kind, *costs.get(shape, (0, 0, 0)))
        total += count * again // (len(config.experts) if shape == "video" else 1)
    return total


def memory(device: torch.device) -> dict[str, float]:
    """GiB of this rank: on a GPU those of tensors and of the allocator, else the resident memory of the process."""
    if device.type == "cuda":
        return {
            "perf/memory_allocated_gib": torch.cuda.memory_allocated(device) / GIB,
            "perf/memory_peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
            "perf/memory_reserved_gib": torch.cuda.memory_reserved(device) / GIB,
        }
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"perf/memory_rss_gib": pages * os.sysconf("SC_PAGE_SIZE") / GIB}
