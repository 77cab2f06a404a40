"""What the planner counts of compiled units: worked out by hand, and beside eager mode."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from model.joint import JointConfig
from train.config import compose_train
from train.parallel.memory import LiveMemory
from train.parallel.mesh import ParallelConfig
from train.parallel.sequence.operators import define
from train.parallel.workload import Workload
from train.plan.compiled import FUSED, graphs_counted
from train.plan.count import SHAPES, Counts, Pass, count_step
from train.plan.kernels import Op, OpCounter
from train.plan.lines import LineFinder

WORK = Workload(2, (13, 8, 8), 103)
KINDS = ("none", "full")
EAGER = ParallelConfig(ulysses=2, compute_dtype="bfloat16")
ROWS, WIDTH = 96, 256  # a tensor of one has 4·ROWS·WIDTH bytes
ONE = 4 * ROWS * WIDTH


class Counters:
    """Of graphs alone."""

    def __init__(self) -> None:
        self.memory, self.counter = LiveMemory(), OpCounter(LineFinder())

    @contextmanager
    def watching(self) -> Iterator[None]:
        with self.memory:
            yield

    def kernels(self) -> OpCounter:
        return self.counter


def counted(function: Any, *inputs: Tensor) -> tuple[Counters, Any]:
    counters = Counters()
    with graphs_counted(counters):
        out = torch.compile(function, backend="inductor", fullgraph=True)(*inputs)
    return counters, out


def test_elementwise_work_is_one_kernel_that_reads_its_inputs_and_writes_its_result() -> None:
    with FakeTensorMode():
        x, y = (torch.empty(ROWS, WIDTH) for _ in range(2))
        counters, out = counted(lambda x, y: (torch.nn.functional.gelu(x) * y + x).sigmoid(), x, y)
        assert out.shape == (ROWS, WIDTH)
    assert counters.counter.ops == Counter({Op("memory", 0, 3 * ONE): 1})
    [(line, _)] = counters.counter.lines
    assert line.operator.startswith(FUSED) and line.phase == "forward"
    assert counters.memory.peak == counters.memory.live == ONE


def test_a_product_is_a_call_and_what_lies_between_two_is_one_kernel() -> None:
    """Memory: the hidden tensor before and after the GELU while it is computed, then that and the result."""
    with FakeTensorMode(), torch.no_grad():
        x, a, b = torch.empty(ROWS, WIDTH), torch.empty(WIDTH, 4 * WIDTH), torch.empty(4 * WIDTH, WIDTH)
        counters, out = counted(lambda x, a, b: torch.nn.functional.gelu(x @ a) @ b, x, a, b)
    product = Op("gemm", 2 * ROWS * WIDTH * 4 * WIDTH, ONE + a.nbytes + 4 * ONE)
    fused = {op.bytes for op in counters.counter.ops if op.kind == "memory"}
    assert counters.counter.ops.total() == 3 and counters.counter.ops[product] == 2
    assert fused == {2 * 4 * ONE}
    assert counters.memory.live == out.nbytes == ONE
    assert 5 * ONE <= counters.memory.peak <= 8 * ONE


def test_backward_has_what_forward_kept_and_tells_what_it_computes_again() -> None:
    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(WIDTH, WIDTH, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.silu(self.a(x))

    with FakeTensorMode():
        unit, counters = Unit(), Counters()
        x = torch.empty(ROWS, WIDTH, requires_grad=True)
        with graphs_counted(counters):
            out = torch.compile(unit, backend="inductor", fullgraph=True)(x)
            assert counters.memory.live == 2 * ONE  # the result, and what the SiLU was given
            counters.memory.watch(gradient := torch.empty_like(out))
            counters.counter.ops.clear()
            counters.counter.lines.clear()
            counters.memory.peak = began = counters.memory.live
            out.backward(gradient)
            del out
        ops = counters.counter.ops
        assert {op.kind: times for op, times in ops.items()} == {"gemm": 2, "memory": 1}
        assert sum(op.flops * times for op, times in ops.items()) == 2 * 2 * ROWS * WIDTH * WIDTH
        assert ops[Op("memory", 0, 3 * ONE)] == 1
        # Gradients of the SiLU, of x and of the weight; what was kept is free behind the first of them, weights stay.
        assert counters.memory.peak - began == ONE + unit.a.weight.nbytes
        assert counters.memory.live == began - 2 * ONE + ONE + unit.a.weight.nbytes
    assert {line.phase for line, _ in counters.counter.lines} == {"backward"}


def test_what_a_call_holds_while_it_runs_is_part_of_the_peak() -> None:
    """An operator of the project's that makes a tensor twice as large as its result on the way."""
    body = lambda x: torch.cat([x, x])[: len(x)].clone()  # noqa: E731
    twice = define("twice_for_a_test", "(Tensor x) -> Tensor", body, torch.empty_like)
    with FakeTensorMode(), torch.no_grad():
        counters, out = counted(lambda x: twice(x), torch.empty(ROWS, WIDTH))
    assert counters.memory.live == out.nbytes == ONE and counters.memory.peak == 3 * ONE
    assert counters.counter.ops == Counter({Op("memory", 0, 4 * ONE): 1, Op("memory", 0, 2 * ONE): 1})  # joined, copied


