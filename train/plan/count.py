"""Counts one step of rank 0 on the real program, one unit of each shape at a time.

A model of one layer of each kind is made of fake tensors at true widths, with the layout's sequence parallelism and
checkpointing applied as in training. Its forward shows what each unit is given; then every unit runs alone, forward and
backward. All blocks of a tower, and all Bridge directions of one kind, do the same work at the same shapes, so counts
are multiplied by the number of layers, exactly. FSDP and the optimizer are counted from the sizes of the weights
(train/plan/memory.py, train/plan/step_time.py).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map

from data.batch import Batch
from data.clip import Bucket
from model import joint, tower
from model.joint import JointConfig, JointTransformer
from train.monitor.counters import CollectiveCounter
from train.objective.noise import Prepared
from train.objective.objective import Draws, ObjectiveConfig
from train.parallel.memory import LiveMemory
from train.parallel.mesh import Layout, ParallelConfig, make_layout
from train.parallel.parallelize import compile_units, prepare_model
from train.parallel.recompute import recompute_activations, shape_of, units
from train.parallel.traffic import EXACT
from train.parallel.workload import Workload
from train.plan.compiled import graphs_counted
from train.plan.kernels import Op, OpCounter, kernels_of
from train.plan.lines import LineFinder, SourceLine, left_over
from train.step import forward_backward

SHAPES = ("video", "audio", "to_video", "to_audio")  # as of train.parallel.recompute.shape_of
REST = "rest"  # stems, time paths, heads and the loss


@dataclass
class Pass:
    """What a unit does in its forward, or in its backward with what is computed again in it.

    ops: kernels and how often each runs; meanwhile: those of them, but for fused ones, that run while v and q travel to
    other ranks, or their gradients (train/parallel/sequence/ulysses.py); sent: bytes that leave the rank by mesh axis;
    calls: collectives by axis; peak: bytes of live tensors above those that were alive when it began, or began with its
    unit's kept ones; left: above them when it has ended, negative where it freed them; lines: the kernels by line,
    where that was asked for.
    """

    ops: Counter[Op] = field(default_factory=Counter)
    meanwhile: Counter[Op] = field(default_factory=Counter)
    lines: Counter[tuple[SourceLine, Op]] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    left: int = 0

    @property
    def flops(self) -> int:
        """Of products and attention."""
        return sum(op.flops * times for op, times in self.ops.items())

    @property
    def launches(self) -> int:
        """Kernels."""
        return self.ops.total()


@dataclass
class UnitCounts:
    """One unit. kept: bytes that lie between its forward and its backward, its input included, its output not."""

    forward: Pass
    backward: Pass
    kept: int


Counts = dict[str, UnitCounts]  # by shape, and REST


@contextmanager
def simulated_ranks(world: int) -> Iterator[None]:
    """This process as rank 0 of so many: torch's fake process group. Nothing is sent."""
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def count_step(
    config: JointConfig,
    parallel: ParallelConfig,
    workload: Workload,
    kinds: Sequence[str],
    gpu: bool,
    lines: bool = False,
) -> dict[str, Counts]:
    """Counts of every shape of unit with each of these kinds of checkpointing ("none", "full", ...), of one
    micro-batch; of units that inductor compiles where `parallel.compile` says so.

    `gpu`: count the kernels of a GPU; else those that torch runs on a CPU. `lines`: by line of the program too. Starts
    a fake process group: none may be running. What is not checkpointed, and what units are given, is the same for all
    kinds, and counted once.
    """
    compiled = parallel.compile == "inductor"
    parallel = dataclasses.replace(
        parallel, recompute="none", recompute_gib=None, compile="none", dp_replicate=1, dp_shard=1, engine="fsdp2"
    )
    short = _one_layer(config)
    with simulated_ranks(parallel.ring * parallel.ulysses):  # what a unit does depends on nothing else
        layout = make_layout(parallel, torch.device("cpu"))  # outside of the fake mode, which cannot make meshes
        with FakeTensorMode(allow_non_fake_inputs=True), _own_tables() as tables, kernels_of(gpu):
            model = _model(short, layout)
            prepare_model(model, parallel, layout, workload)
            counting = partial(_Counting, layout, lines)
            return _count(model, layout, make_batch(short, workload), kinds, compiled, tables, counting)


