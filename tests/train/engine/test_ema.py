"""The average of the weights: against a plain float64 reference, under every engine, over resumes, in samples."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from core.errors import RunError
from data.clip import Bucket
from tests.distributed import run_cases
from tests.selection import chosen
from tests.shards import make_dataset
from tests.train import cases, runs
from tests.train.engine.zero_cases import STEADY, steps, whole
from train.engine.engine import ShardedEngine, build_engine
from train.generate import load_model
from train.parallel.mesh import ParallelConfig, make_layout
from train.parallel.parallelize import fill_weights

DECAY = 0.2  # above the warm-up's 0.1 and 0.18 of the first updates, below that of later ones
EXPERTS = {"high": "video_dit", "low": "video_dit_2"}
LAYOUTS: dict[str, dict] = {
    "fsdp2": {},
    "hsdp": {"dp_replicate": 2},
    "ulysses": {"ulysses": 2},
    **{f"zero{stage}": {"engine": f"zero{stage}"} for stage in (1, 2, 3)},
}
FOLLOWED = chosen(LAYOUTS, "fsdp2", "ulysses", "zero1", "zero3")
SWAPPED = chosen({name: LAYOUTS[name] for name in ("fsdp2", "zero1", "zero3")}, "fsdp2", "zero3")
BAD = 3  # the step with a NaN
CLIP = Bucket(frames=2, height=4, width=4, audio_steps=9, fps=24.0, has_video=True, has_audio=True)


def make(config=None, decay: float = DECAY, **parallel):
    settings = ParallelConfig(**parallel)
    layout = make_layout(settings, torch.device("cpu"))
    engine = build_engine(config or cases.tiny_config(), settings, STEADY, layout, seed=0, ema_decay=decay)
    if isinstance(engine, ShardedEngine):
        fill_weights(engine.model, cases.busy_value)
        if engine.optimizer.average is not None:
            engine.optimizer.average.restart()
    else:
        engine.fill(cases.busy_value)
    return engine, layout


def followed(layout_name: str) -> dict:
    """Six steps in turns, one of them not finite; what each did to the averages, and the reference's end."""
    engine, layout = make(**LAYOUTS[layout_name])
    before = whole(engine)
    names = [key.removeprefix("model.") for key in before if key.startswith("model.")]
    start = all(torch.equal(before[f"ema.{name}"], before[f"model.{name}"]) for name in names)
    reference = {name: before[f"model.{name}"].double() for name in names}
    counts = dict.fromkeys((*EXPERTS.values(), "audio_dit", "dual_tower_bridge"), 0)
    moved_wrongly, suppressed = [], True
    for step in range(6):
        steps(engine, layout, range(step, step + 1), micro=1, nan=step == BAD)
        after = whole(engine)
        changed = {name for name in names if not torch.equal(before[f"ema.{name}"], after[f"ema.{name}"])}
        if step == BAD:
            suppressed = not changed
        else:
            idle = EXPERTS[("low", "high")[step % 2]]
            moved_wrongly += [name for name in changed if name.startswith(f"{idle}.")]
            for tower in counts:
                if tower != idle:
                    decay = min(DECAY, (1 + counts[tower]) / (10 + counts[tower]))
                    counts[tower] += 1
                    for name in names:
                        if name.startswith(f"{tower}."):
                            reference[name] += (1 - decay) * (after[f"model.{name}"].double() - reference[name])
        before = after
    far = max((before[f"ema.{n}"].double() - reference[n]).abs().max().item() for n in names)
    apart = min((before[f"ema.{n}"] - before[f"model.{n}"]).abs().max().item() for n in names)
    return {
        "start": start, "far": far, "apart": apart, "moved_wrongly": moved_wrongly, "suppressed": suppressed,
        "counts": engine.average_counts() == counts, "dtypes": {before[f"ema.{n}"].dtype for n in names},
        "end": {n: before[f"ema.{n}"] for n in names},
    }  # fmt: skip


