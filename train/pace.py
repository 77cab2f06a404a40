"""What a step's host-side metrics are made of: speed, use of the hardware, memory, how much data was seen.

MFU counts the FLOPs of the model alone (train/flops.py: 3 x forward of each clip that counts), HFU those that are
computed again too, both against the peak of the dense bfloat16 unit. docs/monitoring.md has the formula.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from data.batch import Batch
from data.clip import Bucket
from model.joint import JointConfig
from train.flops import Flops, block_flops, bridge_flops, forward_flops
from train.mesh import Layout

PEAKS = {  # dense bfloat16 TFLOP/s by a part of the device's name; the first that fits counts
    "B200": 2250.0, "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "H800": 989.0, "H20": 148.0, "A100": 312.0,
    "A800": 312.0, "L40S": 362.0, "RTX 4090": 165.0, "MI300X": 1307.0,
}  # fmt: skip
GIB = 2**30


class Seen(NamedTuple):
    """What a run has trained on so far. Belongs to the checkpoint."""

    samples: int = 0
    seconds: float = 0.0  # of clips

    def after(self, batch: Batch) -> Seen:
        """With the global batch of which `batch` is a part."""
        count = round(batch.total_weight)
        return Seen(self.samples + count, self.seconds + count * clip_seconds(batch.bucket))


def clip_seconds(bucket: Bucket) -> float:
    """Length of a bucket's clips: the first latent frame is one frame, each other one four."""
    return (1 + 4 * (bucket.frames - 1)) / bucket.fps


def peak_flops(device: torch.device, asked: float | None) -> float | None:
    """Peak FLOP/s of one device: `asked` (TFLOP/s), else of the table; None where nobody knows."""
    if asked is not None:
        return asked * 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((tera * 1e12 for part, tera in PEAKS.items() if part in name), None)


class Pace:
    """Turns the time of steps into metrics."""

    def __init__(
        self,
        model: JointConfig,
        layout: Layout,
        recomputed: Counter[tuple[str, str]],
        peak_tflops: float | None,
        epoch_samples: int,
    ) -> None:
        """`recomputed`: how many units of each shape are checkpointed in which way (train/recompute.py);
        `epoch_samples`: of one pass through the data."""
        self._model, self._layout, self._epoch_samples = model, layout, epoch_samples
        self._recomputed = recomputed
        self._peak = peak_flops(layout.device, peak_tflops)
        self._flops: dict[Bucket, tuple[Flops, int]] = {}

    def metrics(self, batch: Batch, seconds: float, seen: Seen) -> dict[str, float]:
        """Of a step that took `seconds`, by wall clock, for the global batch of which `batch` is a part."""
        clips, ranks = batch.total_weight, self._layout.world
        bucket = batch.bucket
        if bucket not in self._flops:
            grid = (bucket.frames, bucket.height, bucket.width)
            forward = forward_flops(self._model, grid, bucket.audio_steps)
            self._flops[bucket] = forward, recomputed_flops(self._model, grid, bucket.audio_steps, self._recomputed)
        forward, again = self._flops[bucket]
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
            found["perf/mfu"] = 3 * forward.total * one
            found["perf/hfu"] = (3 * forward.total + again) * one
        return found


def tokens_of(bucket: Bucket, model: JointConfig) -> int:
    """Video and audio tokens of one clip."""
    video = bucket.frames * bucket.height * bucket.width
    for size in model.video.patch_size:
        video //= size
    return video + bucket.audio_steps // model.audio.patch_size[0]


def recomputed_flops(
    config: JointConfig, grid: tuple[int, int, int], audio_steps: int, units: Counter[tuple[str, str]]
) -> int:
    """FLOPs of one clip that backward computes again. `units`: how many of a (shape, kind), both experts counted."""
    tokens_v, tokens_a = grid[0] * grid[1] * grid[2], audio_steps // config.audio.patch_size[0]
    for size in config.video.patch_size:
        tokens_v //= size
    costs = {
        "video": block_flops(config.video, tokens_v, tokens_v, config.text_length),
        "audio": block_flops(config.audio, tokens_a, tokens_a, config.text_length),
        "to_video": bridge_flops(tokens_v, config.video.dim, tokens_a, config.audio.dim),
        "to_audio": bridge_flops(tokens_a, config.audio.dim, tokens_v, config.video.dim),
    }
    total = 0
    for (shape, kind), count in units.items():
        products, attention = costs[shape]
        again = {"none": 0, "full": products + attention, "selective": products}[kind]
        total += count * again // (len(config.experts) if shape == "video" else 1)
    return total


def memory(device: torch.device) -> dict[str, float]:
    """GiB of this rank: what tensors take and what the allocator holds on a GPU, else what the process has resident."""
    if device.type == "cuda":
        return {
            "perf/memory_allocated_gib": torch.cuda.memory_allocated(device) / GIB,
            "perf/memory_peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
            "perf/memory_reserved_gib": torch.cuda.memory_reserved(device) / GIB,
        }
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"perf/memory_rss_gib": pages * os.sysconf("SC_PAGE_SIZE") / GIB}