@contextmanager
def _own_tables() -> Iterator[list[Tensor]]:
    """Tables of positions in caches of their own, which are listed: those of the process must hold no fake tensors, and
    none of these may be of another fake mode."""
    made: list[Tensor] = []

    def listed(make: Any) -> Any:
        @lru_cache
        def table(*arguments: Any) -> Any:
            found = make(*arguments)
            for one in found if isinstance(found, tuple) else (found,):
                made.extend((one.cos, one.sin))
            return found

        return table

    caches = [(tower, "video_rotary"), (tower, "audio_rotary"), (joint, "bridge_rotary")]
    with ExitStack() as stack:
        for module, name in caches:
            stack.enter_context(patch.object(module, name, listed(getattr(module, name).__wrapped__)))
        yield made


def _one_layer(config: JointConfig) -> JointConfig:
    video = dataclasses.replace(config.video, num_layers=1)
    audio = dataclasses.replace(config.audio, num_layers=1)
    bridge = dataclasses.replace(config.bridge, strategy="full")
    return dataclasses.replace(config, video=video, audio=audio, bridge=bridge, two_experts=False)


def _model(config: JointConfig, layout: Layout) -> JointTransformer:
    """With parameters in the dtypes in which FSDP hands them to a forward."""
    model = JointTransformer(config)
    wide = torch.promote_types(layout.compute, torch.float32)
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):  # Module.to cannot replace fake ones
            exact = any(part in f"{path}." for part in EXACT)
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=wide if exact else layout.compute)))
    return model


def _count(
    model: JointTransformer,
    layout: Layout,
    batch: Prepared,
    kinds: Sequence[str],
    compiled: bool,
    tables: list[Tensor],
    counting: Callable[[], _Counting],
) -> dict[str, Counts]:
    names = {module: name for name, module in model.named_modules()}
    shapes = {module: shape_of(names[module]) for module in units(model)}
    given: dict[nn.Module, tuple[Any, ...]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: given.__setitem__(module, inputs)) for module in shapes
    ]
    # Once, uncounted: a run computes its tables of positions in its first step alone.
    forward_backward(model, [batch], ObjectiveConfig(), "high", layout, lambda loss, last: None)
    for hook in hooks:
        hook.remove()
    first = "none" if compiled else kinds[0]
    with _checkpointed(model, first, compiled=False):
        whole = _count_whole(model, layout, batch, counting())
        eager = {shape: _count_unit(module, given[module], counting()) for module, shape in shapes.items()}
    rest = _rest(whole, list(eager.values()), sum(table.nbytes for table in tables))
    found: dict[str, Counts] = {} if compiled else {first: eager}
    for kind in kinds:
        if kind not in found:
            count = _count_compiled if compiled else _count_unit
            with _checkpointed(model, kind, compiled):
                found[kind] = {shape: count(module, given[module], counting()) for module, shape in shapes.items()}
        found[kind][REST] = rest
    return found


@contextmanager
def _checkpointed(model: JointTransformer, kind: str, compiled: bool) -> Iterator[None]:
    """While entered, all units are checkpointed in this way, and compiled where they are to be."""
    recompute_activations(model, [kind] * len(units(model)), compiled)
    if compiled:
        compile_units(model, "inductor")
    try:
        yield
    finally:
        for module in units(model):
            module.__dict__.pop("forward", None)  # the class's again


def _count_whole(model: JointTransformer, layout: Layout, batch: Prepared, counting: _Counting) -> UnitCounts:
    """Forward with the loss, and backward, of the whole short model."""
    found: list[Pass] = []

    def backward(loss: Tensor, last: bool) -> None:
        found.append(counting.next())
        loss.backward()

    with counting:
        forward_backward(model, [batch], ObjectiveConfig(), "high", layout, backward)
        found.append(counting.next())
    forward, back = found
    return UnitCounts(forward, back, kept=forward.left)


def _count_unit(module: nn.Module, inputs: tuple[Any, ...], counting: _Counting) -> UnitCounts:
    inputs = tree_map(_leaf, inputs)
    module.zero_grad()
    with counting:
        out = module(*inputs)
        forward = counting.next()
        size, gradient = out.untyped_storage().nbytes(), torch.empty_like(out)
        counting.next()
        out.backward(gradient)
        del out, gradient
        backward = counting.next()
    return UnitCounts(forward, backward, forward.left - size + inputs[0].untyped_storage().nbytes())


