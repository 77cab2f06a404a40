"""Clips without sound and without picture, from shards through the stream: they train the other tower, and nothing
else. One launch of two ranks."""

import math

import pytest
import torch
import torch.distributed.checkpoint as dcp

from data.clip import Bucket
from tests.distributed import run_cases
from tests.selection import chosen
from tests.shards import make_dataset
from tests.train import absent_cases as cases
from tests.train import runs

EVERY_EXACT: dict[str, tuple[int, dict]] = {
    "fsdp": (4, {}),
    "fsdp, accumulated": (1, {}),
    "fsdp, accumulated whole": (1, {"accumulate": "unsharded", "recompute": "full"}),
    "replicas": (2, {"dp_replicate": 2}),
    "ulysses, accumulated": (2, {"ulysses": 2}),
    "ring": (4, {"ring": 2}),
}
EXACT = chosen(EVERY_EXACT, "fsdp", "fsdp, accumulated whole", "ulysses, accumulated", "ring")
EXACT_64 = {name: (micro, parallel | {"compute_dtype": "float64"}) for name, (micro, parallel) in EXACT.items()}
EVERY_ZERO = {  # engine, micro-batch, what is absent
    "zero1, mute": ("zero1", 1, "mute"), "zero2, blind": ("zero2", 2, "blind"),
    "zero3, mute": ("zero3", 1, "mute"), "zero3, blind": ("zero3", 2, "blind"),
}  # fmt: skip
ZERO = chosen(EVERY_ZERO, "zero1, mute", "zero3, blind")
EVERY_LAYOUT: dict[str, tuple[int, dict]] = {  # name: (steps without a modality, degrees)
    "fsdp": (10, {}),
    "fsdp, moments on the host": (2, {"optimizer_state": "host"}),
    "replicas": (10, {"dp_replicate": 2}),
    "ulysses": (2, {"ulysses": 2}),
    **{f"zero{stage}": (2, {"engine": f"zero{stage}"}) for stage in (1, 2, 3)},
}
LAYOUTS = chosen(EVERY_LAYOUT, "fsdp", "ulysses", "zero2", "zero3")
VALIDATED = chosen({"fsdp": {}, "zero3": {"engine": "zero3"}}, "fsdp")
KINDS = ("mute", "blind")
# Of the runs, whose clips are smaller.
CLIP, MUTE, BLIND = (
    Bucket(frames=2, height=4, width=4, audio_steps=9, fps=24.0, has_video=video, has_audio=audio)
    for video, audio in ((True, True), (True, False), (False, True))
)
TURNS = (2, 6, 8, 12)  # steps at which the data of the run changes, and its end


def validated(folder, parallel):
    return cases.validated(folder, **parallel)


def as_alone(folder, kind, micro, parallel):
    return cases.as_alone(folder, kind, micro, **parallel)


def untouched(folder, steps, parallel):
    return cases.untouched(folder, steps, **parallel)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    root = tmp_path_factory.mktemp("absent")
    for seed, (kind, bucket) in enumerate(cases.BUCKETS.items()):
        make_dataset(root / kind, [(bucket, 9)], seed=seed, dim=8)
    full, mute, blind = cases.BUCKETS.values()
    make_dataset(root / "mixed", [(full, 1), (mute, 2), (full, 2), (blind, 2)], seed=5, dim=8)
    for kind in KINDS:
        torch.save(cases.tower_alone(root, kind), root / f"{kind}.pt")
    for seed, (name, bucket) in enumerate({"both": CLIP, "soundless": MUTE, "pictureless": BLIND}.items()):
        make_dataset(root / "run" / name, [(bucket, 9)], seed=seed)
    make_dataset(root / "run" / "valid", [(CLIP, 1), (MUTE, 2), (CLIP, 1), (BLIND, 3)], seed=9)
    return root, run_cases(
        2,
        {
            **{f"{name}, {kind}": (as_alone, (root, kind, *case)) for name, case in EXACT_64.items() for kind in KINDS},
            **{
                name: (as_alone, (root, kind, micro, {"engine": engine}))
                for name, (engine, micro, kind) in ZERO.items()
            },
            **{f"untouched, {name}": (untouched, (root, *case)) for name, case in LAYOUTS.items()},
            **{f"validated, {name}": (validated, (root, parallel)) for name, parallel in VALIDATED.items()},
            "run": (runs.train, (root / "run", root / "run/both", "long", *segments(root / "run"))),
            "never heard": (
                runs.train,
                (root / "run", root / "run/soundless", "never", "steps=2", "ema.decay=0.9", "validation.every=2",
                 f"data.valid_path={root}/run/soundless"),
            ),
        },
    )  # fmt: skip


