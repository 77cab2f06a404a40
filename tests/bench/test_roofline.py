"""The operations of a planned step by line: their sums are the plan's, and a line that is lost is an error."""

import copy
import dataclasses
import re
from pathlib import Path

import pytest

from bench.step import operations
from bench.step.before import AIMS, BEFORE, BEFORE_BYTES, RATES
from bench.step.operations import CATEGORIES, FUSED_KERNELS, Step, category, check_sums, gap
from bench.step.roofline import CASES, FIRST, RooflineBench, Table, by_kind, categories, differences, host, lines
from core.errors import RunError
from train.plan.question import find_sheet

RECORD = Path(__file__).parents[2] / "bench" / "results" / "roofline.md"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def table() -> Table:
    return Table(RooflineBench([FIRST], model="tiny"))


@pytest.fixture(scope="module")
def step(table: Table) -> Step:
    return table.step(table.question(FIRST, "selective"), FIRST)


def test_operations_are_those_of_the_plan(step: Step) -> None:
    plan = step.plan
    counted = [one for one in step.operations if one.line.place not in (operations.FSDP, operations.OPTIMIZER)]
    assert sum(one.times for one in counted) == plan.what["kernels"]
    assert sum(one.times * one.op.flops for one in counted) == sum(plan.what["kernel_flops"].values())
    assert {one.line.phase for one in counted} == {"forward", "backward", "again"}
    parts = gap(step)
    assert sum(parts.values()) == pytest.approx(1e3 * plan.step.seconds, rel=1e-6)
    found = {category(one) for one in step.operations}
    assert found <= set(CATEGORIES) and len(found) > 8
    assert step.launches == plan.what["kernels"] + step.calls.total() and step.calls["ulysses"] > 0


def test_tables_lose_nothing(step: Step) -> None:
    moved = sum(one.times * one.op.bytes for one in step.operations) / 1e9
    sums = [row for row in categories(step) if row.startswith("| sum")]
    cells = [cell.strip().replace(",", "") for cell in sums[0].split("|")]
    assert float(cells[3]) + float(cells[6]) == pytest.approx(moved, abs=0.11)
    of_memory = sum(one.times * one.op.bytes for one in step.operations if one.op.kind == "memory") / 1e9
    listed = [row.split("|")[-3] for row in [*lines(step)][2:]]
    assert sum(float(cell.replace(",", "")) for cell in listed) == pytest.approx(of_memory, abs=0.05 * len(listed))
    launches = re.findall(r"([\d,]+), [\d.,]+, [\d.]+ \|", [*by_kind({"selective": step})][2])
    assert sum(int(number.replace(",", "")) for number in launches) == sum(one.times for one in step.operations)
    assert [*host({"selective": step})][2].split("|")[3].strip() == "1.00"


def test_a_compiled_step_has_the_same_products_and_other_kernels_around_them(step: Step) -> None:
    own = Table(RooflineBench([FIRST], model="tiny"))
    compiled = own.step(own.question(FIRST, "none", compiled=True), FIRST)  # checks that its operations sum up
    ours, theirs = gap(compiled), gap(step)
    alone = "products and attention at their rates"
    assert ours[alone] == pytest.approx(theirs[alone]) and FUSED_KERNELS not in theirs
    assert ours[FUSED_KERNELS] > 0 and sum(ours.values()) < sum(theirs.values())
    assert compiled.launches < step.launches


def test_a_lost_line_is_an_error(table: Table, step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    [counts] = copy.deepcopy([*table.counted(FIRST).known.values()])
    check_sums(counts)
    lost = counts["selective"]["video"].backward.lines
    kept = lost.copy()
    for key in [key for key in lost if key[0].phase == "backward"]:
        del lost[key]
    with pytest.raises(RunError, match=r"backward of video with selective: \d+ kernels by line, \d+ counted"):
        check_sums(counts)
    lost.update(kept - lost)
    check_sums(counts)
    lost[next(iter(lost))] += 1
    with pytest.raises(RunError, match="by line"):
        check_sums(counts)
    with pytest.raises(RunError, match="by line and waiting"):
        gap(dataclasses.replace(step, operations=step.operations[:-1]))
    monkeypatch.setattr(operations, "_of_sizes", lambda weights, average: step.operations[-1:] * 2)
    with pytest.raises(RunError, match="by the plan"):
        table.step(table.question(FIRST, "selective"), FIRST)


def test_rates_are_those_of_the_study() -> None:
    assert differences(find_sheet("h100")) == []
    other = dataclasses.replace(find_sheet("h100"), gemm_tflops=[620, 700, 740], launch_us=[9.0, 7.0, 3.5])
    assert len(differences(other)) == 2 and "gemm_tflops" in differences(other)[0]
    assert (
        set(BEFORE) == set(CASES)
        and set(AIMS) < set(CASES)
        and set(BEFORE_BYTES) == {*CATEGORIES, "sum"} - {FUSED_KERNELS}
    )
    assert RATES["gemm_tflops"] == (620, 680, 740)


def test_the_record_has_all_cases_and_says_that_nothing_was_measured() -> None:
    text = RECORD.read_text()
    assert "not measured on a GPU" in text and "predicted" in text and "unknown" not in text
    for name in CASES:
        assert f"| {name} | selective |" in text and re.search(rf"\| {re.escape(name)} \| [^|]+, compiled \|", text)
    for name in AIMS:
        assert f"**{name}: the aim is" in text
