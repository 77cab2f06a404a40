"""Seconds of a step: kernels at a GPU's rates, and an event simulation of FSDP2's streams.

A rank has three streams. Units compute one after the other; a unit's weights are gathered while those before it
compute; its gradients are reduced while the next one computes. FSDP2's rules, as torch 2.11 has them:

- the gathers of the AHEAD units that follow a unit are issued when it begins, once its own weights were copied out, and
  run one after the other (train/parallel/parallelize.py);
- a reduction is issued when its unit's backward has ended; the computing stream waits for the one before it first;
- exchanges of sequence parallelism lie on the computing stream, which waits for them, but for what takes no longer than
  the kernels that run meanwhile.

On a CPU nothing runs beside the computation: gloo's threads take the same cores, and gathers, reductions and exchanges
are waited for.

Everything here is predicted, nothing measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from train.monitor.kernel_kinds import KERNEL_KINDS
from train.parallel.parts import AHEAD
from train.plan.gpu import GpuConfig, Rates

HOST_COPY = "host copy"  # between a GPU and the memory of its host
KINDS = ("gemm", "float8", "attention", "attention_backward", "memory", HOST_COPY)
BUSY = dict(zip(KINDS, ("gemm", "gemm", "attention", "attention", "elementwise", "host_copies"), strict=True))
PART_NAMES = {  # for people, of what a step's time is spent on
    "gemm": "matrix products", "float8": "matrix products in float8", "attention": "attention, forward",
    "attention_backward": "attention, backward",
    "memory": "elementwise kernels", "waiting for weights": "waiting for gathers",
}  # fmt: skip


class Kernel(NamedTuple):
    """Kernels of one kind: how many run, with FLOPs and bytes of each."""

    kind: str
    flops: int
    bytes: int
    times: int = 1


@dataclass(frozen=True)
class Exchange:
    """Collectives of sequence parallelism. bytes: that leave the rank; calls: how many; ranks: that take part, `stride`
    apart; behind: kernels of the unit that run meanwhile; the computing stream waits for what takes longer."""

    bytes: float
    calls: int
    ranks: int
    stride: int = 1
    behind: Sequence[Kernel] = ()


@dataclass(frozen=True)
class Stage:
    """One unit in one pass: what is gathered before it, computed and exchanged in it, reduced after it.

    gather, reduce: bytes of the whole weights and of the whole gradients (0: none).
    """

    name: str
    kernels: Sequence[Kernel]
    exchanges: Sequence[Exchange] = ()
    gather: int = 0
    reduce: int = 0


@dataclass(frozen=True)
class Links:
    """Ranks among which weights are split, and copies of the model: `shards` neighbours, `replicas` of them."""

    shards: int
    replicas: int


class Span(NamedTuple):
    """A time on a stream ("compute", "gather", "reduce"), seconds from the step's start."""

    stream: str
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class StepTime:
    """device: seconds on the device; host: of the process that issues the kernels; parts: of the step's seconds by what
    they are spent on; spans: of all streams; busy: seconds by kind of kernel (train/monitor/kernel_kinds.py), beside
    each other on several streams."""

    device: float
    host: float
    parts: dict[str, float]
    spans: list[Span] = field(default_factory=list)
    busy: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """A step takes as long as the slower of the two."""
        return max(self.device, self.host)


