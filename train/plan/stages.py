"""The stages of a step (train/plan/timing.py) from the counts of its units and the sizes of their weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from train.optimizer.adamw import AdamW
from train.parallel.mesh import Layout, ParallelConfig
from train.parallel.recompute import KEPT
from train.plan.count import REST, Counts, Pass
from train.plan.kernels import Op
from train.plan.memory import UnitPart, Weights, blocks
from train.plan.timing import HOST_COPY, Clock, Exchange, Kernel, Links, Stage, StepTime, simulate

# Bytes that move for each weight of a shard: AdamW reads weight, gradient and two moments and writes three of them in
# float32, the norm and the clipping read the gradient again and write it; an average is read with its weight and
# written.
ADAMW, AVERAGE = 40, 12
# Checkpointing that keeps attention enters dispatch modes where nothing is compiled, which run Python for operators of
# attention cores (and, with "outputs", of two linears, which is left out): host time of a kernel over that of one
# without them, measured of "selective" on a CPU with tiny widths and true depths (bench/results/host.md).
SELECTIVE_HOST = 1.2
EARLY = 0.5  # of what Ulysses sends: v and q of q, k, v and the answers, in forward, in backward and computed again


def predict_step(
    clock: Clock,
    weights: Weights,
    both: tuple[list[Stage], list[Stage]],
    parallel: ParallelConfig,
    layout: Layout,
    micro_batches: int,
    average: bool,
) -> StepTime:
    """Seconds of a step of `micro_batches` of the counted size. both: `stages` of one; `average`: whether averages are
    kept."""
    forward, backward = both
    links = Links(weights.shards, layout.dp_replicate)
    shard = sum(unit.shard for unit in weights.units) // weights.wide
    optimizer = [Kernel("memory", 0, shard * (ADAMW + AVERAGE * average))]
    if parallel.optimizer_state == "host":  # on the computing stream, there, updated, and back
        optimizer.append(Kernel(HOST_COPY, 0, 2 * len(AdamW.KEYS) * 4 * shard))
    kinds = [part.kind for part in blocks(weights)]
    kept = sum(kind in KEPT for kind in kinds) / max(1, len(kinds)) if parallel.compile == "none" else 0.0
    return simulate(
        clock,
        forward,
        backward,
        links,
        optimizer,
        micro_batches,
        reduced_last=parallel.accumulate == "unsharded",
        host_factor=1 + (SELECTIVE_HOST - 1) * kept,
    )


def stages(weights: Weights, counts: dict[str, Counts], layout: Layout) -> tuple[list[Stage], list[Stage]]:
    """(forward, backward) of one micro-batch, a stage for each unit, in the order in which they run."""
    rest = next(iter(counts.values()))[REST]
    forward, backward = [], []
    kernels: dict[int, list[Kernel]] = {}  # of a pass, which all layers of a kind share

    def kernels_of(one: Pass) -> list[Kernel]:
        if id(one) not in kernels:
            kernels[id(one)] = _kernels(one.ops)
        return kernels[id(one)]

    nothing = Pass()
    for place, unit in enumerate(weights.units):
        last = place == len(weights.units) - 1
        there, back, sent, returned = list[Kernel](), list[Kernel](), list[Exchange](), list[Exchange]()
        for part in unit.parts:
            passes = _passes(part, counts)
            first = passes[0] if passes else rest.forward if place == 0 else nothing
            second = passes[1] if passes else rest.backward if last else nothing
            there += kernels_of(first)
            back += kernels_of(second)
            sent += _exchanges(first, layout)
            returned += _exchanges(second, layout, first.sent["ring"] * (1 + (part.kind == "full")))
        forward.append(Stage(unit.name, there, sent, unit.gathered))
        if unit.passed:
            backward.append(Stage(unit.name, back, returned, unit.gathered, unit.reduced))
    return forward, backward[::-1]


def _passes(part: UnitPart, counts: dict[str, Counts]) -> tuple[Pass, Pass] | None:
    if part.shape == REST:
        return None
    one = counts[part.kind][part.shape]
    return one.forward, one.backward


def _exchanges(one: Pass, layout: Layout, hidden: float | None = None) -> list[Exchange]:
    """`hidden`: bytes of keys and values that pass along the ring while attention computes (None: all of the ring's);
    gradients of keys and values come after it."""
    group, calls = layout.sequence, one.calls
    found = []
    if size := one.sent["ulysses"]:
        early = _kernels(one.meanwhile)
        found.append(Exchange(EARLY * size, round(EARLY * calls["ulysses"]), group.ulysses, behind=early))
        found.append(Exchange((1 - EARLY) * size, round((1 - EARLY) * calls["ulysses"]), group.ulysses))
    if size := one.sent["sequence"]:
        found.append(Exchange(size, calls["sequence"], group.size))
    if ring := one.sent["ring"]:
        behind = ring if hidden is None else min(ring, hidden)
        attention = [kernel for kernel in _kernels(one.ops) if kernel.kind.startswith("attention")]
        found.append(Exchange(behind, calls["ring"], group.ring, group.ulysses, attention))
        found.append(Exchange(ring - behind, calls["ring"], group.ring, group.ulysses))
    return found


def _kernels(ops: Counter[Op]) -> list[Kernel]:
    return [Kernel(op.kind, op.flops, op.bytes, times) for op, times in ops.items()]


def flops_by_kind(stages: Sequence[Stage]) -> dict[str, float]:
    """FLOPs of all kernels of these stages, by kind."""
    found: dict[str, float] = {}
    for stage in stages:
        for kernel in stage.kernels:
            found[kernel.kind] = found.get(kernel.kind, 0.0) + float(kernel.flops) * kernel.times
    return found