def swapped(layout_name: str) -> dict:
    """What the model says with its averages in place, against a model that has them as its weights."""
    config = cases.tiny_config(trainable_condition_scale=True)
    engine, layout = make(config, **LAYOUTS[layout_name])
    steps(engine, layout, range(3))
    before = whole(engine)

    def say(model) -> torch.Tensor:
        (prepared,) = cases.my_micro_batches(cases.global_batch(7, torch.float32), layout, 4)
        batch, draws = prepared.batch, prepared.draws
        with torch.no_grad():
            out = model(
                video=draws.noise_video, audio=draws.noise_audio, condition=batch.condition.float(),
                text=batch.text, t_video=draws.t_video, t_audio=draws.t_audio, fps=24.0, expert="low",
            )  # fmt: skip
        return torch.cat([out.video.flatten(), out.audio.flatten()])

    raw = say(engine.model)
    with engine.averaged():
        found = say(engine.model)
    again, after = say(engine.model), whole(engine)
    plain = cases.reference_model(config, torch.float32)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(before[f"ema.{name}"])
    expected = say(plain)
    return {
        "far": ((found - expected).norm() / expected.norm()).item(),
        "apart": ((raw - expected).norm() / expected.norm()).item(),
        "restored": torch.equal(raw, again) and all(torch.equal(before[key], after[key]) for key in before),
    }


def unkept() -> bool:
    """Without a decay there is nothing."""
    engine, layout = make(decay=0.0)
    steps(engine, layout, range(1))
    return not engine.average_counts() and not any(key.startswith("ema.") for key in engine.tensors())


def loaded(path: Path, weights: str | None) -> dict[str, torch.Tensor] | str:
    settings = ParallelConfig()
    try:
        model, _ = load_model(path, settings, make_layout(settings, torch.device("cpu")), weights)
    except RunError as error:
        return str(error)
    return cases.full(dict(model.named_parameters()))


def with_kill(after, *arguments):
    return runs.train(*arguments, kill_after=after)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    root = tmp_path_factory.mktemp("ema")
    make_dataset(root / "data", [(CLIP, 9), (CLIP, 6)])
    make_dataset(root / "valid", [(CLIP, 4)], seed=1)
    common = (f"data.valid_path={root / 'valid'}", "optim.eps=1e-4")
    kept = (*common, "ema.decay=0.9", "steps=7", "checkpoint.every=4", "checkpoint.keep=9")
    late = ("ema.decay=0.9", "checkpoint.every=4", "checkpoint.keep=9")
    end = root / "broken" / "checkpoints" / "step-00000007"
    return root, run_cases(
        2,
        {
            **{name: (followed, (name,)) for name in FOLLOWED},
            **{f"swapped {name}": (swapped, (name,)) for name in SWAPPED},
            "unkept": (unkept, ()),
            "unbroken": (runs.train, (root, root / "data", "unbroken", *kept)),
            "stopped": (with_kill, (3, root, root / "data", "broken", *kept)),
            "resumed": (runs.train, (root, root / "data", "broken", *kept)),
            "under zero": (runs.train, (root, root / "data", "unbroken", *kept, "steps=9", "parallel=zero3")),
            "without": (runs.train, (root, root / "data", "late", "steps=3", *common)),
            "newly on": (runs.train, (root, root / "data", "late", "steps=4", *common, *late)),
            "load raw": (loaded, (end, "raw")),
            "load ema": (loaded, (end, "ema")),
            "load default": (loaded, (end, None)),
            "load none": (loaded, (root / "late" / "checkpoints" / "step-00000003", "ema")),
            "load other": (loaded, (end, "best")),
        },
    )


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    described = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {key: torch.empty(one.size) for key, one in described.items()}
    dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    return tensors


@pytest.mark.parametrize("name", FOLLOWED)
def test_it_is_the_average_of_a_float64_reference_with_each_expert_counting_its_own_steps(ranks, name):
    for result in ranks[1][name]:
        assert result["start"] and result["counts"] and result["dtypes"] == {torch.float32}
        assert result["far"] < 1e-6 and result["apart"] > 1e-5


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_idle_expert_and_a_suppressed_step_change_no_bit(ranks, name):
    for result in ranks[1][name]:
        assert result["moved_wrongly"] == [] and result["suppressed"]


