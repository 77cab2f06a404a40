"""Kernels by line of the program: nothing lost, nothing twice, and each at the line that runs it."""

import linecache
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.joint import JointConfig
from train.config import compose_train
from train.parallel.mesh import ParallelConfig
from train.parallel.workload import Workload
from train.plan.count import REST, SHAPES, Counts, count_step
from train.plan.kernels import Op, OpCounter
from train.plan.lines import ROOT, LineFinder, SourceLine, left_over

WORK = Workload(1, (5, 8, 8), 40)
KINDS = ("none", "selective", "attention", "full")


@pytest.fixture(scope="module")
def model() -> JointConfig:
    return compose_train(["model=tiny", "run.id=x", "data.path=none"])[0].model


@pytest.fixture(scope="module")
def counts(model: JointConfig) -> dict[str, Counts]:
    parallel = ParallelConfig(ulysses=2, compute_dtype="bfloat16")
    return count_step(model, parallel, WORK, KINDS, gpu=True, lines=True)


def by_kernel(lines: Counter[tuple[SourceLine, Op]]) -> Counter[Op]:
    found: Counter[Op] = Counter()
    for (_, op), times in lines.items():
        found[op] += times
    return found


def test_the_sum_over_lines_is_the_sum_over_kernels(model: JointConfig, counts: dict[str, Counts]) -> None:
    for kind, found in counts.items():
        for shape, unit in found.items():
            for name in ("forward", "backward"):
                one = getattr(unit, name)
                assert one.ops and by_kernel(one.lines) == one.ops, (kind, shape, name)
    plain = count_step(model, ParallelConfig(ulysses=2, compute_dtype="bfloat16"), WORK, KINDS, gpu=True)
    for kind, found in plain.items():
        for shape, unit in found.items():
            assert unit.forward.ops == counts[kind][shape].forward.ops and not unit.forward.lines
            assert unit.backward.ops == counts[kind][shape].backward.ops and not unit.backward.lines


def test_every_line_is_known_and_of_the_project(counts: dict[str, Counts]) -> None:
    for kind, found in counts.items():
        for shape, unit in found.items():
            for line, op in unit.forward.lines + unit.backward.lines:
                assert line.place != "unknown", (kind, shape, line, op)
                file, number = line.place.split(":")
                assert file.startswith(("model/", "train/")) and not file.startswith("train/plan/"), line
                assert linecache.getline(str(ROOT / file), int(number)).strip(), line


def test_phases(counts: dict[str, Counts]) -> None:
    for kind, found in counts.items():
        for shape in SHAPES:
            unit = found[shape]
            assert {line.phase for line, _ in unit.forward.lines} == {"forward"}
            phases = {line.phase for line, _ in unit.backward.lines}
            assert phases == ({"backward"} if kind == "none" else {"backward", "again"}), (kind, shape)
            assert all(bool(line.made_by) == (line.phase == "backward") for line, _ in unit.backward.lines)
    again: Counter[Op] = Counter()
    for (line, op), times in counts["full"]["video"].backward.lines.items():
        if line.phase == "again" and op.kind == "attention":
            again[op] += times
    forward = counts["full"]["video"].forward.ops
    assert again == Counter({op: times for op, times in forward.items() if op.kind == "attention"})


def test_products_of_a_backward_stand_at_the_lines_of_their_forwards(counts: dict[str, Counts]) -> None:
    for shape in SHAPES:
        unit = counts["none"][shape]
        forward: Counter[str] = Counter()
        backward: Counter[str] = Counter()
        for one, found in ((unit.forward, forward), (unit.backward, backward)):
            for (line, op), times in one.lines.items():
                if op.kind == "gemm":
                    found[line.place] += times * op.flops
        assert backward == Counter({place: 2 * flops for place, flops in forward.items()}), shape


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x + x

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * 2


def test_lines_of_a_function_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.plan.lines.FOLDERS", (str(Path(__file__).parent),))
    x = torch.ones(3, 4, requires_grad=True)
    finder = LineFinder()
    with OpCounter(finder) as forward:
        y = (
            x
            * x
        )  # fmt: skip
        y = Twice.apply(y.transpose(0, 1))
        loss = torch.nn.functional.gelu(y).sum()
    with OpCounter(finder) as backward:
        loss.backward()
    there = {(line.operator, line.function.rpartition(".")[2]) for line, _ in forward.lines}
    mine = "test_lines_of_a_function_by_hand"
    assert there == {("mul", mine), ("add", "forward"), ("gelu", mine), ("sum", mine)}
    found = {line.operator: line for line, _ in backward.lines if line.made_by != "MulBackward0"}
    of_forward = {line.operator: line.place for line, _ in forward.lines}
    assert found["gelu_backward"].place == of_forward["gelu"] and found["gelu_backward"].made_by == "GeluBackward0"
    assert found["mul"].function == "Twice.backward"  # its own line, not that of the forward
    products = [line for line, _ in backward.lines if line.made_by == "MulBackward0"]
    assert {line.place for line in products} == {of_forward["mul"]} and {line.phase for line in products} == {
        "backward"
    }


def test_what_a_part_has_at_another_line_is_taken_from_the_same_kernel() -> None:
    small, large = Op("memory", 0, 8), Op("memory", 0, 80)
    here, there = (
        SourceLine(place, "f", "backward", "add", "AddBackward0") for place in ("model/a.py:1", "model/b.py:2")
    )
    whole = Counter({(here, small): 5, (there, large): 1})
    part = Counter({(here, small): 1, (there, small): 2})
    assert left_over(whole, [part]) == {(here, small): 2, (there, large): 1}
    assert by_kernel(left_over(whole, [part, part])) == by_kernel(whole) - by_kernel(part) - by_kernel(part)


def test_the_rest_is_not_a_unit(counts: dict[str, Counts]) -> None:
    places = {line.place.split(":")[0] for line, _ in counts["none"][REST].forward.lines}
    assert "model/joint.py" in places or "model/tower.py" in places
    assert any(file.startswith("train/objective/") for file in places)