def segments(root):
    """A run over full clips, soundless ones, full ones, pictureless ones, with a checkpoint at each change."""
    later = zip(TURNS, ("soundless", "both", "pictureless"), strict=False)
    named = ", ".join(f"{{first_step: {step}, datasets: [{{path: {root / name}}}]}}" for step, name in later)
    return (
        f"data.segments=[{named}]", f"steps={TURNS[-1]}", "checkpoint.every=2", "checkpoint.keep=99", "ema.decay=0.9",
        "optim.weight_decay=0.1", f"data.valid_path={root / 'valid'}", "validation.every=6", "validation.samples=7",
        "objective.clean_video_prob=0.4", "objective.clean_audio_prob=0.4", "monitor.every=1", "monitor.peak_tflops=1",
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EXACT)
def test_the_present_tower_learns_as_it_does_alone(ranks, name, kind):
    """Gradients (the same parameters have one), norms, losses and what two AdamW steps move."""
    for result in ranks[1][f"{name}, {kind}"]:
        assert result["gradient"][0] <= 1e-10, result["gradient"]
        assert max(result["loss"], result["norm"], result["moved"]) <= 1e-10, result


@pytest.mark.parametrize("name", ZERO)
def test_under_zero_it_learns_as_it_does_alone(ranks, name):
    for result in ranks[1][name]:
        assert max(result["loss"], result["norm"]) <= 1e-5 and result["moved"] <= 1e-3, result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_absent_stays_bit_identical(ranks, name, kind):
    """Steps of AdamW with decay, moments and averages that are there: 0 of all tensors move, no count rises."""
    there, steps = {"mute": ("video_dit", "video_dit_2"), "blind": ("audio_dit",)}[kind], LAYOUTS[name][0]
    for result in ranks[1][f"untouched, {name}"]:
        found = result[kind]
        assert found["moved"] == [] and found["of"] > 100 and found["kinds"] == {"model", "optim", "ema"}
        assert found["still"] == []
        counts = {tower: (steps // len(there) if tower in there else 0) for tower in found["stepped"]}
        assert found["stepped"] == found["averaged"] == counts


@pytest.mark.parametrize("name", VALIDATED)
def test_validation_counts_each_modality_where_it_is(ranks, name):
    """Two ranks whose rows have other modalities at the same time would wait for each other for ever."""
    for result in ranks[1][f"validated, {name}"]:
        found, expected = result["found"], result["expected"]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-4), key


def tensors_of(run, step):
    path = run / "checkpoints" / f"step-{step:08d}"
    described = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {key: torch.empty(one.size) for key, one in described.items()}
    dcp.load(tensors, checkpoint_id=path, no_dist=True)
    return tensors


@pytest.mark.parametrize("kind,first,last", [("mute", 2, 6), ("blind", 8, 12)])
def test_a_run_leaves_what_is_absent_untouched(ranks, kind, first, last):
    root, results = ranks
    assert results["run"][0].get("ending") == "finished", results["run"]
    before, after = (tensors_of(root / "run" / "long", step) for step in (first, last))
    absent = [key for key in before if key.partition(".")[2].startswith(cases.ABSENT[kind])]
    assert before.keys() == after.keys() and len(absent) > 100
    assert [key for key in absent if not torch.equal(before[key], after[key])] == []
    assert all(not torch.equal(before[key], after[key]) for key in before.keys() - set(absent))


def test_metrics_say_nothing_of_what_is_absent(ranks):
    training, valid = runs.metrics(ranks[0] / "run", "long")
    parts = {"mute": training[2:6], "blind": training[8:12]}
    missing = {"mute": ("audio", ("audio", "bridge")), "blind": ("video", ("video_high", "video_low", "bridge"))}
    for kind, steps in parts.items():
        modality, groups = missing[kind]
        for record in steps:
            assert record["train/loss"] > 0 and record[f"train/loss_{modality}"] is None
            assert not [key for key in record if key.startswith(f"train/loss_{modality}_noise")]
            assert not [key for key in record for group in groups if key in named(group)]
            assert "train/bridge_video" not in record and "train/bridge_audio" not in record
        other = {"mute": "video_high", "blind": "audio"}[kind]
        assert steps[0][f"train/grad_norm_{other}"] > 0 and steps[0][f"train/update_ratio_{other}"] > 0
    full = training[6]
    assert full["train/loss_audio"] > 0 and full["train/bridge_video"] > 0 and full["train/grad_norm_bridge"] > 0
    assert [x["step"] for x in valid] == [0, 6, 12]
    assert all(value is not None and math.isfinite(value) for record in valid for value in record.values())


def named(group):
    return f"train/grad_norm_{group}", f"train/update_ratio_{group}"


def test_a_tower_that_never_had_its_modality_has_its_starting_weights_and_no_moments(ranks):
    root, results = ranks
    assert results["never heard"][0].get("ending") == "finished", results["never heard"]
    tensors = tensors_of(root / "run" / "never", 2)
    assert not [key for key in tensors if key.startswith(("optim.audio_dit", "optim.dual_tower_bridge"))]
    for key in [key for key in tensors if key.startswith(("ema.audio_dit", "ema.dual_tower_bridge"))]:
        assert torch.equal(tensors[key], tensors[key.replace("ema.", "model.", 1)])
    _, valid = runs.metrics(root / "run", "never")
    for record in valid:
        assert record["valid/loss"] == record["valid/video"] and "valid/audio" not in record
        assert not [key for key in record if "audio" in key]