class Clock:
    """Durations on one kind of GPU."""

    def __init__(self, gpu: GpuConfig, rate: str = "middle") -> None:
        self.rates: Rates = gpu.at(rate)
        self._node = gpu.node_gpus
        self.overlaps = gpu.device == "cuda"
        self._known: dict[Kernel, float] = {}  # layers of a model have the same kernels

    def kernel(self, one: Kernel) -> float:
        """Of all its launches: products and attention at their rates, none faster than memory and launch allow."""
        if (seconds := self._known.get(one)) is None:
            seconds = self._known[one] = self._time(one)
        return seconds

    def _time(self, one: Kernel) -> float:
        rates = self.rates
        if one.kind == HOST_COPY:
            return one.times * one.bytes / (rates.host_gb_s * 1e9)
        speed = {
            "gemm": rates.gemm_tflops, "float8": rates.float8_gemm_tflops, "attention": rates.attention_tflops,
            "attention_backward": rates.attention_backward_tflops,
        }.get(one.kind)  # fmt: skip
        computed = one.flops / (speed * 1e12) if speed else 0.0
        return one.times * max(computed, one.bytes / (rates.memory_gb_s * 1e9), rates.launch_us * 1e-6)

    def exchange(self, one: Exchange) -> float:
        """Of all its calls. What leaves the node shares the node's adapters with the ranks beside it."""
        if one.ranks == 1 or not one.bytes:
            return 0.0
        latency = one.calls * self.rates.latency_us * 1e-6
        return latency + one.bytes / (self._peer_gb_s(one.ranks, one.stride) * 1e9)

    def _peer_gb_s(self, ranks: int, stride: int) -> float:
        """What one rank sends a second to others of its group, when all groups send."""
        beside = max(1, min(ranks, self._node // stride))  # ranks of the group in one node
        if beside >= ranks:
            return self.rates.node_gb_s
        away = (ranks - beside) / (ranks - 1)  # share of what it sends that leaves the node
        outside = self.rates.network_gb_s / self._node / away
        return min(outside, self.rates.node_gb_s)

    def gather(self, size: int, links: Links) -> float:
        """All-gather, or reduce-scatter, of so many bytes over the shards: rings that use all adapters of a node."""
        if links.shards == 1 or not size:
            return 0.0
        inside = links.shards <= self._node
        speed = self.rates.node_gb_s if inside else min(self.rates.node_gb_s, self.rates.network_gb_s)
        hops = 1 if inside else (links.shards // self._node).bit_length()
        return self.rates.latency_us * 1e-6 * hops + size * (links.shards - 1) / links.shards / (speed * 1e9)

    def replicate(self, size: int, links: Links) -> float:
        """All-reduce of a shard over the copies of the model, each rank with its own peers."""
        if links.replicas == 1 or not size:
            return 0.0
        sent = 2 * size * (links.replicas - 1) / links.replicas
        return self.exchange(Exchange(sent, 1, links.replicas, links.shards))


def simulate(
    clock: Clock,
    forward: Sequence[Stage],
    backward: Sequence[Stage],
    links: Links,
    after: Sequence[Kernel] = (),
    micro_batches: int = 1,
    reduced_last: bool = False,
    host_factor: float = 1.0,
) -> StepTime:
    """A step of `micro_batches`; `after`: kernels of the optimizer. reduced_last: gradients are reduced in the last
    micro-batch alone; host_factor: host time of a kernel over that of one which nothing watches."""
    streams = _Streams(clock, links)
    for number in range(micro_batches):
        reduces = not reduced_last or number == micro_batches - 1
        for stages, is_backward in ((forward, False), (backward, True)):
            for place, stage in enumerate(stages):
                streams.run(stage, stages[place + 1 : place + 1 + AHEAD], reduces and is_backward)
    streams.finish(after)
    launches = streams.launches
    host = launches * clock.rates.host_us * 1e-6 * host_factor
    parts = streams.parts
    if host > streams.now:
        parts["waiting for the host"] = host - streams.now
    return StepTime(streams.now, host, parts, streams.spans, streams.busy)


class _Streams:
    """The three streams of a rank, as far as they have come."""

    def __init__(self, clock: Clock, links: Links) -> None:
        self._clock, self._links = clock, links
        self.now = 0.0  # of the computing stream
        self._gathered: dict[str, float] = {}  # by unit: when its weights are there
        self._gather_free = self._reduce_free = self._last_reduction = 0.0
        self.parts: dict[str, float] = {}
        self.busy = dict.fromkeys(KERNEL_KINDS, 0.0)
        self.spans: list[Span] = []
        self.launches = 0

    def run(self, stage: Stage, following: Sequence[Stage], reduces: bool) -> None:
        self._issue_gather(stage)
        self._wait(self._gathered.pop(stage.name, self.now), "waiting for weights")
        begin = self.now
        if stage.gather:
            self._kernel(Kernel("memory", 0, 2 * stage.gather), "FSDP copies")
        for one in following:
            self._issue_gather(one)
        for kernel in stage.kernels:
            self.launches += kernel.times
            self._kernel(kernel, kernel.kind)
        for exchange in stage.exchanges:
            self.launches += exchange.calls
            hidden = sum(self._clock.kernel(one) for one in exchange.behind) if self._clock.overlaps else 0.0
            taken = self._clock.exchange(exchange)
            self.busy["collectives"] += taken
            self._compute("sequence parallelism", max(0.0, taken - hidden))
        if stage.reduce and reduces:
            self._wait(self._last_reduction, "waiting for reductions")
            # Gradients in the compute dtype are read, float32 written.
            self._kernel(Kernel("memory", 0, stage.reduce * 3 // 2), "FSDP copies")
            self._reduce(stage)
        self.spans.append(Span("compute", stage.name, begin, self.now))

    def finish(self, after: Sequence[Kernel]) -> None:
        """The reductions that are under way, then the optimizer."""
        self._wait(self._last_reduction, "waiting for reductions")
        begin = self.now
        for kernel in after:
            self.launches += kernel.times
            self._kernel(kernel, "moments from and to the host" if kernel.kind == HOST_COPY else "optimizer")
        self.spans.append(Span("compute", "optimizer", begin, self.now))

    def _issue_gather(self, stage: Stage) -> None:
        if not stage.gather or stage.name in self._gathered:
            return
        start = max(self.now, self._gather_free)
        self._gather_free = start + self._clock.gather(stage.gather, self._links)
        self._gathered[stage.name] = self._gather_free
        self.busy["collectives"] += self._gather_free - start
        if self._gather_free > start:
            self.spans.append(Span("gather", stage.name, start, self._gather_free))
        if not self._clock.overlaps:
            self._wait(self._gather_free, "waiting for weights")

    def _reduce(self, stage: Stage) -> None:
        start = max(self.now, self._reduce_free)
        shard = stage.reduce // self._links.shards
        end = start + self._clock.gather(stage.reduce, self._links) + self._clock.replicate(shard, self._links)
        self._reduce_free = self._last_reduction = end
        self.busy["collectives"] += end - start
        if end > start:
            self.spans.append(Span("reduce", stage.name, start, end))
        if not self._clock.overlaps:
            self._wait(end, "waiting for reductions")

    def _wait(self, until: float, part: str) -> None:
        if until > self.now:
            self._compute(part, until - self.now)

    def _kernel(self, kernel: Kernel, part: str) -> None:
        seconds = self._clock.kernel(kernel)
        self.busy[BUSY[kernel.kind]] += seconds
        self._compute(part, seconds)

    def _compute(self, part: str, seconds: float) -> None:
        if seconds:
            self.parts[part] = self.parts.get(part, 0.0) + seconds
            self.now += seconds


def bound(kernels: Mapping[str, float], gpu: GpuConfig) -> float:
    """Seconds that no step can beat: products and attention alone at the highest rates. `kernels`: FLOPs by kind."""
    rates = gpu.at("high")
    float8 = kernels.get("float8", 0.0)
    return (
        kernels.get("gemm", 0.0) / rates.gemm_tflops
        + (float8 / rates.float8_gemm_tflops if float8 and rates.float8_gemm_tflops else 0.0)
        + kernels.get("attention", 0.0) / rates.attention_tflops
        + kernels.get("attention_backward", 0.0) / rates.attention_backward_tflops
    ) / 1e12
