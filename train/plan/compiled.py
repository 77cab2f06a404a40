"""Kernels of compiled units: what torch.compile's inductor schedules, without code that is generated or run.

    with graphs_counted(counters):
        compile_units(model, "inductor")
        out = unit(*inputs)                        # fake tensors
        out.backward(gradient)

A graph becomes fused kernels, each with the bytes that it reads and writes, and calls of others: products, attention,
and the project's own operators. The schedule is that of inductor's backend for CPUs, where no GPU is: Triton's differs
in which loops it fuses. Its memory is that of the schedule too: what is inside of a fused kernel has none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from train.parallel.memory import LiveMemory
from train.parallel.sequence.operators import BODIES
from train.plan.kernels import ATTENTION, FLOAT8, Op, OpCounter
from train.plan.lines import COUNTING, FOLDERS, ROOT, UNKNOWN, SourceLine

FUSED = "fused: "  # operator of a line that stands for a kernel of inductor
FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


class Counters(Protocol):
    """What counts a graph while it runs."""

    memory: LiveMemory

    def watching(self) -> AbstractContextManager[Any]:
        """Memory and collectives are counted while entered."""

    def kernels(self) -> OpCounter:
        """The counter of kernels, which sees operators while it is entered."""


class _Fused(NamedTuple):
    op: Op
    origins: tuple[fx.Node, ...]  # in the graph's order


@dataclass
class _Schedule:
    """One graph as inductor would run it. called: nodes that are kernels of others; lifetimes: of buffers, as (name of
    an input, or ""; bytes; first step; last step, -1: to the end)."""

    module: fx.GraphModule
    is_backward: bool
    fused: list[_Fused]
    called: set[fx.Node]
    lifetimes: list[tuple[str, int, int, int]]
    steps: int

    def peak(self, saved: set[str]) -> int:
        """Bytes at the fullest step, above what is there at the start; `saved`: inputs that are freed after use."""
        change = [0] * (self.steps + 1)
        for name, size, first, last in self.lifetimes:
            if not name:
                change[first] += size
            if last >= 0 and (not name or name in saved):
                change[last + 1] -= size
        live = peak = 0
        for one in change:
            live += one
            peak = max(peak, live)
        return peak


@contextmanager
def graphs_counted(counters: Counters) -> Iterator[None]:
    """While entered, graphs of inductor are scheduled, and counted whenever they run; their results have shapes only.

    Forward and backward of one unit at a time. What torch has compiled in this process before is forgotten.
    """
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    forward: set[str] = set()  # names of the last forward's nodes: what backward has of them it computes again

    def scheduled(graph: Any) -> Any:
        found = _schedule(graph)
        if not found.is_backward:
            forward.clear()
            forward.update(node.name for node in found.module.graph.nodes)

        def call(given: list[Any]) -> Any:
            values = [*given]
            given.clear()
            return _run(found, values, counters, forward if found.is_backward else set())

        return SimpleNamespace(call=call, __file__="")

    torch._dynamo.reset()  # of other shapes, torch would make these dynamic
    with patch.object(GraphLowering, "compile_to_module", scheduled), config.patch(fx_graph_cache=False):
        yield
    torch._dynamo.reset()


def _schedule(graph: Any) -> _Schedule:
    from torch._inductor import ir, memory
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
    from torch.utils._ordered_set import OrderedSet

    graph.init_wrapper_code()
    graph._update_scheduler()
    nodes, places = graph.scheduler.nodes, {node: place for place, node in enumerate(graph.module.graph.nodes)}
    fused, called = [], set()
    for node in nodes:
        origins = {origin for part in node.get_nodes() if part.node is not None for origin in part.node.origins}
        ordered = tuple(sorted((one for one in origins if one in places), key=places.__getitem__))
        if isinstance(node, NopKernelSchedulerNode):
            continue
        if isinstance(node, ExternKernelSchedulerNode):
            if isinstance(node.node, ir.MultiOutput):  # one of the results of a call
                continue
            if calls := [one for one in ordered if _is_call(one)]:
                called.update(calls[-1:])
                continue
        fused.append(_Fused(Op("memory", 0, int(node.get_read_write_buffers_sizes())), ordered))
    outputs = OrderedSet(graph.get_output_names())
    scheduler = graph.scheduler
    inputs = OrderedSet(graph.graph_inputs.keys())
    _, freed = memory.prepare_planning_info(
        nodes, scheduler.name_to_buf, scheduler.name_to_fused_node, inputs, outputs
    )  # fmt: skip
    timeline, _, _ = memory.compute_memory_timeline(nodes, freed, outputs)
    lifetimes = [
        (one.buffer.get_name() if one.buffer.get_name() in freed else "", one.size_alloc, one.start_step, one.end_step)
        for one in timeline
    ]
    return _Schedule(graph.module, graph.is_backward, fused, called, lifetimes, len(nodes))


def _is_call(node: fx.Node) -> bool:
    """Whether a node is a kernel that inductor calls, not one that it writes."""
    operator = _operator(node)
    packet = getattr(operator, "overloadpacket", None)
    name = getattr(packet, "__name__", "")
    return packet in flop_registry or name in ATTENTION or operator in BODIES or operator == FLOAT8


def _operator(node: fx.Node) -> Any:
    """What a node computes. Attention under a checkpoint is wrapped, in an operator that keeps or gives the state of
    random numbers, since it might have dropout."""
    operators = torch.ops.higher_order
    if node.target is operators.run_and_save_rng_state:
        return node.args[0]
    if node.target is operators.run_with_rng_state:
        return node.args[1]
    return node.target


def _run(schedule: _Schedule, values: Sequence[Any], counters: Counters, before: set[str]) -> Any:
    """Count one run. `before`: nodes that have run in the forward."""
    memory, kernels = counters.memory, counters.kernels()
    names = [node.name for node in schedule.module.graph.nodes if node.op == "placeholder"]
    saved = {
        name for name, value in zip(names, values, strict=True) if isinstance(value, Tensor) and memory.counts(value)
    }
    phase = "backward" if schedule.is_backward else "forward"
    began = memory.live
    with counters.watching():
        runner = _Interpreter(schedule, counters, lambda node: _line(node, phase, before))
        out = runner.run(*values)
    for one in schedule.fused:
        kernels.add(one.op, _fused_line(one.origins, phase, before) if kernels.finder else None)
    memory.peak = max(memory.live, began + schedule.peak(saved) + runner.workspace)
    return out


class _Interpreter(fx.Interpreter):
    """Runs a graph; operators that inductor calls are seen by the counter of kernels. workspace: the most bytes that
    one of them holds beside its inputs and results."""

    def __init__(self, schedule: _Schedule, counters: Counters, line: Callable[[fx.Node], SourceLine]) -> None:
        super().__init__(schedule.module)
        self._called, self._counters, self._line = schedule.called, counters, line
        self.workspace = 0

    def run_node(self, n: fx.Node) -> Any:
        """Of a call, with its kernels."""
        if n not in self._called:
            return super().run_node(n)
        kernels, memory = self._counters.kernels(), self._counters.memory
        finder, kernels.finder = kernels.finder, _OneLine(self._line(n)) if kernels.finder else None
        memory.peak = memory.live
        try:
            with kernels:
                out = self._call(n)
        finally:
            kernels.finder = finder
        self.workspace = max(self.workspace, memory.peak - memory.live)
        return out

    def _call(self, node: fx.Node) -> Any:
        operators = torch.ops.higher_order
        if node.target not in (operators.run_and_save_rng_state, operators.run_with_rng_state):
            return super().run_node(node)
        given, named = self.fetch_args_kwargs_from_env(node)
        operator = _operator(node)
        out = operator(*given[given.index(operator) + 1 :], **named)
        return (torch.empty(0), out) if node.target is operators.run_and_save_rng_state else out


@dataclass(frozen=True)
class _OneLine:
    """A finder whose operators all are at one line."""

    line: SourceLine

    def find(self, operator: str) -> SourceLine:
        """That line, of this operator."""
        return self.line._replace(operator=operator)


def _line(node: fx.Node, phase: str, before: set[str]) -> SourceLine:
    """Where the program has this operator, by the stack of its forward."""
    place, function = UNKNOWN
    for file, number, name in FRAME.findall(node.stack_trace or ""):  # the innermost last
        if file.startswith(FOLDERS) and not file.startswith(COUNTING):
            place, function = f"{Path(file).relative_to(ROOT)}:{number}", name
    return SourceLine(place, function, "again" if node.name in before else phase, "", "")


def _fused_line(origins: tuple[fx.Node, ...], phase: str, before: set[str]) -> SourceLine:
    """Of a fused kernel, the line of its last operator; it is computed again if all of it is."""
    if not origins:
        return SourceLine(*UNKNOWN, phase, FUSED, "")
    again = all(node.name in before for node in origins)
    parts = dict.fromkeys(str(node.target).removeprefix("aten.").split(".")[0] for node in origins)
    line = _line(origins[-1], phase, set())
    return line._replace(phase="again" if again else phase, operator=FUSED + ", ".join(parts))