def test_two_ranks_keep_what_one_keeps(ranks):
    (alone,) = run_cases(1, {"fsdp2": (followed, ("fsdp2",))})["fsdp2"]
    for name in FOLLOWED:
        end = ranks[1][name][0]["end"]
        assert max((end[n] - alone["end"][n]).abs().max().item() for n in end) < 1e-4 * STEADY.lr_bridge / 1e-3


@pytest.mark.parametrize("name", SWAPPED)
def test_the_model_computes_with_averages_and_gets_its_weights_back(ranks, name):
    for result in ranks[1][f"swapped {name}"]:
        assert result["far"] < 1e-5 < 100 * result["far"] + 1e-4 < result["apart"] and result["restored"]


def test_without_a_decay_nothing_is_kept(ranks):
    assert all(ranks[1]["unkept"])


def test_a_resumed_run_has_the_averages_of_the_unbroken_one_bit_for_bit(ranks):
    root, results = ranks
    endings = [results[name][0].get("ending") for name in ("unbroken", "stopped", "resumed")]
    assert endings == ["finished", "stopped", "finished"], results
    whole_run, broken = (tensors_of(root / name / "checkpoints" / "step-00000007") for name in ("unbroken", "broken"))
    assert whole_run.keys() == broken.keys() and sum(key.startswith("ema.") for key in broken) > 20
    assert all(torch.equal(whole_run[key], broken[key]) for key in broken)
    (_, valid), (_, broken_valid) = (runs.metrics(root, name) for name in ("unbroken", "broken"))
    assert [x for x in valid if x["step"] <= 7] == broken_valid
    assert broken_valid[0]["valid/ema/loss"] == broken_valid[0]["valid/loss"]  # before the first step
    assert broken_valid[-1]["valid/ema/loss"] != broken_valid[-1]["valid/loss"]


def test_averages_pass_to_another_engine(ranks):
    root, results = ranks
    assert results["under zero"][0].get("ending") == "finished", results["under zero"]
    earlier, later = (tensors_of(root / "unbroken" / "checkpoints" / f"step-0000000{n}") for n in (7, 9))
    # Two steps more at decays of at least 0.5: nearer to where they were than the weights, but moved.
    for key in (key for key in later if key.startswith("ema.")):
        moved = (later[key] - earlier[key]).abs().max()
        assert 0 < moved < 4 * 1e-2, key


def test_averages_that_begin_late_begin_from_the_weights(ranks):
    root, results = ranks
    assert results["without"][0]["ending"] == "finished" and results["newly on"][0].get("ending") == "finished", results
    earlier, later = (tensors_of(root / "late" / "checkpoints" / f"step-0000000{n}") for n in (3, 4))
    assert not any(key.startswith("ema.") for key in earlier)
    for key, value in later.items():
        if not key.startswith("ema."):
            continue
        weight, before = later[key.replace("ema.", "model.", 1)], earlier[key.replace("ema.", "model.", 1)]
        expected = before if ".video_dit." in key else before + 0.9 * (weight - before)  # step 3 trains the other one
        assert torch.allclose(value, expected, rtol=1e-5, atol=1e-7), key


def test_a_sample_takes_the_averages_unless_told_otherwise(ranks):
    root, results = ranks
    tensors = tensors_of(root / "broken" / "checkpoints" / "step-00000007")
    for case, kind in (("load raw", "model"), ("load ema", "ema"), ("load default", "ema")):
        found = results[case][0]
        assert all(torch.equal(value, tensors[f"{kind}.{name}"]) for name, value in found.items()), case
    assert "has no averages (ema.decay was 0): give weights=raw" in results["load none"][0]
    assert "weights=best: give ema or raw" in results["load other"][0]
