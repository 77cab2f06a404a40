"""What the planner counts of one unit, against formulas that know nothing of the program."""

import dataclasses

import pytest

from model.joint import JointConfig
from model.rope import audio_rotary, bridge_rotary, video_rotary
from train.config import compose_train
from train.parallel.flops import block_flops, bridge_flops
from train.parallel.mesh import ParallelConfig
from train.parallel.workload import Workload
from train.plan.count import SHAPES, Counts, Pass, count_step
from train.plan.kernels import Op

SENT_AGAIN = ("full", "attention", "outputs")
WORK = Workload(2, (13, 8, 8), 103)


@pytest.fixture(scope="module")
def model() -> JointConfig:
    return compose_train(["model=tiny", "run.id=x", "data.path=none"])[0].model


@pytest.fixture(scope="module")
def counts(model: JointConfig) -> dict[str, Counts]:
    parallel = ParallelConfig(ulysses=2, compute_dtype="bfloat16")
    return count_step(model, parallel, WORK, ("none", "selective", "outputs", "attention", "full"), gpu=True)


def flops(one: Pass, *kinds: str) -> int:
    return sum(op.flops * times for op, times in one.ops.items() if op.kind in kinds)


def test_forwards_have_the_flops_of_the_formulas(model: JointConfig, counts: dict[str, Counts]) -> None:
    video, audio, clips, every = WORK.video_tokens(model), WORK.audio_tokens(model), WORK.clips, model.text_length
    mine = video // 2
    formulas = {
        "video": block_flops(model.video, mine, video, every),
        "audio": block_flops(model.audio, audio, audio, every),
        "to_video": bridge_flops(mine, model.video.dim, audio, model.audio.dim),
        "to_audio": bridge_flops(audio, model.audio.dim, mine, model.video.dim),
    }
    for kind, found in counts.items():
        for shape, (products, attention) in formulas.items():
            assert flops(found[shape].forward, "gemm") == clips * products, (kind, shape)
            assert flops(found[shape].forward, "attention") == clips * attention, (kind, shape)


def test_backwards_cost_twice_the_products_and_two_and_a_half_attentions(
    model: JointConfig, counts: dict[str, Counts]
) -> None:
    mine, sound, video, audio = WORK.video_tokens(model) // 2, WORK.audio_tokens(model), model.video, model.audio
    narrow = {  # products that are narrower than their inputs
        "video": 2 * mine * video.ffn_dim * video.dim, "audio": 2 * sound * audio.ffn_dim * audio.dim, "to_video": 0,
        "to_audio": 4 * mine * video.dim * audio.dim,
    }  # fmt: skip
    for kind, found in counts.items():
        for shape in SHAPES:
            forward, backward = found[shape].forward, found[shape].backward
            again = flops(forward, "gemm") if kind != "none" else 0
            if kind == "outputs":
                again -= WORK.clips * narrow[shape]
            # The last products of a unit are not computed again where nothing in backward needs their results.
            products = flops(backward, "gemm") - 2 * flops(forward, "gemm")
            least = 0.5 if kind == "outputs" and shape == "to_audio" else 0.6  # of q and o there
            assert least * again <= products <= again, (kind, shape)
            assert flops(backward, "attention_backward") == 2.5 * flops(forward, "attention")
            attended_again = flops(backward, "attention")
            assert attended_again == (flops(forward, "attention") if kind == "full" else 0), (kind, shape)


def test_a_full_checkpoint_keeps_the_input_others_attention_and_what_is_exchanged_too(
    model: JointConfig, counts: dict[str, Counts]
) -> None:
    tokens, clips, dim = WORK.video_tokens(model) // 2, WORK.clips, model.video.dim
    state = 2 * clips * tokens * dim  # bfloat16
    assert counts["full"]["video"].kept == state
    lse = (
        4 * clips * model.video.num_heads * tokens
    )  # of self-attention (half of the heads, all tokens) and of the text
    assert counts["attention"]["video"].kept == 3 * state + 2 * lse
    assert counts["outputs"]["video"].kept == counts["attention"]["video"].kept + state  # of the feed-forward
    assert (
        counts["selective"]["video"].kept == (3 + 4) * state + 2 * lse + 2 * 2
    )  # q, k, v for these heads, answers for tokens, two tickets
    assert counts["none"]["video"].kept > 10 * state
    for shape in SHAPES:
        for between in ("outputs", "selective"):
            kept = [counts[kind][shape].kept for kind in ("full", "attention", between, "none")]
            assert kept == sorted(kept)


