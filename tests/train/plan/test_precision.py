"""What other precisions cost in a plan, against sizes that know nothing of the program."""

import dataclasses

import pytest

from core.errors import RunError
from model.joint import JointConfig
from train.config import compose_train
from train.parallel.mesh import ParallelConfig
from train.parallel.workload import Workload
from train.plan.count import SHAPES, Counts, Pass, count_step
from train.plan.plan import KnownCounts, key_of, plan_run
from train.plan.question import ClipSize, Question, find_sheet
from train.plan.timing import Clock, Kernel, bound

pytestmark = pytest.mark.slow

WORK = Workload(2, (13, 8, 8), 103)
BASE = ParallelConfig(ulysses=2, compute_dtype="bfloat16")


@pytest.fixture(scope="module")
def model() -> JointConfig:
    return compose_train(["model=tiny", "run.id=x", "data.path=none"])[0].model


@pytest.fixture(scope="module")
def counts(model: JointConfig) -> dict[str, dict[str, Counts]]:
    settings: dict[str, dict[str, str]] = {
        "plain": {}, "residual": {"residual": "float32"}, "float8": {"linear": "float8_emulated"}
    }  # fmt: skip
    return {
        name: count_step(model, dataclasses.replace(BASE, **given), WORK, ("none", "full"), gpu=True)  # type: ignore[arg-type]
        for name, given in settings.items()
    }


def flops(one: Pass, kind: str) -> int:
    return sum(op.flops * times for op, times in one.ops.items() if op.kind == kind)


def moved(one: Pass) -> int:
    return sum(op.bytes * times for op, times in one.ops.items() if op.kind == "memory")


def test_wider_states_keep_three_of_a_block_in_float32(
    model: JointConfig, counts: dict[str, dict[str, Counts]]
) -> None:
    tokens, clips, dim = WORK.video_tokens(model) // 2, WORK.clips, model.video.dim
    state = 2 * clips * tokens * dim  # bfloat16
    plain, wide = (counts[name]["none"]["video"] for name in ("plain", "residual"))
    # What the block is given, after self-attention and after the caption: each is normed once more in backward. Beside
    # them modulation, gates and the weights of a norm, which no token adds to.
    assert 0 <= wide.kept - plain.kept - 3 * state < 32 * clips * dim
    assert counts["residual"]["full"]["video"].kept == 2 * state == 2 * counts["plain"]["full"]["video"].kept
    # In a forward three norms read and write twice as much; two are modulated, which reads that, the third is rounded;
    # three sums read and write twice as much, but for what is added.
    assert moved(wide.forward) - moved(plain.forward) == pytest.approx((3 * 2 + 2 + 3 + 3 * 2) * state, rel=0.05)
    assert flops(wide.forward, "gemm") == flops(plain.forward, "gemm")


def test_linears_of_video_tokens_multiply_in_float8(model: JointConfig, counts: dict[str, dict[str, Counts]]) -> None:
    tokens, clips, text = WORK.video_tokens(model) // 2, WORK.clips, model.text_length
    wide, narrow, ffn = model.video.dim, model.audio.dim, model.video.ffn_dim
    rows = clips * tokens
    expected = {
        "video": 2 * rows * (6 * wide * wide + 2 * wide * ffn),
        "to_video": 2 * rows * 2 * wide * wide,
        "to_audio": 2 * rows * 2 * wide * narrow,
        "audio": 0,
    }
    plain, found = counts["plain"], counts["float8"]
    for shape in SHAPES:
        one, before = found["none"][shape], plain["none"][shape]
        assert flops(one.forward, "float8") == expected[shape] and flops(one.backward, "float8") == 2 * expected[shape]
        for name in ("forward", "backward"):
            products = flops(getattr(one, name), "gemm") + flops(getattr(one, name), "float8")
            assert products == flops(getattr(before, name), "gemm"), (shape, name)
        assert one.kept == before.kept, "operands are kept as they were given"
    assert flops(found["none"]["video"].forward, "gemm") == 2 * clips * text * 2 * wide * wide
    again = flops(found["full"]["video"].backward, "float8")
    assert 2.6 * expected["video"] < again <= 3 * expected["video"]  # the last product is not needed again


def test_counts_of_one_precision_serve_no_other() -> None:
    keys = {
        key_of(dataclasses.replace(BASE, **given), WORK, True)  # type: ignore[arg-type]
        for given in ({}, {"residual": "float32"}, {"linear": "float8_emulated"}, {"compute_dtype": "float32"})
    }
    assert len(keys) == 4


def test_seconds_are_those_of_the_sheets_rate() -> None:
    clock = Clock(find_sheet("h100"))
    assert clock.kernel(Kernel("float8", int(900e12), 0)) == pytest.approx(1.0)
    assert clock.kernel(Kernel("gemm", int(680e12), 0)) == pytest.approx(1.0)
    assert bound({"float8": 980e12}, find_sheet("h100")) == pytest.approx(1.0)


def ask(gpu: str, *given: str) -> Question:
    keys = ["model=tiny", "run.id=x", "data.path=none", "data.batch_size=8", "parallel.ulysses=2", *given]
    return Question(compose_train(keys)[0], 2, 2, find_sheet(gpu), ClipSize(49, 64, 64))


FLOAT8 = ("parallel.linear=float8", "parallel.compile=inductor")


def test_a_plan_has_the_layouts_precision_and_a_gpu_without_float8_is_refused(
    counts: dict[str, dict[str, Counts]], model: JointConfig
) -> None:
    known = KnownCounts()
    plain, found = plan_run(ask("h100"), known), plan_run(ask("h100", *FLOAT8, "parallel.residual=float32"), known)
    assert found.layout["linear"] == "float8" and found.layout["residual"] == "float32"
    assert plain.layout["linear"] == plain.layout["residual"] == "compute"
    kernel_flops = found.what["kernel_flops"]
    assert kernel_flops["gemm"] + kernel_flops["float8"] == plain.what["kernel_flops"]["gemm"]
    assert found.what["kept_gib"] > plain.what["kept_gib"] and found.step.parts["float8"] > 0
    with pytest.raises(RunError, match="can't be planned for NVIDIA A100.*: its sheet has no float8_gemm_tflops"):
        plan_run(ask("a100", *FLOAT8), known)
    with pytest.raises(RunError, match="linear=float8_emulated can't be planned for a GPU"):
        plan_run(ask("h100", "parallel.linear=float8_emulated"), known)
