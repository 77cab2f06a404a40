"""Plans of MOVA on H100: against an independent count of its step, against each other, and what a search varies."""

import dataclasses

import pytest

from train.config import compose_train
from train.parallel.flops import forward_flops
from train.plan.plan import GIB, KnownCounts, Plan, plan_run
from train.plan.question import ClipSize, Question, find_sheet
from train.plan.search import candidates, reason, variations, with_budget, with_layout

CLIP = ClipSize(193, 352, 640)
COUNTED = KnownCounts()  # of eight ranks that share a clip, for all tests of this file

pytestmark = pytest.mark.slow


def asked(world: int, batch: int = 128, **settings: object) -> Question:
    given = [f"parallel.{key}={value}" for key, value in {"ulysses": 8, "recompute": "selective", **settings}.items()]
    config, _ = compose_train(["model=mova_360p", "run.id=x", "data.path=none", f"data.batch_size={batch}", *given])
    return Question(config, world, 8, find_sheet("h100"), CLIP)


def planned(world: int, batch: int = 128, **settings: object) -> Plan:
    return plan_run(asked(world, batch, **settings), COUNTED)


def test_the_step_is_that_of_an_independent_count_and_model() -> None:
    """64 H100, a clip on eight of them, nothing computed again, elementwise work in few passes, one FSDP2 unit for a
    layer's Bridge and sound, weights fetched two ahead: 2.239 s by op tables that anomaly mode named by source line and
    a time model of their own, with the same rates; its FLOPs by the formula of one forward."""
    plan = planned(64, batch=8, recompute="none")
    assert plan.step.seconds == pytest.approx(2.239, rel=0.05)
    model = plan.question.config.model
    assert plan.what["model_flops"] == pytest.approx(3 * forward_flops(model, CLIP.grid, CLIP.audio_steps).total / 8)
    assert plan.mfu == pytest.approx(plan.what["model_flops"] / plan.step.seconds / 989e12)


def test_what_is_computed_again_costs_time_and_saves_memory() -> None:
    kinds = ("none", "selective", "attention", "full")
    none, selective, attention, full = (planned(64, batch=8, recompute=kind) for kind in kinds)
    assert none.step.seconds < selective.step.seconds < attention.step.seconds < full.step.seconds
    assert none.peak.total > selective.peak.total > attention.peak.total > full.peak.total
    assert none.mfu == none.hfu and attention.mfu < selective.mfu < selective.hfu < full.hfu
    # Each forward once more, the last products of a unit excepted: 3 -> 4 forwards.
    assert 1.28 < full.hfu / full.mfu < 4 / 3 + 1e-9
    assert reason(none, none) == "the fastest that fits" and "slower" in reason(full, none)


def test_more_gpus_take_fewer_days_and_at_least_as_many_gpu_days() -> None:
    plans = [planned(world, dp_replicate=world // 16) for world in (16, 64, 256, 1024)]
    days = [plan.total_days for plan in plans]
    assert days == sorted(days, reverse=True)
    spent = [plan.total_days * plan.question.world for plan in plans]
    assert all(later > 0.97 * before for before, later in zip(spent, spent[1:], strict=False))
    for plan in plans:
        found = plan.as_dict()
        clips = found["clips_per_day"]
        assert clips * found["days"]["total"] == pytest.approx(plan.question.steps * 128)
        assert found["bound_seconds"] < plan.step.seconds and clips < 128 * 86400 / plan.step.seconds


def test_moments_on_the_host_pass_its_link_there_and_back() -> None:
    here, there = (planned(8, batch=1, recompute="full", optimizer_state=place) for place in ("device", "host"))
    learned = 14_288_901_184 + 1_419_193_472 + 2_659_737_600  # one expert, the audio tower and the Bridge
    seconds = learned / 8 * 2 * 4 * 2 / 52e9
    assert there.step.seconds - here.step.seconds == pytest.approx(seconds, rel=0.01)
    assert (here.peak.parts["moments"] - there.peak.parts["moments"]) / GIB == pytest.approx(30.4, abs=0.1)
    assert not there.peak.parts["moments"] and there.host["moments"] / GIB == pytest.approx(8 * 30.4, abs=1)


def test_a_checkpoint_and_the_files_of_1024_ranks() -> None:
    """bench/results/checkpoint-plan.md: 14,940 tensors, .metadata of 84 MB at 16 x 64 ranks, with averages."""
    question = asked(1024, dp_replicate=16)
    config = dataclasses.replace(question.config, ema=dataclasses.replace(question.config.ema, decay=0.999))
    found = plan_run(dataclasses.replace(question, config=config), COUNTED).as_dict()
    assert found["checkpoint_tensors"] == 14_940
    assert found["checkpoint_metadata_mb"] == pytest.approx(84, rel=0.02)
    assert found["checkpoint_gib"]["total"] == pytest.approx(32_656_733_440 * 16 / GIB, rel=1e-3)
    assert found["file_descriptors"] == 1024 + 5 * 1023


def test_zero_is_refused_with_what_it_holds_at_least() -> None:
    with pytest.raises(Exception, match=r"zero1 can't be planned.* at least 9\d\.\d GiB on each GPU"):
        planned(1024, engine="zero1")


def test_a_search_tries_every_way_to_share_a_clip_and_varies_what_fits() -> None:
    question = asked(64)
    layouts = [*candidates(question)]
    assert {(one.ring, one.ulysses) for one in layouts} == {(r, u) for r in (1, 2, 4) for u in (1, 2, 4, 8)}
    assert {one.dp_replicate for one in layouts} == {1, 2, 4, 8} and len(layouts) == len({str(one) for one in layouts})
    question = asked(64, recompute="full")
    small = dataclasses.replace(question, gpu=dataclasses.replace(question.gpu, memory_gib=40.0))
    plan = plan_run(small, COUNTED)
    changed = [*variations(plan)]
    budget, clips, whole = (one.config for one in changed)
    assert clips.data.micro_batch == 2 and whole.parallel.accumulate == "unsharded"
    fitted = plan_run(changed[0], COUNTED)
    if raised := with_budget(fitted):  # a run reckons with other kernels than those that a plan counts
        fitted = plan_run(raised, COUNTED)
    assert budget.parallel.recompute == "budget" and fitted.fits and fitted.step.seconds < plan.step.seconds
    assert sum(fitted.memory.values()) / GIB > 0.9 * small.gpu.memory_gib, "memory is left unused"
    assert with_layout(question, layouts[0]).config.parallel is layouts[0]
