"""Every metric that a run writes, with its meaning: the table of docs/monitoring.md is made from this (`make tables`).

A word in braces stands for each of its values: `train/loss_{modality}` is train/loss_video and train/loss_audio.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import cache

from model.joint import EXPERTS
from train.monitor.counters import KINDS, USES
from train.monitor.kernel_kinds import KERNEL_KINDS
from train.objective.objective import NOISE_BINS
from train.parallel.parts import GROUPS, NAMES

VALUES: dict[str, tuple[str, ...]] = {
    "modality": ("video", "audio"),
    "expert": EXPERTS,
    "level": tuple(f"{index / NOISE_BINS:.1f}" for index in range(NOISE_BINS)),
    "group": tuple(GROUPS.values()),
    "part": NAMES,
    "axis": (*USES, "world"),
    "collective": tuple(dict.fromkeys(KINDS.values())),
    "kernel": KERNEL_KINDS,
}


@dataclass(frozen=True)
class Metric:
    """One row of the table: names that are written together; when: in which lines of metrics.jsonl they stand."""

    names: tuple[str, ...]
    meaning: str
    when: str = "every step"


PERIODIC = "`monitor.every`"
VALIDATION = "`validation.every`"

METRICS = (
    Metric(("train/loss",), "of the global batch, weighed as it is learned"),
    Metric(
        ("train/loss_{modality}",),
        "mean squared errors over the samples that have the modality; null where none has",
    ),
    Metric(("train/loss_{modality}_{expert}",), "the same, of the expert that the step trained"),
    Metric(
        ("train/loss_{modality}_noise_{level}",),
        "of the samples whose noise level (of this modality) is from `level` to 0.1 above it",
        "where there were any",
    ),
    Metric(("train/expert",), "`high` or `low`: the expert that the step trained"),
    Metric(("train/grad_norm",), "of the global gradient, before clipping"),
    Metric(
        ("train/grad_norm_{group}",),
        "by module group, before clipping, only of what took part: not of the idle expert, nor of what the clips lack",
        PERIODIC,
    ),
    Metric(("train/param_norm_{group}",), "norm of the weights by module group", PERIODIC),
    Metric(
        ("train/update_ratio_{group}",),
        "norm of AdamW's step, weight decay not counted, over norm of the weights (not with moments on the host)",
        PERIODIC,
    ),
    Metric(
        ("train/bridge_{modality}",),
        "norm of what the Bridge adds over norm of the stream that it is added to, all blocks together; where it ran",
        PERIODIC,
    ),
    Metric(("train/lr_tower", "train/lr_bridge"), "learning rates"),
    Metric(("train/lr_{part}",), "learning rates of [parts](parts.md) that have their own"),
    Metric(("train/scale_{modality}",), "what the errors were multiplied by", "every step with `objective.balance`"),
    Metric(("train/skipped",), "1 where the update was suppressed as a spike", "then"),
    Metric(("perf/step_time",), "seconds from step to step, including what lay between"),
    Metric(("perf/tokens_per_s", "perf/clips_per_s"), "of the run"),
    Metric(("perf/tokens_per_s_per_gpu", "perf/clips_per_s_per_gpu"), "the same over the number of ranks"),
    Metric(("perf/mfu", "perf/hfu"), "see below", "where the peak is known"),
    Metric(
        ("perf/planned_step_time", "perf/planned_memory_gib", "perf/planned_mfu", "perf/planned_{kernel}_time"),
        "what `mova plan` predicted, where the run's folder holds its plan.json",
        PERIODIC,
    ),
    Metric(
        ("perf/profiled_{kernel}_time",),
        "seconds of a step in which kernels of this kind ran on the first rank (on CPUs: operators), beside each other "
        "on several streams",
        "after a profile (`inspect.at`)",
    ),
    Metric(("perf/data_wait",), "seconds of the step in which the first rank waited for its batch"),
    Metric(
        ("perf/comm_wait",),
        "seconds in which the first rank waited for the sums of the step before: on CPUs for the other ranks; on GPUs "
        "also for its own device, which is then the slower of the two",
    ),
    Metric(("perf/checkpoint_stall",), "seconds of this step's time that a checkpoint took", "then"),
    Metric(("perf/validation_stall",), "seconds of this step's time that a validation took", "then"),
    Metric(
        ("perf/garbage_stall",),
        "seconds of this step's time that Python's garbage collection took (every `guard.gc_every` steps on all ranks "
        "at once)",
        "then",
    ),
    Metric(
        ("perf/memory_allocated_gib", "perf/memory_peak_gib", "perf/memory_reserved_gib"),
        "of the first rank's GPU",
        PERIODIC,
    ),
    Metric(("perf/memory_rss_gib",), "resident memory of the first rank's process, on CPUs", PERIODIC),
    Metric(
        ("perf/slow_ranks",),
        "ranks that are slower than the others ([recovery](recovery.md))",
        "`guard.straggler_every`, where there are any",
    ),
    Metric(
        ("perf/compiled_graphs",),
        "graphs that have been compiled ([parallelism](parallelism.md))",
        "every step with `parallel.compile`",
    ),
    Metric(
        ("perf/eager_units",),
        "blocks and Bridge directions without a compiled graph ([parallelism](parallelism.md))",
        "every step with `parallel.compile`",
    ),
    Metric(
        ("perf/comm/{axis}/{collective}_bytes", "perf/comm/{axis}/{collective}_calls"),
        "what the first rank sends over a mesh axis, and in how many calls ([parallelism](parallelism.md))",
        "`monitor.count_collectives`",
    ),
    Metric(
        ("data/samples", "data/hours", "data/epoch"),
        "seen since the run began: samples, hours of clips, passes through the data",
    ),
    Metric(("data/empty_captions",), "samples since the run began that no captioner of the mix had a caption for"),
    Metric(("valid/loss",), "at fixed noise, modalities weighed as in training", VALIDATION),
    Metric(
        ("valid/{modality}", "valid/{modality}_{expert}"),
        "the same by modality, of all noise levels and of each expert's, over the samples that have the modality; left "
        "out where none has",
        VALIDATION,
    ),
    Metric(
        ("valid/ema/loss", "valid/ema/{modality}", "valid/ema/{modality}_{expert}"),
        "the same from the averaged weights, where `ema.decay` is above 0",
        VALIDATION,
    ),
)


@cache
def known_names() -> frozenset[str]:
    """Every name that METRICS describes, words in braces replaced by each of their values."""
    return frozenset(full for metric in METRICS for name in metric.names for full in _spelled_out(name))


def _spelled_out(name: str) -> list[str]:
    words = re.findall(r"{(\w+)}", name)
    choices = itertools.product(*(VALUES[word] for word in words))
    return [name.format(**dict(zip(words, chosen, strict=True))) for chosen in choices]
