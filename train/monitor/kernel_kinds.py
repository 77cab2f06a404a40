"""Seconds of a profiled step by kind of kernel, to be compared with what was planned."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Protocol

from torch.autograd import DeviceType

# Also the names of a plan's `kernel_seconds` (train/plan/timing.py).
KERNEL_KINDS = ("gemm", "attention", "elementwise", "collectives", "host_copies")

# The first that matches a kernel's name, in lower case; what matches none is elementwise.
KERNELS = (
    ("collectives", re.compile(r"nccl")),
    ("host_copies", re.compile(r"memcpy (htod|dtoh)")),
    ("attention", re.compile(r"flash|fmha|sdpa|attention")),
    ("gemm", re.compile(r"gemm|nvjet|cutlass|xmma|cublas|matmul|splitk")),
)  # fmt: skip
# The same for operators of a CPU. Those of other namespaces are no kernels, but what calls them.
OPERATORS = (
    ("collectives", re.compile(r"^(gloo:|c10d::)")),
    ("attention", re.compile(r"^(aten::_scaled_dot_product|mova::attention)")),
    ("gemm", re.compile(r"^aten::(mm|addmm|bmm|baddbmm|mkldnn_linear|_addmm_activation)$|^mkl::_mkl_linear$")),
    ("elementwise", re.compile(r"^(aten|mova|fsdp)::")),
)


class Event(Protocol):
    """What is read of an event of the profiler as it recorded it (torch.profiler's lists of events take a minute for
    what these take a second)."""

    def name(self) -> str: ...
    def device_type(self) -> DeviceType: ...
    def start_thread_id(self) -> int: ...
    def start_ns(self) -> int: ...
    def duration_ns(self) -> int: ...


def seconds_by_kind(events: Iterable[Event], on_gpu: bool, steps: int) -> dict[str, float]:
    """Seconds that a step's kernels are busy, by kind. Kernels on several streams run beside each other, so kinds can
    sum to more than the step. `on_gpu`: kernels of the GPU count, otherwise operators of the CPU, each without those
    that it calls."""
    spent = dict.fromkeys(KERNEL_KINDS, 0)
    if on_gpu:
        for event in events:
            if event.device_type() != DeviceType.CPU:
                spent[kind_of_kernel(event.name())] += event.duration_ns()
    else:
        for name, alone in _alone(event for event in events if event.device_type() == DeviceType.CPU):
            if kind := _first(OPERATORS, name):
                spent[kind] += alone
    return {kind: nanoseconds / 1e9 / steps for kind, nanoseconds in spent.items()}


def _alone(events: Iterable[Event]) -> list[tuple[str, int]]:
    """(name, nanoseconds without the events that lie within it in its thread) of each."""
    spans = sorted((one.start_thread_id(), one.start_ns(), -one.duration_ns(), one.name()) for one in events)
    alone = [-length for _, _, length, _ in spans]
    around: list[int] = []  # places of the spans that are open
    for place, (thread, start, length, _) in enumerate(spans):
        while around and (spans[around[-1]][0] != thread or spans[around[-1]][1] - spans[around[-1]][2] <= start):
            around.pop()
        if around:
            alone[around[-1]] += length
        around.append(place)
    return [(name, max(0, rest)) for (_, _, _, name), rest in zip(spans, alone, strict=True)]


def kind_of_kernel(name: str) -> str:
    """The kind of a GPU's kernel, by its name."""
    return _first(KERNELS, name.lower()) or "elementwise"


def _first(table: Iterable[tuple[str, re.Pattern[str]]], name: str) -> str | None:
    return next((kind for kind, pattern in table if pattern.search(name)), None)
