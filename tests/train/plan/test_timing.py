"""The clock and the streams of the planner on steps whose times can be worked out by hand."""

import dataclasses

import pytest

from bench.train.planned import cpu_sheet
from train.plan.gpu import GpuConfig
from train.plan.timing import Clock, Exchange, Kernel, Links, Stage, bound, simulate


def sheet(**rates: float) -> GpuConfig:
    """Round rates, the same at low, middle and high: 100 TFLOP/s, 1,000 GB/s, 100 GB/s in a node, 80 between nodes."""
    values = {
        "gemm_tflops": 100.0, "attention_tflops": 50.0, "attention_backward_tflops": 25.0, "memory_gb_s": 1000.0,
        "launch_us": 1.0, "host_us": 1.0, "node_gb_s": 100.0, "network_gb_s": 80.0, "latency_us": 1e-6,
        "host_gb_s": 10.0,
    } | rates  # fmt: skip
    given = {name: [value] * 3 for name, value in values.items()}
    return dataclasses.replace(cpu_sheet(), device="cuda", node_gpus=8, **given)


def products(milliseconds: float) -> list[Kernel]:
    return [Kernel("gemm", int(milliseconds * 1e11), 0)]


GB = 10**9


@pytest.mark.parametrize(
    "kernel,seconds",
    [
        (Kernel("gemm", 10**14, 0), 1.0),
        (Kernel("attention", 10**14, 0), 2.0),
        (Kernel("attention_backward", 10**14, 0), 4.0),
        (Kernel("memory", 0, 10**12), 1.0),
        (Kernel("host copy", 0, 10**10), 1.0),
        (Kernel("gemm", 10**12, 10**12), 1.0),  # too small a product for its bytes
        (Kernel("memory", 0, 8, times=1000), 1e-3),  # none is faster than its launch
    ],
)
def test_a_kernel_takes_the_slowest_of_its_limits(kernel: Kernel, seconds: float) -> None:
    assert Clock(sheet()).kernel(kernel) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "exchange,seconds",
    [
        (Exchange(GB, 1, 1), 0.0),
        (Exchange(GB, 1, 8), 0.01),  # within the node
        (Exchange(GB, 1, 2, stride=8), 0.1),  # each with a peer in another node: a tenth of 80 GB/s, shared by 8
        (Exchange(GB, 1, 16), 8 / 15 * GB / 10e9),  # 8 of its 15 peers are elsewhere
    ],
)
def test_an_exchange_within_and_across_nodes(exchange: Exchange, seconds: float) -> None:
    assert Clock(sheet()).exchange(exchange) == pytest.approx(seconds, rel=1e-6)


def test_gathers_and_replicas() -> None:
    clock = Clock(sheet())
    assert clock.gather(GB, Links(8, 1)) == pytest.approx(7 / 8 / 100)
    assert clock.gather(GB, Links(64, 1)) == pytest.approx(63 / 64 / 80, rel=1e-4)
    assert clock.gather(GB, Links(1, 64)) == 0.0
    assert clock.replicate(GB, Links(8, 4)) == pytest.approx(2 * 3 / 4 / 10)  # a tenth of a node's network a rank


