"""Steps per second and peak memory of one process, beside the floor: the model's FLOPs at the measured matmul rate.

    python -m tools.bench.step model=small                  # writes bench/step-small.md

Keys: model (a file of conf/model), batch (clips a step), steps (timed, after 2 for warming up), output (folder).
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import hydra
import numpy as np
import torch
import torch.distributed as dist
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, DictConfig, OmegaConf

from data.batch import Batch
from data.clip import Bucket
from model.joint import JointConfig
from tools.bench.record import write_record
from train.feed import Prepared
from train.flops import forward_flops
from train.mesh import ParallelConfig, make_layout, start_process_group
from train.noise import draw
from train.objective import Objective, ObjectiveConfig
from train.optim import OptimConfig, ShardedOptimizer
from train.parallelize import build_model
from train.step import forward_backward

CLIP = Bucket(
    frames=13, height=8, width=8, audio_steps=103, fps=24.0, has_video=True, has_audio=True
)  # 49 frames, 64 px


@dataclass
class StepBench:
    """What is measured."""

    model: JointConfig = MISSING
    batch: int = 4
    steps: int = 10
    output: str = "bench"


def make_batch(config: JointConfig, clips: int, step: int, objective: Objective) -> Prepared:
    """Random latents of the quickstart's geometry: 49 frames of 64 x 64 pixels with 2 s of sound."""
    g = torch.Generator().manual_seed(step)
    rand = lambda *shape: torch.randn(*shape, generator=g).bfloat16()  # noqa: E731
    ones, grid = torch.ones(clips), (CLIP.frames, CLIP.height, CLIP.width)
    batch = Batch(
        step=step, bucket=CLIP, keys=[""] * clips, sample_numbers=np.arange(clips) + clips * step,
        video=rand(clips, 16, *grid), audio=rand(clips, config.audio.in_dim, CLIP.audio_steps),
        condition=rand(clips, 20, *grid), text=rand(clips, config.text_length, config.video.text_dim),
        empty_text=rand(config.text_length, config.video.text_dim),
        weight=ones, video_weight=ones, audio_weight=ones, total_weight=float(clips),
    )  # fmt: skip
    return Prepared(batch, draw(batch, objective, seed=0))


def matmul_rate(seconds: float = 2.0) -> float:
    """Best FLOP/s of a float32 product of 1024 x 1024 matrices within a time."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - begin)
    return 2 * 1024**3 / best


def peak_memory() -> float:
    """Largest resident memory of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(bench: StepBench) -> list[tuple[str, str]]:
    """Run the steps; returns the table."""
    config = bench.model
    layout = make_layout(ParallelConfig(), start_process_group())
    before = peak_memory()
    objective = Objective(ObjectiveConfig(), config.experts)
    model = build_model(config, ParallelConfig(), layout, seed=0)
    optimizer = ShardedOptimizer(model, OptimConfig(), layout.shard_group)
    times = []
    for step in range(bench.steps + 2):
        prepared = make_batch(config, bench.batch, step, objective)
        begin = time.perf_counter()
        forward_backward(model, [prepared], objective.config, objective.expert(step), layout)
        optimizer.step(1.0, optimizer.global_norm())
        if step >= 2:
            times.append(time.perf_counter() - begin)
    flops = 3 * bench.batch * forward_flops(config, (CLIP.frames, CLIP.height, CLIP.width), CLIP.audio_steps).total
    rate = matmul_rate()
    dist.destroy_process_group()
    median, floor = statistics.median(times), flops / rate
    parameters = sum(p.numel() for p in model.parameters())
    tokens = bench.batch * (CLIP.frames * CLIP.height * CLIP.width // 4 + CLIP.audio_steps)
    state = parameters * 16 / 2**30
    return [
        ("parameters", f"{parameters:,}"),
        ("clips, tokens a step", f"{bench.batch}, {tokens:,}"),
        ("step time, median (min to max)", f"{median:.3f} s ({min(times):.3f} to {max(times):.3f})"),
        ("steps a second", f"{1 / median:.2f}"),
        ("model FLOPs a step", f"{flops / 1e12:.3f} TFLOP"),
        ("measured matmul rate, float32", f"{rate / 1e9:.0f} GFLOP/s"),
        ("floor: FLOPs at that rate", f"{floor:.3f} s a step"),
        ("step time over floor", f"{median / floor:.2f}"),
        ("peak memory of the process", f"{peak_memory():.2f} GiB, {before:.2f} GiB of it before the model was made"),
        ("floor of memory: weights, gradients, moments of all parameters", f"{state:.2f} GiB"),
    ]


@hydra.main(version_base=None, config_path="pkg://conf", config_name="bench_step")
def main(config: DictConfig) -> None:
    """Entry point."""
    bench = OmegaConf.to_object(config)
    assert isinstance(bench, StepBench)
    rows, name = measure(bench), HydraConfig.get().runtime.choices["model"]
    path = Path(bench.output) / f"step-{name}.md"
    command = f"python -m tools.bench.step {' '.join(sys.argv[1:])}".strip()
    write_record(path, f"A training step of `{name}` on one process", command, rows, NOTES)
    print("\n".join(f"{what}: {value}" for what, value in rows) + f"\nwritten to {path}")


NOTES = (
    "Forward, backward, clipping and AdamW through the same functions that training uses (FSDP2 on a mesh of one), "
    "random latents in memory. FLOPs: 3 x forward, formula in `train/flops.py`."
)


if __name__ == "__main__":
    ConfigStore.instance().store(name="bench_step_schema", node=StepBench)
    main()