def test_exchanges_are_those_of_the_formula(model: JointConfig, counts: dict[str, Counts]) -> None:
    tokens, clips, width = WORK.video_tokens(model) // 2, WORK.clips, model.video.dim // model.video.num_heads
    away = tokens * (model.video.num_heads // 2)
    for kind, found in counts.items():
        forward, backward = found["video"].forward, found["video"].backward
        assert forward.sent["ulysses"] == 4 * away * clips * width * 2  # q, k, v and the answers, bfloat16
        assert backward.sent["ulysses"] == forward.sent["ulysses"] * (2 if kind in SENT_AGAIN else 1)
        assert not found["audio"].forward.sent and not found["to_video"].forward.sent
        assert found["to_audio"].forward.sent["sequence"] > 0


def test_q_and_k_are_projected_while_v_and_q_travel(model: JointConfig, counts: dict[str, Counts]) -> None:
    one = 2 * WORK.clips * (WORK.video_tokens(model) // 2) * model.video.dim**2  # FLOPs of a projection
    for kind, found in counts.items():
        forward, backward = (
            sum(op.flops * times for op, times in each.meanwhile.items() if op.kind == "gemm")
            for each in (found["video"].forward, found["video"].backward)
        )
        assert forward == 2 * one  # of q and k
        assert backward == (4 + 2 * (kind in SENT_AGAIN)) * one  # two each; again where they are sent again
        assert not found["audio"].forward.meanwhile and not found["to_audio"].backward.meanwhile


def test_what_is_computed_again_is_the_forward_once_more(counts: dict[str, Counts]) -> None:
    for shape in SHAPES:
        none, full = counts["none"][shape], counts["full"][shape]
        assert full.forward.ops[Op("memory", 0, 0)] == 0
        again = full.backward.launches - none.backward.launches
        assert 0.8 * none.forward.launches <= again <= none.forward.launches + 8
        # The memory of a backward that computes again: what the unit would have kept, and its backward.
        working = none.kept - full.kept + none.backward.peak
        assert full.backward.peak == pytest.approx(max(working, none.forward.peak), rel=0.05)


def test_kernels_of_a_cpu_are_more_than_those_of_a_gpu(model: JointConfig) -> None:
    parallel = ParallelConfig(compute_dtype="bfloat16")
    gpu, cpu = (count_step(model, parallel, WORK, ["none"], on_gpu)["none"]["video"] for on_gpu in (True, False))
    assert cpu.kept == gpu.kept and cpu.forward.launches > gpu.forward.launches  # RMSNorm in several steps
    assert cpu.forward.flops == gpu.forward.flops
    alone = dataclasses.replace(WORK, clips=1)
    half = count_step(model, parallel, alone, ["none"], gpu=True)["none"]["video"]
    assert 2 * half.forward.flops == gpu.forward.flops and not half.forward.sent


@pytest.mark.parametrize("first", ["selective", "full"])
def test_kinds_counted_together_are_as_if_each_were_counted_alone(
    model: JointConfig, counts: dict[str, Counts], first: str
) -> None:
    alone = count_step(model, ParallelConfig(ulysses=2, compute_dtype="bfloat16"), WORK, [first], gpu=True)[first]
    together = counts[first]
    assert {shape: alone[shape] for shape in SHAPES} == {shape: together[shape] for shape in SHAPES}
    for name in ("forward", "backward"):
        one, other = getattr(alone["rest"], name), getattr(together["rest"], name)
        assert (one.ops, one.sent, one.calls) == (other.ops, other.sent, other.calls)
    # Units that are computed again keep the vectors of time that they are given, others what they make of them.
    vectors = 4 * WORK.clips * 6 * (model.video.dim + model.audio.dim)
    assert alone["rest"].kept - together["rest"].kept == vectors


def test_counting_leaves_no_fake_tensor_in_the_tables_of_the_process(model: JointConfig) -> None:
    for table in (video_rotary, audio_rotary, bridge_rotary):
        table.cache_clear()
    count_step(model, ParallelConfig(compute_dtype="bfloat16"), WORK, ["none"], gpu=True)
    assert [table.cache_info().currsize for table in (video_rotary, audio_rotary, bridge_rotary)] == [0, 0, 0]
