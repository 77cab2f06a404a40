"""The largest memory of rank 0 in a step, by what it holds, from the counts of its units (FSDP2).

A step is walked through in the order of its units: gathered weights, what forwards keep, what a unit needs while it
runs, gradients before and after their reduction. Walked with the counts of a CPU it meets what the whole program is
counted to hold on fake tensors (bench/results/simulate.md) and in real runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from model.joint import JointTransformer
from train.parallel.mesh import Layout, ParallelConfig
from train.parallel.parts import AHEAD, ALL, Unit, forward_order, in_backward, tower_of
from train.parallel.recompute import shape_of, units
from train.parallel.traffic import EXACT
from train.plan.count import REST, Counts, UnitCounts


@dataclass(frozen=True)
class UnitPart:
    """One of `train.parallel.recompute.units`, or what else a unit of FSDP holds (REST). kind: of checkpointing;
    gradients: bytes, as its backward makes them."""

    name: str
    shape: str
    kind: str
    gradients: int


@dataclass(frozen=True)
class UnitWeights:
    """A unit of FSDP, with its parts in the order in which they run.

    Bytes: of its whole weights in the dtype in which they are gathered; and of what learns, the gradients as they are
    reduced and this rank's float32 shard. passed: a gradient passes through it.
    """

    parts: tuple[UnitPart, ...]
    gathered: int
    reduced: int
    shard: int
    passed: bool

    @property
    def name(self) -> str:
        """Of its first part, and how many follow."""
        more = len(self.parts) - 1
        return self.parts[0].name + (f" and {more} more" if more else "")

    @property
    def trains(self) -> bool:
        """Whether anything in it learns."""
        return self.shard > 0


@dataclass(frozen=True)
class StaticMemory:
    """Bytes that a rank holds all the time, of all parts of the model."""

    weights: int
    moments: int
    average: int


class Weights:
    """Sizes of a model's weights under a layout: of its units in the order of a forward, and of all that stays."""

    def __init__(
        self,
        model: JointTransformer,
        parallel: ParallelConfig,
        layout: Layout,
        kinds: Sequence[str],
        average: bool,
        trained: Collection[str] = ALL,
        states: int = 2,
    ) -> None:
        """`model`: whole, on any device, what is frozen without requires_grad; `kinds`: of checkpointing, for each of
        `units(model)`; `average`: whether averages are kept; `states`: tensors that the optimizer keeps for a
        weight."""
        self.shards = layout.world // layout.dp_replicate
        self.alone = layout.alone
        self.wide = torch.promote_types(layout.compute, torch.float32).itemsize
        names = {module: name for name, module in model.named_modules()}
        self._compute = layout.compute.itemsize
        checkpointed = dict(zip(units(model), kinds, strict=True))
        order = [*forward_order(model, "high", video=True, audio=True)]
        passed = in_backward(order)
        self.units = [
            self._unit(unit, names, checkpointed, through) for unit, through in zip(order, passed, strict=True)
        ]
        held = {name: self._shard(parameter) for name, parameter in model.named_parameters()}
        learned = sum(size for name, size in held.items() if tower_of(name) in trained)
        on_device = parallel.optimizer_state == "device"
        self.static = StaticMemory(sum(held.values()), states * learned * on_device, learned * average)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.learned = sum(one.numel() for name, one in model.named_parameters() if tower_of(name) in trained)
        self.saved = self._saved(model, trained, states + average)

    def _shard(self, parameter: nn.Parameter) -> int:
        return self.wide * -(-parameter.shape[0] // self.shards) * math.prod(parameter.shape[1:])

    def _saved(self, model: JointTransformer, trained: Collection[str], beside: int) -> tuple[int, int]:
        """(tensors, pieces of them) that a checkpoint holds; a shard without rows is none. `beside`: what is kept for
        a weight that learns."""
        tensors = pieces = 0
        for name, parameter in model.named_parameters():
            rows = parameter.shape[0]
            copies = 1 + beside * (tower_of(name) in trained)
            tensors += copies
            pieces += copies * -(-rows // -(-rows // self.shards))
        return tensors, pieces

    def _unit(self, unit: Unit, names: dict[nn.Module, str], kinds: dict[nn.Module, str], passed: bool) -> UnitWeights:
        gathered = reduced = shard = 0  # a rank alone gathers and reduces nothing
        parts = []
        for module in unit.modules:
            exact = any(part in f"{names[module]}." for part in EXACT)
            mine = sum(self._shard(parameter) for parameter in module.parameters())
            whole = 0 if self.alone else mine * self.shards
            computing = whole if exact else whole * self._compute // self.wide
            learns = next(module.parameters()).requires_grad
            gathered += computing
            reduced += whole * learns
            shard += mine * learns
            shape = shape_of(names[module]) if module in kinds else REST
            parts.append(UnitPart(names[module], shape, kinds.get(module, "none"), computing * learns))
        return UnitWeights(tuple(_joined(parts)), gathered, reduced, shard, passed)


def _joined(parts: list[UnitPart]) -> list[UnitPart]:
    """Those that are counted together, as one."""
    if parts[0].shape != REST:
        return parts
    return [dataclasses.replace(parts[0], gradients=sum(part.gradients for part in parts))]


@dataclass(frozen=True)
class Peak:
    """The largest moment of a step. when: the unit and the pass; parts: bytes by what they hold, which sum to the
    peak."""

    when: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All parts, bytes."""
        return sum(self.parts.values())


def largest_moment(weights: Weights, counts: dict[str, Counts], parallel: ParallelConfig, micro_batches: int) -> Peak:
    """The peak of a step of the largest micro-batch. `counts`: by kind of checkpointing."""
    return max(_moments(weights, counts, parallel, micro_batches), key=lambda peak: peak.total)


def kept_bytes(weights: Weights, counts: dict[str, Counts]) -> int:
    """What lies between forward and backward, of all units."""
    return _of_rest(counts).kept + sum(counts[part.kind][part.shape].kept for part in blocks(weights))


def blocks(weights: Weights) -> list[UnitPart]:
    """The blocks and Bridge directions of a step, in the order in which they run."""
    return [part for unit in weights.units for part in unit.parts if part.shape != REST]


def _of_rest(counts: dict[str, Counts]) -> UnitCounts:
    return next(iter(counts.values()))[REST]


def _moments(
    weights: Weights, counts: dict[str, Counts], parallel: ParallelConfig, micro_batches: int
) -> Iterator[Peak]:
    static = weights.static
    held = {"weights": static.weights, "moments": static.moments, "average": static.average}
    order = weights.units
    summed_whole = parallel.accumulate == "unsharded" and micro_batches > 1 and not weights.alone
    # Gradients of the micro-batches before lie there from the start.
    learned = [unit for unit in order if unit.trains]
    gradients = sum(unit.shard for unit in learned) if micro_batches > 1 and not summed_whole else 0
    unreduced = sum(unit.reduced for unit in learned) if summed_whole else 0
    rest = _of_rest(counts)
    kept = rest.kept

    def moment(when: str, working: int, gathered: int, reducing: int = 0) -> Peak:
        parts = {"gradients": gradients + unreduced, "kept for backward": kept, "working memory": working}
        return Peak(when, held | parts | {"gathered weights": gathered, "gradients in reduction": reducing})

    def of(part: UnitPart) -> UnitCounts | None:
        return None if part.shape == REST else counts[part.kind][part.shape]

    for place, unit in enumerate(order):
        there = sum(one.gathered for one in order[place : place + 1 + AHEAD])
        for part in unit.parts:
            one = of(part)
            yield moment(f"forward of {part.name}", one.forward.peak if one else 0, there)
            kept += one.kept if one else 0
    reducing = 0  # of the unit before, while this one computes
    met = [unit for unit in reversed(order) if unit.passed]
    for place, unit in enumerate(met):
        there = sum(one.gathered for one in met[place : place + 1 + AHEAD])
        own = 0  # gradients, until they are copied for their reduction
        for part in reversed(unit.parts):
            one = of(part)
            working = max(one.backward.peak, 0) if one else part.gradients
            yield moment(f"backward of {part.name}", own + working, there, reducing)
            kept -= one.kept if one else 0
            own += part.gradients
        if unit.trains:
            reducing = 0 if weights.alone else unit.reduced + unit.shard
            yield moment(f"reduction of {unit.name}", 0 if summed_whole else own, there, reducing)
            if micro_batches == 1:
                gradients += unit.shard