def test_a_gather_hides_behind_the_two_units_before_it_and_no_longer() -> None:
    clock, links = Clock(sheet()), Links(8, 1)
    size = int(GB * 8 / 7)  # 10 ms to gather, 2.3 ms to copy out
    copy = 2 * size / 1e12
    forward = [Stage(name, products(20), gather=size) for name in "abc"]
    found = simulate(clock, forward, [], links)
    assert found.device == pytest.approx(0.010 + 3 * (0.020 + copy), rel=1e-3)  # only the first is waited for
    assert found.parts["waiting for weights"] == pytest.approx(0.010, rel=1e-3)
    short = [Stage(name, products(4), gather=size) for name in "abc"]
    waits = simulate(clock, short, [], links)
    # b and c are gathered one after the other from the begin of a on: c is there 20 ms later, then copied and used.
    assert waits.device == pytest.approx(0.010 + copy + 2 * 0.010 + copy + 0.004, rel=1e-3)
    large, small = (Stage("", products(ms), gather=size * ms // 20) for ms in (20, 2))  # 10 and 1 ms to gather
    stages = [dataclasses.replace(one, name=name) for one, name in ((large, "a"), (small, "b"), (large, "c"))]
    for both in ((stages, []), ([], stages)):  # c's 10 ms do not fit behind b, but behind a and b
        found = simulate(clock, *both, links)
        assert found.parts["waiting for weights"] == pytest.approx(0.010, rel=1e-3)


def test_a_large_unit_is_not_fetched_three_ahead() -> None:
    clock, links = Clock(sheet()), Links(8, 1)
    size = int(GB * 8 / 7)
    stages = [Stage("a", products(20)), Stage("b", products(2)), Stage("c", products(2)), Stage("d", [], gather=size)]
    assert simulate(clock, stages, [], links).parts["waiting for weights"] == pytest.approx(0.010 - 0.004, rel=1e-3)


def test_a_reduction_hides_behind_the_next_unit_and_the_last_is_waited_for() -> None:
    clock, links = Clock(sheet()), Links(8, 1)
    size = int(GB * 8 / 7)
    copy = 1.5 * size / 1e12
    backward = [Stage(name, products(20), reduce=size) for name in "cba"]
    found = simulate(clock, [], backward, links)
    assert found.device == pytest.approx(3 * (0.020 + copy) + 0.010, rel=1e-3)
    assert found.parts["waiting for reductions"] == pytest.approx(0.010, rel=1e-3)
    whole = simulate(clock, [], backward, links, micro_batches=2, reduced_last=True)
    assert whole.device == pytest.approx(3 * 0.020 + found.device, rel=1e-3)
    both = simulate(clock, [], backward, links, micro_batches=2)
    assert both.device == pytest.approx(2 * 3 * (0.020 + copy) + 0.010, rel=1e-3)


def test_keys_and_values_pass_along_a_ring_behind_attention() -> None:
    kernels = [Kernel("attention", 10**12, 0)]  # 20 ms
    hidden, longer = (Exchange(size, 1, 2, behind=kernels) for size in (GB, 3 * GB))  # 10 and 30 ms
    for exchange, seconds in ((hidden, 0.020), (longer, 0.030), (Exchange(GB, 1, 2), 0.030)):
        found = simulate(Clock(sheet()), [Stage("a", kernels, [exchange])], [], Links(1, 1))
        assert found.device == pytest.approx(seconds, rel=1e-3)


def test_an_exchange_is_waited_for_where_the_kernels_beside_it_end_first() -> None:
    """20 ms of products, 8 of which run while 10 ms are sent; on a CPU they take the same cores."""
    stage = Stage("a", products(20), [Exchange(GB, 1, 8, behind=products(8))])
    for device, seconds in (("cuda", 0.022), ("cpu", 0.030)):
        clock = Clock(dataclasses.replace(sheet(), device=device))
        assert simulate(clock, [stage], [], Links(1, 1)).device == pytest.approx(seconds, rel=1e-3)


def test_a_step_takes_as_long_as_its_host_where_that_is_longer() -> None:
    stages = [Stage("a", [Kernel("memory", 0, 8, times=1000)])]
    found = simulate(Clock(sheet(host_us=3.0)), stages, [], Links(1, 1), host_factor=2.0)
    assert found.device == pytest.approx(1e-3) and found.host == pytest.approx(6e-3) and found.seconds == found.host
    assert sum(found.parts.values()) == pytest.approx(found.seconds)


def test_no_step_beats_the_bound() -> None:
    flops = {"gemm": 1e14, "attention": 1e14, "attention_backward": 1e14, "memory": 0.0}
    assert bound(flops, sheet()) == pytest.approx(1 + 2 + 4)


def test_on_a_cpu_nothing_runs_beside_the_computation() -> None:
    """Two units of 10 ms, 5 ms to gather and 2 ms to copy out: a GPU hides the second gather, a CPU's cores gather."""
    forward = [Stage(name, products(10), gather=GB) for name in ("a", "b")]
    on_gpu, on_cpu = (dataclasses.replace(sheet(), device=device) for device in ("cuda", "cpu"))
    assert simulate(Clock(on_gpu), forward, [], Links(2, 1)).device == pytest.approx(0.029, rel=1e-3)
    assert simulate(Clock(on_cpu), forward, [], Links(2, 1)).device == pytest.approx(0.034, rel=1e-3)
    backward = [Stage("a", products(10), reduce=GB), Stage("b", products(10))]  # 5 ms to reduce, 1.5 ms to copy in
    assert simulate(Clock(on_gpu), [], backward, Links(2, 1)).device == pytest.approx(0.0215, rel=1e-3)
    assert simulate(Clock(on_cpu), [], backward, Links(2, 1)).device == pytest.approx(0.0265, rel=1e-3)