def _count_compiled(module: nn.Module, inputs: tuple[Any, ...], counting: _Counting) -> UnitCounts:
    """As `_count_unit`, of a unit that torch compiles here; only its graphs are counted."""
    inputs = tree_map(_leaf, inputs)
    module.zero_grad()
    with graphs_counted(counting):
        out = module(*inputs)
        forward = counting.next()
        size, gradient = out.untyped_storage().nbytes(), torch.empty_like(out)
        out.backward(gradient)
        del out
        backward = counting.next()
    return UnitCounts(forward, backward, forward.left - size + inputs[0].untyped_storage().nbytes())


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _rest(whole: UnitCounts, parts: list[UnitCounts], tables: int) -> UnitCounts:
    """What is left of the whole without the units; `tables`: bytes of those that lie there from the first step on."""
    passes = []
    for name in ("forward", "backward"):
        left: Pass = dataclasses.replace(getattr(whole, name))
        for part in parts:
            one: Pass = getattr(part, name)
            left.ops, left.sent, left.calls = left.ops - one.ops, left.sent - one.sent, left.calls - one.calls
            left.meanwhile = left.meanwhile - one.meanwhile
        left.lines = left_over(left.lines, [getattr(part, name).lines for part in parts])
        passes.append(left)
    return UnitCounts(passes[0], passes[1], tables + max(0, whole.kept - sum(part.kept for part in parts)))


class _Counting:
    """All counters together; `next` tells what was counted since the last call."""

    def __init__(self, layout: Layout, lines: bool) -> None:
        self.memory, self._layout, self._stack, self._before = LiveMemory(), layout, ExitStack(), 0
        self._finder = LineFinder() if lines else None  # of forward and backward
        self._entered = False
        self._begin()

    def __enter__(self) -> _Counting:
        self._entered = True
        self.memory.__enter__()
        self._enter()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()
        self.memory.__exit__(*exception)
        self._entered = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Memory and collectives alone are counted while entered."""
        with self.memory, self._sent:
            yield

    def kernels(self) -> OpCounter:
        """Of the pass that is being counted."""
        return self._ops

    def _begin(self) -> None:
        self._sent, self._ops = CollectiveCounter(self._layout), OpCounter(self._finder)

    def _enter(self) -> None:
        self._stack.enter_context(self._sent)
        self._stack.enter_context(self._ops)

    def next(self) -> Pass:
        """One pass."""
        self._stack.close()
        sent: Counter[str] = Counter()
        calls: Counter[str] = Counter()
        for (axis, _), size in self._sent.bytes.items():
            sent[axis] += size
        for (axis, _), number in self._sent.calls.items():
            calls[axis] += number
        memory = self.memory
        counted = self._ops
        left = memory.live - self._before
        found = Pass(counted.ops, +counted.meanwhile, counted.lines, sent, calls, memory.peak - self._before, left)
        self._before = memory.peak = memory.live
        self._begin()
        if self._entered:
            self._enter()
        return found


def make_batch(config: JointConfig, workload: Workload) -> Prepared:
    """One micro-batch of a rank; the values play no part."""
    clips, grid, steps, text = workload.clips, workload.grid, workload.audio_steps, config.text_length

    def latents(*shape: int) -> Tensor:
        return torch.zeros(clips, *shape, dtype=torch.bfloat16)

    ones = torch.ones(clips)
    batch = Batch(
        step=0, bucket=Bucket(*grid, steps, 24.0, True, True), keys=[""] * clips, sample_numbers=np.arange(clips),
        video=latents(16, *grid), audio=latents(config.audio.in_dim, steps), condition=latents(20, *grid),
        text=latents(text, config.video.text_dim), empty_text=latents(text, config.video.text_dim)[0],
        weight=ones, video_weight=ones, audio_weight=ones, total_weight=float(clips),
    )  # fmt: skip
    noise = torch.zeros(clips, 16, *grid), torch.zeros(clips, config.audio.in_dim, steps)
    return Prepared(batch, Draws(950 * ones, 500 * ones, *noise, ones, ones, ones))
