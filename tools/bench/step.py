"""Step time and peak memory of one process, compared with the floor: the model's FLOPs at the measured matmul rate.

mova bench step model=small   # writes bench/results/step-small.md
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import MISSING
from torch import Tensor

from core.compose import Schema
from core.program import Call, Program
from data.batch import Batch
from data.clip import Bucket
from model.joint import JointConfig
from tools.bench.record import write_record
from train.engine.engine import build_engine
from train.engine.optim import ShardedOptimizer
from train.engine.optim_config import OptimConfig
from train.monitor.counters import CollectiveCounter
from train.objective.noise import Prepared, draw
from train.objective.objective import Objective, ObjectiveConfig
from train.parallel.flops import forward_flops
from train.parallel.mesh import Layout, ParallelConfig, make_layout, start_process_group
from train.parallel.parallelize import build_model
from train.step import forward_backward

CLIP = Bucket(
    frames=13, height=8, width=8, audio_steps=103, fps=24.0, has_video=True, has_audio=True
)  # 49 frames, 64 px


@dataclass
class StepBench:
    """The steps of the measurement.

    batch: clips per step
    steps: number of timed steps
    output: folder of the record
    """

    model: JointConfig = MISSING
    batch: int = 4
    steps: int = 10
    output: str = "bench/results"


def make_batch(config: JointConfig, clips: int, step: int, objective: Objective, clip: Bucket = CLIP) -> Prepared:
    """Random latents of one geometry, the quickstart's by default: 49 frames of 64 x 64 pixels with 2 s of sound."""
    g = torch.Generator().manual_seed(step)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).bfloat16()

    ones, grid = torch.ones(clips), (clip.frames, clip.height, clip.width)
    batch = Batch(
        step=step, bucket=clip, keys=[""] * clips, sample_numbers=np.arange(clips) + clips * step,
        video=rand(clips, 16, *grid), audio=rand(clips, config.audio.in_dim, clip.audio_steps),
        condition=rand(clips, 20, *grid), text=rand(clips, config.text_length, config.video.text_dim),
        empty_text=rand(config.text_length, config.video.text_dim),
        weight=ones, video_weight=ones, audio_weight=ones, total_weight=float(clips),
    )  # fmt: skip
    return Prepared(batch, draw(batch, objective, seed=0))


def timed_steps(
    config: JointConfig,
    parallel: ParallelConfig,
    clips: int,
    steps: int,
    experts: Sequence[str] = ("high",),
    counter: Callable[[Layout], CollectiveCounter] = CollectiveCounter,
) -> tuple[list[float], list[CollectiveCounter]]:
    """Train as a rank of a process group that there is. Returns the seconds of `steps` steps, whose experts take turns,
    and a counter of one step of each expert. Before them come two of each to warm up, the second of which are counted.
    """
    layout = make_layout(parallel, torch.device("cpu"))
    objective = Objective(ObjectiveConfig(), config.experts)
    engine = build_engine(config, parallel, OptimConfig(), layout, seed=0)
    times: list[float] = []
    counters: list[CollectiveCounter] = []
    warm = 2 * len(experts)
    for step in range(warm + steps):
        expert = experts[step % len(experts)]
        prepared = make_batch(config, clips, step, objective)
        if len(experts) <= step < warm:
            counters.append(counter(layout))
        dist.barrier()
        begin = time.perf_counter()
        with counters[-1] if len(experts) <= step < warm else nullcontext():
            forward_backward(engine.model, [prepared], objective.config, expert, layout, engine.backward)
            engine.step(1.0, expert)
        if step >= warm:
            times.append(time.perf_counter() - begin)
    return times, counters


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
        ("clips, tokens per step", f"{bench.batch}, {tokens:,}"),
        ("step time, median (min to max)", f"{median:.3f} s ({min(times):.3f} to {max(times):.3f})"),
        ("steps per second", f"{1 / median:.2f}"),
        ("model FLOPs per step", f"{flops / 1e12:.3f} TFLOP"),
        ("measured matmul rate, float32", f"{rate / 1e9:.0f} GFLOP/s"),
        ("floor: FLOPs at that rate", f"{floor:.3f} s a step"),
        ("step time over floor", f"{median / floor:.2f}"),
        (
            "peak memory of the process",
            f"{peak_memory():.2f} GiB, of which {before:.2f} GiB before the model was built",
        ),
        ("floor of memory: weights, gradients, moments of all parameters", f"{state:.2f} GiB"),
    ]


def run(call: Call[StepBench]) -> None:
    """Measure and write the record."""
    bench = call.config
    rows, name = measure(bench), call.choices["model"]
    path = Path(bench.output) / f"step-{name}.md"
    write_record(path, f"A training step of `{name}` on one process", call.command, rows, NOTES)


NOTES = (
    "Forward, backward, clipping and AdamW through the same functions that training uses (one rank), "
    "random latents in memory. FLOPs: 3 x forward, formula in `train/parallel/flops.py`."
)


PROGRAM = Program("bench step", __doc__, run, schema=Schema("bench_step", StepBench, (("model", "small"),)))

if __name__ == "__main__":
    PROGRAM.start()