def test_weights_are_not_among_what_a_backward_frees() -> None:
    old = torch.zeros(8, 8)
    with LiveMemory() as memory:
        new, view = old + 1, old.t()
    assert memory.counts(new) and not memory.counts(view) and not memory.counts(old)


@pytest.fixture(scope="module")
def model() -> JointConfig:
    return compose_train(["model=tiny", "run.id=x", "data.path=none"])[0].model


@pytest.fixture(scope="module")
def both(model: JointConfig) -> tuple[dict[str, Counts], dict[str, Counts]]:
    compiled = dataclasses.replace(EAGER, compile="inductor")
    eager = count_step(model, EAGER, WORK, KINDS, gpu=True)
    return eager, count_step(model, compiled, WORK, KINDS, gpu=True, lines=True)


def flops(one: Pass, *kinds: str) -> int:
    return sum(op.flops * times for op, times in one.ops.items() if op.kind in kinds)


def moved(one: Pass) -> int:
    return sum(op.bytes * times for op, times in one.ops.items() if op.kind == "memory")


def test_products_attention_and_what_is_sent_are_those_of_eager_mode(both: Any) -> None:
    eager, compiled = both
    for kind in KINDS:
        for shape in SHAPES:
            one, other = eager[kind][shape], compiled[kind][shape]
            for kernel in ("gemm", "attention"):
                assert flops(other.forward, kernel) == flops(one.forward, kernel) > 0, (kind, shape)
            assert other.forward.sent == one.forward.sent and other.forward.calls == one.forward.calls
            if kind == "none":
                assert other.backward.sent == one.backward.sent and other.backward.calls == one.backward.calls
                for kernel in ("gemm", "attention_backward"):
                    assert flops(other.backward, kernel) == flops(one.backward, kernel), shape
            attended = flops(other.backward, "attention")
            assert attended == (flops(one.forward, "attention") if kind == "full" else 0), (kind, shape)


def test_the_rest_of_a_model_is_not_compiled(both: Any) -> None:
    eager, compiled = both
    for kind in KINDS:
        rest = [counts["rest"] for counts in (eager["none"], compiled[kind])]
        for one, other in zip((rest[0].forward, rest[0].backward), (rest[1].forward, rest[1].backward), strict=True):
            assert (one.ops, one.sent, one.peak) == (other.ops, other.sent, other.peak)
        assert rest[0].kept == rest[1].kept > 0


def test_elementwise_work_moves_fewer_bytes_in_fewer_kernels(both: Any) -> None:
    eager, compiled = both
    for shape in SHAPES:
        one, other = eager["none"][shape], compiled["none"][shape]
        for name in ("forward", "backward"):
            before, after = getattr(one, name), getattr(other, name)
            assert after.launches < before.launches and moved(after) < moved(before), (shape, name)
    video = [sum(map(moved, (of["none"]["video"].forward, of["none"]["video"].backward))) for of in both]
    assert video[1] < 0.75 * video[0]


def test_checkpoints_keep_less_of_compiled_units_too(both: Any) -> None:
    _, compiled = both
    for shape in SHAPES:
        assert compiled["none"][shape].kept > compiled["full"][shape].kept > 0, shape
    assert any(line.phase == "again" and op.flops for line, op in compiled["full"]["video"].backward.lines)
    assert not any(line.phase == "again" for line, op in compiled["none"]["video"].backward.lines if op.flops)


def test_kernels_by_line_are_all_kernels(both: Any) -> None:
    _, compiled = both
    for kind in KINDS:
        for shape in SHAPES:
            for one in (compiled[kind][shape].forward, compiled[kind][shape].backward):
                found: Counter[Op] = Counter()
                for (_, op), times in one.lines.items():
                    found[op] += times
                assert found == one.ops and {line.place.split(":")[0] for line, _ in one.lines} >= {
                    "model/attention.py"
                }


def test_products_in_float8_are_calls_of_compiled_units(model: JointConfig, both: Any) -> None:
    parallel = dataclasses.replace(EAGER, linear="float8_emulated", compile="inductor")
    found = count_step(model, parallel, WORK, ["none"], gpu=True)["none"]["video"]
    bfloat16 = both[1]["none"]["video"]
    for name in ("forward", "backward"):
        one, other = getattr(bfloat16, name), getattr(found, name)
        assert 0 < flops(other, "gemm") < flops(other, "float8")
        assert flops(other, "gemm") + flops(other, "float8") == flops(one, "gemm")
