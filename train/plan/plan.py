"""What a training run will need: memory, time, money, storage; counted on the real program and timed by a model.

    plan = plan_run(question)
    plan.fits, plan.peak.total, plan.step.seconds, plan.as_dict()

Counted exactly: FLOPs, bytes moved, kernels, memory of live tensors, bytes sent, files, size of a checkpoint.
Modelled: seconds (train/plan/timing.py) and what follows from them. Assumed values stand in Assumptions and in the
sheet's sources.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from core.errors import RunError
from data.codec.mova.flops import condition_flops, encode_flops
from model.joint import JointConfig, JointTransformer
from train.config import TrainConfig
from train.engine.zero_memory import zero_bytes
from train.monitor.throughput import recomputed_flops
from train.optimizer.adamw import AdamW
from train.parallel.descriptors import descriptors_needed
from train.parallel.flops import step_flops
from train.parallel.host_memory import host_bytes_of
from train.parallel.mesh import Layout, ParallelConfig, check_degrees, make_layout
from train.parallel.parallelize import recompute_kinds, recomputed_units
from train.parallel.parts import freeze, tower_of, trained_towers
from train.parallel.traffic import step_bytes
from train.parallel.workload import Workload
from train.plan.count import Counts, count_step, simulated_ranks
from train.plan.memory import Peak, Weights, kept_bytes, largest_moment
from train.plan.question import ClipSize, Question
from train.plan.stages import flops_by_kind, predict_step, stages
from train.plan.timing import Clock, StepTime, bound

GIB = 2**30
DAY = 86400.0
PIECE = 91  # bytes of a checkpoint's .metadata for each piece of a tensor (bench/results/checkpoint-plan.md)
MEMORY_OF_CONDITION = 29  # latent frames of Wan's VAE (docs/encoders.md)


@dataclass(frozen=True)
class Plan:
    """The answer. memory: the parts of `peak` with slack and what is reserved; days: by what they are spent on; sent:
    bytes of a rank and step by mesh axis; what: {name: value} of everything else that as_dict holds."""

    question: Question
    layout: dict[str, Any]
    peak: Peak
    memory: dict[str, int]
    step: StepTime
    mfu: float
    hfu: float
    days: dict[str, float]
    sent: dict[str, float]
    host: dict[str, int]
    checkpoint: dict[str, int]
    what: dict[str, Any]

    @property
    def fits(self) -> bool:
        """Whether the memory of a GPU suffices."""
        return sum(self.memory.values()) <= self.question.gpu.memory_gib * GIB

    @property
    def total_days(self) -> float:
        """To the end of the run."""
        return sum(self.days.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        question = self.question
        total = self.total_days
        price = question.assumed.price
        return {
            "fits": self.fits,
            "peak_gib": _total({name: size / GIB for name, size in self.memory.items()}),
            "memory_gib": question.gpu.memory_gib,
            "step_seconds": {"total": self.step.seconds, "parts": self.step.parts},
            "kernel_seconds": self.step.busy,
            "mfu": self.mfu,
            "hfu": self.hfu,
            "days": _total(self.days),
            "gpu_days": total * question.world,
            "clips_per_day": question.config.data.batch_size * question.steps / total,
            "host_gib": _total({name: size / GIB for name, size in self.host.items()}),
            "checkpoint_gib": _total({name: size / GIB for name, size in self.checkpoint.items()}),
            "sent_gb": {axis: size / 1e9 for axis, size in self.sent.items()},
            "cost": None if price is None else price * 24 * total * question.world,
            "gpus": question.world,
            "gpu": question.gpu.title,
            "rate": question.rate,
            "steps": question.steps,
            "layout": self.layout,
            "fullest_moment": self.peak.when,
            **self.what,
        }


def _total(parts: dict[str, float]) -> dict[str, Any]:
    return {"total": sum(parts.values()), "parts": parts}


Key = tuple[int, int, tuple[str, str, str, str], Workload, bool]


@dataclass
class KnownCounts:
    """What was counted for one model and choice of trained parts, for further layouts of it: by what counts depend on,
    and kind of checkpointing. lines: whether kernels are counted by line of the program too."""

    known: dict[Key, dict[str, Counts]] = field(default_factory=dict)
    weights: dict[Any, Weights] = field(default_factory=dict)
    host: dict[Any, dict[str, int]] = field(default_factory=dict)
    model: JointTransformer | None = None
    lines: bool = False

    def of(
        self, model: JointConfig, parallel: ParallelConfig, workload: Workload, kinds: Collection[str], gpu: bool
    ) -> dict[str, Counts]:
        """The counts with each of these kinds of checkpointing."""
        key = key_of(parallel, workload, gpu)
        found = self.known.setdefault(key, {})
        if missing := [kind for kind in sorted(kinds) if kind not in found]:
            found |= count_step(model, parallel, key[3], missing, gpu, self.lines)
        return {kind: found[kind] for kind in kinds}


def key_of(parallel: ParallelConfig, workload: Workload, gpu: bool) -> Key:
    """What counts of a model depend on, beside the kind of checkpointing."""
    units = parallel.compute_dtype, parallel.residual, parallel.linear, parallel.compile
    return parallel.ring, parallel.ulysses, units, dataclasses.replace(workload, micro_batches=1), gpu


@contextmanager
def simulated_layout(parallel: ParallelConfig, world: int) -> Iterator[Layout]:
    """The layout of rank 0 of so many, while its sequence-parallel group is there. RunError when the degrees do not
    fit."""
    replicate, shard, ring, ulysses = check_degrees(parallel, world)
    with simulated_ranks(ring * ulysses):
        alone = make_layout(dataclasses.replace(parallel, dp_replicate=1, dp_shard=1), torch.device("cpu"))
        yield dataclasses.replace(alone, dp_replicate=replicate, dp_shard=shard)


def plan_run(question: Question, counted: KnownCounts | None = None) -> Plan:
    """Count and time one step of the question's layout, and what follows. RunError for a layout that is impossible."""
    counted = counted or KnownCounts()
    config, world = question.config, question.world
    parallel = resolved(config.parallel, question.on_gpus)
    model = counted.model = counted.model or _meta_model(config)
    _refuse(question, parallel, model)
    with simulated_layout(parallel, world) as layout:
        workload = workload_of(question, layout)
        kinds = recompute_kinds(model, parallel, layout, workload)
        sent = step_bytes(model, parallel, layout, workload, kinds)
    counts = counted.of(config.model, parallel, workload, set(kinds), question.on_gpus)
    average, trained = config.ema.decay > 0, trained_towers(config.optim.train, config.model.experts)
    sharing = (layout.world // layout.dp_replicate, layout.compute, parallel.optimizer_state, tuple(kinds), average)
    if sharing not in counted.weights:
        counted.weights[sharing] = Weights(model, parallel, layout, kinds, average, trained, len(AdamW.KEYS))
    weights = counted.weights[sharing]
    peak = largest_moment(weights, counts, parallel, workload.micro_batches)
    clock = Clock(question.gpu, question.rate)
    both = stages(weights, counts, layout)
    step = predict_step(clock, weights, both, parallel, layout, workload.micro_batches, average)
    clips = workload.clips * workload.micro_batches
    grid, sound, ranks = workload.grid, workload.audio_steps, layout.sequence.size
    needed = clips * step_flops(config.model, grid, sound, trained) / ranks
    recomputed = recomputed_units(model, parallel, layout, workload)
    again = clips * recomputed_flops(config.model, grid, sound, recomputed) / ranks
    utilized = step.seconds * question.gpu.peak_tflops * 1e12
    kernel_flops = flops_by_kind(both[0] + both[1])
    checkpoint = _checkpoint(weights, average)
    stall = sum(checkpoint.values()) / weights.shards / (question.assumed.save_gb_s * 1e9)
    days, interval = _days(question, workload, step.seconds, stall, average)
    tensors, pieces = weights.saved
    what = _facts(question, workload, step, stall) | {
        "model_flops": needed,
        "kernels": sum(kernel.times for part in both for stage in part for kernel in stage.kernels)
        * workload.micro_batches,
        "kernel_flops": {kind: workload.micro_batches * flops for kind, flops in kernel_flops.items()},
        "kept_gib": kept_bytes(weights, counts) / GIB,
        "host_seconds": step.host,
        "device_seconds": step.device,
        "bound_seconds": workload.micro_batches * bound(kernel_flops, question.gpu),
        "micro_batches": workload.micro_batches,
        "parameters": weights.parameters,
        "checkpoint_stall_seconds": stall,
        "checkpoint_interval_seconds": interval,
        "best_interval_seconds": max(step.seconds, math.sqrt(2 * stall * _between_failures(question))),
        "failure_seconds": _between_failures(question),
        "goodput": days["training"] / sum(days.values()),
        "checkpoint_tensors": tensors,
        "checkpoint_pieces": pieces,
        "checkpoint_metadata_mb": pieces * PIECE / 1e6,
        "video_tokens": workload.video_tokens(config.model),
        "zero_least_gib": zero_gib(question, model),
    }
    return Plan(
        question=question,
        layout=_layout(config.parallel, parallel.compute_dtype, layout, kinds, config.data.micro_batch),
        peak=peak,
        memory=_memory(peak, question),
        step=step,
        mfu=needed / utilized,
        hfu=(needed + again) / utilized,
        days=days,
        sent=sent,
        host=_host(question, counted, parallel, average, trained),
        checkpoint=checkpoint,
        what=what,
    )


def _refuse(question: Question, parallel: ParallelConfig, model: JointTransformer) -> None:
    """RunError for what is not modelled."""
    if parallel.engine != "fsdp2":
        least = zero_gib(question, model).get(parallel.engine)
        needs = f"it holds at least {least:.1f} GiB on each GPU before any activation; " if least else ""
        raise RunError(
            f"parallel.engine={parallel.engine} can't be planned: the time model has FSDP2's streams, not DeepSpeed's "
            f"buckets; {needs}plan parallel.engine=fsdp2"
        )
    if question.on_gpus and parallel.compute_dtype != "bfloat16":
        raise RunError(
            f"parallel.compute_dtype={parallel.compute_dtype} can't be planned for a GPU: its sheet has the rates of "
            "bfloat16; plan parallel.compute_dtype=bfloat16"
        )
    if question.on_gpus and question.config.parallel.linear == "float8_emulated":
        raise RunError(
            "parallel.linear=float8_emulated can't be planned for a GPU: it is there to try roundings; plan "
            "parallel.linear=float8"
        )
    if question.config.parallel.linear == "float8" and question.gpu.float8_gemm_tflops is None:
        raise RunError(
            f"parallel.linear=float8 can't be planned for {question.gpu.title}: its sheet has no float8_gemm_tflops; "
            "plan parallel.linear=compute, or give that rate (gpu.float8_gemm_tflops)"
        )


def zero_gib(question: Question, model: JointTransformer) -> dict[str, float]:
    """GiB that ZeRO 1 and 2 hold on each GPU before any activation."""
    config, element = question.config, 2 if question.on_gpus else 4
    trained = trained_towers(config.optim.train, config.model.experts)
    sizes: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        sizes[tower_of(name)] += parameter.numel()
    learned = sum(size for tower, size in sizes.items() if tower in trained)
    idle = sizes["video_dit"] if {"video_dit", "video_dit_2"} <= trained & sizes.keys() else 0
    return {
        f"zero{stage}": sum(
            zero_bytes(stage, sizes.total(), learned - idle, question.world, element, config.ema.decay > 0,
                       AdamW, learned).values()
        ) / GIB
        for stage in (1, 2)
    }  # fmt: skip


def workload_of(question: Question, layout: Layout) -> Workload:
    """What a rank has before it in a step. RunError where the batch is smaller than the groups that share it."""
    data = question.config.data
    if data.batch_size < layout.dp_world:
        raise RunError(
            f"data.batch_size={data.batch_size} is less than the {layout.dp_world} groups of ranks that get clips of "
            "their own; let more ranks share a clip (parallel.ulysses, parallel.ring), or take a larger batch"
        )
    slots = -(-data.batch_size // layout.dp_world)
    clips = min(data.micro_batch, slots)
    return Workload(clips, question.clip.grid, question.clip.audio_steps, -(-slots // clips))


def resolved(parallel: ParallelConfig, on_gpus: bool) -> ParallelConfig:
    """With the dtype that `auto` takes there, and an attention and float8 that a machine without GPUs has too; of GPUs
    their kernels are counted all the same (train/plan/kernels.py)."""
    dtype = parallel.compute_dtype
    if dtype == "auto":
        dtype = "bfloat16" if on_gpus else "float32"
    linear = "float8_emulated" if parallel.linear == "float8" else parallel.linear
    return dataclasses.replace(parallel, compute_dtype=dtype, attention="auto", linear=linear)


def _meta_model(config: TrainConfig) -> JointTransformer:
    with torch.device("meta"):
        model = JointTransformer(config.model)
    freeze(model, trained_towers(config.optim.train, config.model.experts))
    return model


def _layout(
    parallel: ParallelConfig, compute: str, layout: Layout, kinds: list[str], micro_batch: int
) -> dict[str, Any]:
    found = {
        "engine": parallel.engine,
        "dp_replicate": layout.dp_replicate,
        "dp_shard": layout.dp_shard,
        "ring": layout.sequence.ring,
        "ulysses": layout.sequence.ulysses,
        "recompute": parallel.recompute,
        "recompute_gib": parallel.recompute_gib,
        "accumulate": parallel.accumulate,
        "optimizer_state": parallel.optimizer_state,
        "compute_dtype": compute,
        "residual": parallel.residual,
        "linear": parallel.linear,
        "micro_batch": micro_batch,
    }
    return found | {"units": {kind: kinds.count(kind) for kind in sorted(set(kinds))}}


def _memory(peak: Peak, question: Question) -> dict[str, int]:
    """The parts of the peak, and the margin that is assumed."""
    if not question.on_gpus:
        return dict(peak.parts)
    margin = int(question.assumed.slack * peak.total)
    reserved = int(question.assumed.reserved_gib * GIB)
    return peak.parts | {"allocator, workspaces": margin, "CUDA, NCCL": reserved}


def _host(
    question: Question, counted: KnownCounts, parallel: ParallelConfig, average: bool, trained: Collection[str]
) -> dict[str, int]:
    """Of one node: pinned copies, moments on the host, and the processes themselves."""
    assert counted.model is not None
    sharing = (check_degrees(parallel, question.world)[0], question.world, parallel.optimizer_state, average)
    if sharing not in counted.host:
        counted.host[sharing] = host_bytes_of(counted.model, parallel, question.world, average, trained=trained)
    one = counted.host[sharing]
    found = {name: size * question.per_node for name, size in one.items() if size}
    return found | {"processes": int(4 * GIB) * question.per_node}


def _checkpoint(weights: Weights, average: bool) -> dict[str, int]:
    """A whole checkpoint, by what it holds."""
    learned = weights.wide * weights.learned
    parts = {
        "weights": weights.wide * weights.parameters,
        "moments": len(AdamW.KEYS) * learned,
        "average": average * learned,
    }
    return {name: size for name, size in parts.items() if size}


def _days(
    question: Question, workload: Workload, seconds: float, stall: float, average: bool
) -> tuple[dict[str, float], float]:
    """(days of the run by what they are spent on, seconds between checkpoints)."""
    config, assumed = question.config, question.assumed
    training = question.steps * seconds
    found = {"training": training}
    if config.validation.every and config.data.valid_path is not None:
        visits = question.steps / config.validation.every
        forward = seconds / 3 * config.validation.samples / config.data.batch_size
        found["validation"] = visits * forward * (1 + average)
    intervals = [config.checkpoint.minutes * 60, config.checkpoint.every * seconds]
    interval = max(min((one for one in intervals if one), default=training), seconds)
    found["checkpoints"] = training * stall / max(interval, stall)
    lost = min(interval, training) / 2 + assumed.restart_minutes * 60
    found["failures"] = sum(found.values()) * lost / _between_failures(question)
    return {name: spent / DAY for name, spent in found.items()}, interval


def _between_failures(question: Question) -> float:
    """Seconds of the run between failures of any of its GPUs."""
    return question.assumed.failure_hours * 3600 / question.world


def _facts(question: Question, workload: Workload, step: StepTime, stall: float) -> dict[str, Any]:
    """Data: what is read and stored, and encoded before."""
    config, clip = question.config, question.clip
    stored = clip_bytes(config.model, clip)
    batch = config.data.batch_size
    clips = question.steps * batch
    flops = encode_flops(clip.frames, clip.height, clip.width)
    flops += condition_flops(clip.frames, clip.height, clip.width, MEMORY_OF_CONDITION)
    return {
        "read_gb_per_s": {
            "total": sum(stored.values()) * batch / step.seconds / 1e9,
            "parts": {name: size * batch / step.seconds / 1e9 for name, size in stored.items()},
        },
        "clip_mb": {"total": sum(stored.values()) / 1e6, "parts": {name: size / 1e6 for name, size in stored.items()}},
        "clips": clips,
        "video_hours": clips * clip.seconds / 3600,
        "storage_tb": clips * sum(stored.values()) / 1e12,
        "encoding_gpu_hours": clips * flops / (question.assumed.encoder_tflops * 1e12) / 3600,
        "file_descriptors": descriptors_needed(question.world),
    }


def clip_bytes(model: JointConfig, clip: ClipSize) -> dict[str, int]:
    """Bytes of one clip in a shard, in bfloat16; text at its longest."""
    frames, height, width = clip.grid
    return {
        "video": 2 * 16 * frames * height * width,
        "condition": 2 * 16 * min(frames, MEMORY_OF_CONDITION + 1) * height * width,
        "audio": 2 * model.audio.in_dim * clip.audio_steps,
        "text": 2 * model.text_length * model.video.text_dim,
    }
