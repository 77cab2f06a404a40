"""Frozen parts (optim.train): under every engine the others learn as on one process, and nothing is kept, sent or moved
of what is frozen."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import UserError
from data.clip import Bucket
from model.joint import JointTransformer
from tests.distributed import run_cases
from tests.selection import chosen
from tests.shards import make_dataset
from tests.train import cases, runs
from tests.train.cases import OBJECTIVE, OPTIM, global_batch, my_micro_batches, reference_model, tiny_config
from tests.train.engine.test_ema import tensors_of
from tests.train.engine.zero_cases import STEADY, relative, whole
from train.config import compose_train
from train.engine.engine import build_engine
from train.engine.optim import local
from train.engine.optim_config import OptimConfig, decay_of, rate_of
from train.generate import load_model
from train.monitor.counters import CollectiveCounter
from train.objective.objective import Objective
from train.parallel.host_memory import host_bytes
from train.parallel.mesh import ParallelConfig, make_layout
from train.parallel.parallelize import fill_weights, recompute_kinds
from train.parallel.parts import GROUPS, TOWERS, PartConfig, PartsConfig, trained_towers
from train.parallel.traffic import step_bytes
from train.parallel.workload import Workload
from train.step import forward_backward

ZERO = {f"zero{stage}": {"engine": f"zero{stage}"} for stage in (1, 2, 3)}
LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp2": {"compute_dtype": "float64"},
    "fsdp2, recomputed": {"compute_dtype": "float64", "recompute": "full"},
    "hsdp": {"compute_dtype": "float64", "dp_replicate": 2},
    "ulysses": {"compute_dtype": "float64", "ulysses": 2},
    "fsdp2, host": {"optimizer_state": "host", "accumulate": "unsharded"},
    **ZERO,
}
AUDIO, LOW = ["audio"], ["video_low", "bridge"]
LEARNED: dict[str, tuple[str, list[str]]] = chosen(
    {
        **{f"{name}, bridge": (name, ["bridge"]) for name in LAYOUTS},
        "fsdp2, audio": ("fsdp2", AUDIO), "zero3, audio": ("zero3", AUDIO),
        "hsdp, low": ("hsdp", LOW), "zero1, low": ("zero1", LOW),
    },
    "fsdp2, bridge", "fsdp2, host, bridge", "ulysses, bridge", "hsdp, low", "zero2, bridge", "zero3, audio",
)  # fmt: skip
ALONE = {  # what is given, and the objective that leaves out the other modality
    "audio": replace(OBJECTIVE, video_weight=0.0, bridge_dropout=1.0),
    "video": replace(OBJECTIVE, audio_weight=0.0, bridge_dropout=1.0),
    "both": OBJECTIVE,
}
EVERY_SENT: dict[str, tuple[list[str], str, dict[str, Any]]] = {  # what trains, what is given, degrees
    "bridge": (["bridge"], "both", {}),
    "bridge, hsdp, bf16": (["bridge"], "both", {"dp_replicate": 2, "compute_dtype": "bfloat16"}),
    "bridge, ulysses, recomputed": (["bridge"], "both", {"ulysses": 2, "recompute": "full"}),
    "audio": (["audio"], "both", {}),
    "audio alone": (["audio"], "audio", {}),
    "low": (["video_low"], "both", {}),
    "video alone": (["video"], "video", {}),
    "nothing in it": (["audio"], "video", {}),
    "all": (["video", "audio", "bridge"], "both", {}),
}
SENT = chosen(EVERY_SENT, "bridge", "bridge, hsdp, bf16", "audio alone", "low", "video alone", "nothing in it")
BF16 = {"engine": "zero2", "compute_dtype": "bfloat16"}
FIFTY = chosen({"fsdp2": {}, "zero1": ZERO["zero1"], "zero2, bf16": BF16, "zero3": ZERO["zero3"]}, "zero2, bf16")
NOTHING = chosen(dict.fromkeys(("fsdp2", "zero2", "zero3")), "fsdp2", "zero3")
EVERY_PRESET = {  # and the data that they get: the parts that learn
    ("audio_pretrain", "sound"): {"audio_dit"},
    ("audio_pretrain", "data"): {"audio_dit"},
    ("video_continue", "data"): {"video_dit", "video_dit_2"},
    ("joint_warm", "data"): {"dual_tower_bridge"},
    ("joint", "data"): {"video_dit", "video_dit_2", "audio_dit", "dual_tower_bridge"},
}
PRESETS = chosen(EVERY_PRESET, ("audio_pretrain", "sound"), ("joint_warm", "data"))
CLIP = Bucket(frames=2, height=4, width=4, audio_steps=9, fps=24.0, has_video=True, has_audio=True)


def make(train: list[str], parallel: dict[str, Any], optim: OptimConfig = STEADY, decay: float = 0.0) -> Any:
    settings = ParallelConfig(**parallel)
    layout = make_layout(settings, torch.device("cpu"))
    config = tiny_config(trainable_condition_scale=True)
    engine: Any = build_engine(config, settings, replace(optim, train=train), layout, seed=0, ema_decay=decay)
    if settings.engine == "fsdp2":
        fill_weights(engine.model, cases.busy_value)
        if decay:
            engine.optimizer.average.restart()
    else:
        engine.fill(cases.busy_value)
    return engine, layout


def towers(train: list[str]) -> frozenset[str]:
    return trained_towers(train, ("high", "low"))


def train_step(engine, layout, step: int, dtype=torch.float32, given: str = "both", micro: int = 1) -> float:
    prepared = global_batch(step, dtype)
    prepared = replace(prepared, batch=Objective(ALONE[given], ("high", "low")).alone(prepared.batch))
    expert = ("high", "low")[step % 2]
    mine = my_micro_batches(prepared, layout, micro)
    forward_backward(engine.model, mine, ALONE[given], expert, layout, engine.backward)
    return engine.step(1.0, expert).item()


def parity(layout_name: str, train: list[str]) -> dict:
    """Three clipped AdamW steps, both experts, against torch's own autograd, clipping and optimizer on one process.
    Audio has an LR, the Bridge a weight decay of its own."""
    dtype = getattr(torch, LAYOUTS[layout_name].get("compute", "float32"))
    plain = reference_model(tiny_config(trainable_condition_scale=True), dtype)
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for name, p in plain.named_parameters():
        p.requires_grad_(name.split(".")[0] in towers(train))
    parts = PartsConfig(audio=PartConfig(lr=3e-3), bridge=PartConfig(weight_decay=0.1))
    settings = {"betas": tuple(STEADY.betas), "eps": STEADY.eps}
    groups = [
        {"params": [*plain.audio_dit.parameters()], "lr": 3e-3, "weight_decay": 0.01},
        {"params": [*plain.dual_tower_bridge.parameters()], "lr": 2e-3, "weight_decay": 0.1},
        {"params": [*plain.video_dit.parameters(), *plain.video_dit_2.parameters()], "lr": 1e-3, "weight_decay": 0.01},
    ]
    adamw = torch.optim.AdamW(groups, **settings)
    true = []
    for step in range(3):
        cases.backward(plain, [global_batch(step, dtype)], step)
        true.append(torch.nn.utils.clip_grad_norm_(plain.parameters(), OPTIM.clip).item())
        adamw.step()
        adamw.zero_grad()
    engine, layout = make(train, LAYOUTS[layout_name], replace(STEADY, parts=parts))
    norms = [train_step(engine, layout, step, dtype) for step in range(3)]
    tensors = whole(engine)
    learned = [name for name in start if name.split(".")[0] in towers(train)]
    return {
        "moved": relative(
            {name: tensors[f"model.{name}"].to(dtype) - start[name] for name in learned},
            {name: p.detach() - start[name] for name, p in plain.named_parameters()
             if name in learned},
        ),
        "norms": max(abs(a / b - 1) for a, b in zip(norms, true, strict=True)),
        "exact": dtype == torch.float64,
        "frozen": all(torch.equal(tensors[f"model.{n}"].to(dtype), start[n]) for n in start if n not in learned),
        "kept": {key.split(".")[1] for key in tensors if not key.startswith("model.")} <= towers(train),
    }  # fmt: skip


def fifty_steps(name: str) -> dict:
    """Fifty steps in which the Bridge alone learns, with decay and averages; in bfloat16 too the towers' float32 bits,
    and the parameters that compute, are those of the start."""
    engine, layout = make(["bridge"], FIFTY[name], decay=0.9)
    frozen = {n: p for n, p in engine.network.named_parameters() if not n.startswith("dual_tower")}
    held = {n: local(getattr(p, "ds_tensor", p).detach()) for n, p in frozen.items()}
    before, computing = whole(engine), {n: tensor.clone() for n, tensor in held.items()}
    for step in range(50):
        train_step(engine, layout, step, micro=2)
    after = whole(engine)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    return {
        "frozen": [key for key in moved if ".dual_tower_bridge." not in key],
        "learned": sum(key.startswith("model.dual_tower_bridge.") for key in moved),
        "computing": all(torch.equal(held[n], computing[n]) for n in held),
        "start": all(torch.equal(before[f"model.{n}"], start_value(n, before[f"model.{n}"])) for n in frozen),
        "averages": {key.split(".")[1] for key in after if key.startswith("ema.")},
        "gradients": [n for n, p in frozen.items() if p.grad is not None],
        "counts": engine.average_counts(),
    }


def start_value(name: str, like: torch.Tensor) -> torch.Tensor:
    return cases.busy_value(name, tuple(like.shape), 0, like.numel()).view(like.shape)


def sent(name: str) -> dict:
    """What one step of each expert sends, counted and by formula, with the parameters that it had gradients for."""
    train, given, parallel = SENT[name]
    engine, layout = make(train, parallel)
    settings, results = ParallelConfig(**parallel), {}
    # A backward ends what a forward gathers of the root, so the step that has one comes first.
    for step, expert in enumerate(("low", "high") if train == ["video_low"] else ("high", "low")):
        prepared = global_batch(step, torch.float32)
        prepared = replace(prepared, batch=Objective(ALONE[given], ("high", "low")).alone(prepared.batch))
        mine = my_micro_batches(prepared, layout, 1)
        with CollectiveCounter(layout) as counter:
            forward_backward(engine.model, mine, ALONE[given], expert, layout, engine.backward)
        workload = Workload(1, (3, 4, 6), 7, len(mine))
        kinds = recompute_kinds(engine.network, settings, layout, workload)
        results[expert] = {
            "counted": {axis: counter.axis_bytes(axis) for axis in layout.groups() if counter.axis_bytes(axis)},
            "bytes": dict(counter.bytes), "calls": dict(counter.calls), "micro": len(mine),
            "formula": step_bytes(engine.network, settings, layout, workload, kinds),
            "gradients": {n.split(".")[0] for n, p in engine.network.named_parameters() if p.grad is not None},
            "whole": {n: p.shape for n, p in engine.network.named_parameters()},
        }  # fmt: skip
        engine.step(1.0, expert)
    return results


def nothing_to_learn(engine_name: str) -> dict:
    """A step whose clips have no sound where sound alone trains; then one that has it."""
    engine, layout = make(["audio"], {"engine": engine_name})
    train_step(engine, layout, 0)
    before = whole(engine)
    norm = train_step(engine, layout, 1, given="video")
    after = whole(engine)
    return {
        "norm": norm,
        "still": before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before),
        "goes_on": train_step(engine, layout, 2) > 0 and engine.update_counts()["audio_dit.head.head.bias"] == 2,
    }


def loaded(path: Path) -> dict[str, torch.Tensor]:
    settings = ParallelConfig()
    model, _ = load_model(path, settings, make_layout(settings, torch.device("cpu")))
    return cases.full(dict(model.named_parameters()))


def preset(root: Path, name: str, data: str) -> dict:
    settings = (
        "steps=2",
        "validation.every=2",
        f"data.valid_path={root / data}",
        "ema.decay=0.9",
        "checkpoint.every=2",
    )
    return runs.train(root, root / data, f"{name}-{data}", *settings, f"experiment={name}")


def with_kill(after, *arguments):
    return runs.train(*arguments, kill_after=after)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    root = tmp_path_factory.mktemp("frozen")
    make_dataset(root / "data", [(CLIP, 9), (CLIP, 6)])
    make_dataset(root / "valid", [(CLIP, 4)], seed=1)
    make_dataset(root / "sound", [(replace(CLIP, has_video=False), 9)], seed=2)
    kept = (
        f"data.valid_path={root / 'valid'}", "optim.eps=1e-4", "optim.train=[audio,bridge]", "ema.decay=0.9",
        "objective.balance=true", "objective.balance_decay=0.5", "steps=8", "checkpoint.every=4", "checkpoint.keep=9",
    )  # fmt: skip
    run = (root, root / "data")
    return root, run_cases(
        2,
        {
            **{name: (parity, case) for name, case in LEARNED.items()},
            **{f"fifty {name}": (fifty_steps, (name,)) for name in FIFTY},
            **{f"sent {name}": (sent, (name,)) for name in SENT},
            **{f"nothing {name}": (nothing_to_learn, (name,)) for name in NOTHING},
            "unbroken": (runs.train, (*run, "unbroken", *kept)),
            "stopped": (with_kill, (5, *run, "broken", *kept)),
            "resumed": (runs.train, (*run, "broken", *kept)),
            "others": (runs.train, (*run, "broken", *kept, "optim.train=[audio]")),
            "no balance": (runs.train, (*run, "broken", *kept, "objective.balance=false")),
            "faster": (runs.train, (*run, "broken", *kept, "optim.parts.audio.lr=1e-3")),
            "under zero": (runs.train, (*run, "unbroken", *kept, "steps=10", "parallel=zero3")),
            "back": (runs.train, (*run, "unbroken", *kept, "steps=11")),
            **{f"preset {name} {data}": (preset, (root, name, data)) for name, data in PRESETS},
            "loaded": (loaded, (root / "broken" / "checkpoints" / "step-00000008",)),
        },
    )


@pytest.mark.parametrize("name", LEARNED)
def test_the_others_learn_as_on_one_process(ranks, name):
    for result in ranks[1][name]:
        assert result["frozen"] and result["kept"]
        assert result["moved"] <= (1e-10 if result["exact"] else 1e-4)
        assert result["norms"] <= (1e-10 if result["exact"] else 1e-4)


@pytest.mark.parametrize("name", FIFTY)
def test_after_fifty_steps_no_bit_of_a_frozen_part_has_moved(ranks, name):
    for result in ranks[1][f"fifty {name}"]:
        assert result["frozen"] == [] and result["computing"] and result["start"] and result["learned"] > 20
        assert result["averages"] == {"dual_tower_bridge"} and result["counts"] == {"dual_tower_bridge": 50}
        assert result["gradients"] == []


@pytest.mark.parametrize("name", [name for name, (_, given, _) in SENT.items() if given == "both"])
def test_a_step_sends_what_its_formula_says(ranks, name):
    expert = "low" if name == "low" else "high"  # the formula is of an expert that trains
    for result in ranks[1][f"sent {name}"]:
        counted, formula = result[expert]["counted"], result[expert]["formula"]
        assert counted.keys() == formula.keys()
        for axis, size in formula.items():
            assert counted[axis] == pytest.approx(size, rel=1e-6), axis


def elements(shapes: dict[str, torch.Size], chosen) -> int:
    """Of the parameters that `chosen` picks by name, with rows filled up to two equal parts."""
    return sum(-(-s[0] // 2) * 2 * s[1:].numel() for name, s in shapes.items() if chosen(name))


def test_nothing_of_a_frozen_part_is_reduced_and_what_does_not_run_is_not_gathered(ranks):
    """Counted by hand: half of each gathered or reduced byte leaves one of two ranks; float32. Every forward gathers
    the root, which holds a number of the Bridge, and where no backward ends it, once for both micro-batches."""

    def bytes_of(name: str, expert: str = "high") -> tuple[int, int, int, Any]:
        found = ranks[1][f"sent {name}"][0][expert]
        sizes = [found["bytes"].get(("fsdp", kind), 0) // (2 * found["micro"]) for kind in ("all_gather", "reduce_scatter")]  # fmt: skip  # noqa: E501
        return sizes[0], sizes[1], found["micro"], found

    gathered, reduced, micro, found = bytes_of("bridge")
    shapes = found["whole"]
    bridge = elements(shapes, lambda n: n.startswith("dual_tower"))
    assert reduced == bridge and found["gradients"] == {"dual_tower_bridge"}
    stems = ("patch_embedding", "text_embedding", "time_")
    runs_once = elements(shapes, lambda n: n.startswith(("video_dit.", "audio_dit.")) and n.split(".")[1].startswith(stems))  # fmt: skip  # noqa: E501
    scale = elements(shapes, lambda n: n.endswith("condition_scale"))
    active = elements(shapes, lambda n: not n.startswith("video_dit_2."))
    assert gathered == 2 * active - runs_once - scale  # in backward all but the stems, and the root
    gathered, reduced, _, found = bytes_of("audio alone")
    audio = elements(shapes, lambda n: n.startswith("audio_dit."))
    assert 0 <= gathered - 2 * audio <= scale and reduced == audio and found["gradients"] == {"audio_dit"}
    gathered, reduced, _, found = bytes_of("video alone", "low")
    video = elements(shapes, lambda n: n.startswith("video_dit_2."))
    assert 0 <= gathered - 2 * video <= scale and reduced == video and found["gradients"] == {"video_dit_2"}
    gathered, reduced, _, found = bytes_of("low", "high")  # a step in which nothing trains: forward alone
    assert gathered == active - scale // 2 and reduced == 0 and found["gradients"] == set()
    gathered, reduced, _, found = bytes_of("nothing in it")
    assert 0 <= gathered - video <= scale and reduced == 0 and found["gradients"] == set()


@pytest.mark.parametrize("name", NOTHING)
def test_a_step_that_has_nothing_to_learn_changes_nothing(ranks, name):
    for result in ranks[1][f"nothing {name}"]:
        assert result == {"norm": 0.0, "still": True, "goes_on": True}


def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(ranks):
    """With averages of what trains alone, and weights that follow the losses of earlier steps."""
    root, results = ranks
    endings = [results[name][0].get("ending") for name in ("unbroken", "stopped", "resumed")]
    assert endings == ["finished", "stopped", "finished"], results
    whole_run, broken = (tensors_of(root / name / "checkpoints" / "step-00000008") for name in ("unbroken", "broken"))
    assert whole_run.keys() == broken.keys() and all(torch.equal(whole_run[key], broken[key]) for key in broken)
    assert {key.split(".")[1] for key in broken if key.startswith("ema.")} == {"audio_dit", "dual_tower_bridge"}
    (steps_whole, valid), (steps_broken, valid_broken) = (runs.metrics(root, name) for name in ("unbroken", "broken"))
    assert [x for x in steps_whole if x["step"] < 8] == steps_broken and valid_broken[-1] in valid
    scales = [x["train/scale_video"] for x in steps_broken]
    assert scales[:2] == [1.0, 1.0] and len(set(scales[2:])) == 6 and steps_broken[5]["train/loss"] > 0
    state = json.loads((root / "broken" / "checkpoints" / "step-00000008" / "state.json").read_text())
    assert state["averages"] == {"audio_dit": 8, "dual_tower_bridge": 8} and state["balance"]["means"].keys() == {
        "video_high", "video_low", "audio"
    }  # fmt: skip


def test_the_scale_of_a_loss_is_the_inverse_of_its_mean_two_steps_before(ranks):
    root, _ = ranks
    lines, _ = runs.metrics(root, "broken")
    for modality, alike in (("video", 2), ("audio", 1)):
        for step, line in enumerate(lines):
            earlier = [
                x[f"train/loss_{modality}"] for x in lines[: max(0, step - 1)] if (step - x["step"]) % alike == 0
            ]
            weights = [0.5 ** (len(earlier) - 1 - i) for i in range(len(earlier))]
            mean = sum(w * loss for w, loss in zip(weights, earlier, strict=True)) / sum(weights) if earlier else 1.0
            assert line[f"train/scale_{modality}"] == pytest.approx(1 / mean, rel=1e-9), (modality, step)
    for line in lines:  # all clips have both, so the loss is that of the means
        video, audio = (line[f"train/scale_{modality}"] * line[f"train/loss_{modality}"] for modality in ("video", "audio"))  # fmt: skip  # noqa: E501
        assert line["train/loss"] == pytest.approx(1.0 * video + 0.2 * audio, rel=1e-5)


def test_what_trains_may_not_change_in_a_run(ranks):
    root, results = ranks
    for name, said in (
        ("others", "optim.train: ['audio', 'bridge'] -> ['audio']"),
        ("no balance", "objective.balance: True -> False"),
        ("faster", "optim.parts.audio.lr: None -> 0.001"),
    ):
        assert said in results[name][0]["error"]


def test_checkpoints_pass_to_another_engine_and_back(ranks):
    root, results = ranks
    assert [results[name][0].get("ending") for name in ("under zero", "back")] == ["finished"] * 2, results
    eight, eleven = (tensors_of(root / "unbroken" / "checkpoints" / f"step-{n:08d}") for n in (8, 11))
    assert eight.keys() == eleven.keys()
    moved = {key for key, value in eleven.items() if not torch.equal(value, eight[key])}
    assert not any(".video_dit" in key for key in moved)
    for kind in ("model", "ema", "optim"):
        assert sum(key.startswith(f"{kind}.audio_dit.") for key in moved) > 20


def test_samples_take_averages_where_there_are_some(ranks):
    root, results = ranks
    tensors = tensors_of(root / "broken" / "checkpoints" / "step-00000008")
    found = results["loaded"][0]
    for name, value in found.items():
        kind = "model" if name.startswith("video_dit") else "ema"
        assert torch.equal(value, tensors[f"{kind}.{name}"]), name


@pytest.mark.parametrize("name,data", PRESETS)
def test_presets_train_what_they_say_on_clips_with_and_without_picture(ranks, name, data):
    root, results = ranks
    result = results[f"preset {name} {data}"][0]
    assert result.get("ending") == "finished", result
    learned = PRESETS[name, data]
    last = tensors_of(root / f"{name}-{data}" / "checkpoints" / "step-00000002")
    kept = {key.split(".")[1] for key in last if key.startswith(("optim.", "ema."))}
    assert kept == learned
    lines, valid = runs.metrics(root, f"{name}-{data}")
    for modality, tower in (("video", "video_dit"), ("audio", "audio_dit")):
        seen = "joint" in name or tower in learned  # what is left out has no loss, in validation either
        assert all((line[f"train/loss_{modality}"] is not None) == seen for line in lines)
        assert all((f"valid/{modality}" in line) == seen for line in valid)
    assert ("train/bridge_video" in lines[0]) == ("joint" in name)


# --- what a config may say -------------------------------------------------------------------------------------------


def test_the_nearest_word_about_a_part_counts():
    config = OptimConfig()
    config.parts.video.lr, config.parts.video_low.lr, config.parts.audio.weight_decay = 3e-5, 4e-5, 0.0
    names = {part: f"{tower}.head.head.bias" for part, tower in TOWERS.items()}
    assert {part: rate_of(name, config) for part, name in names.items()} == {
        "video_high": 3e-5, "video_low": 4e-5, "audio": 1e-5, "bridge": 2e-5
    }  # fmt: skip
    assert [decay_of(names[part], config) for part in ("video_high", "audio", "bridge")] == [0.001, 0.0, 0.001]


def test_parts_that_do_not_exist_are_refused():
    with pytest.raises(
        ValueError, match="optim.train names 'sound'; the parts are video_high, video_low, video, audio"
    ):
        OptimConfig(train=["audio", "sound"])
    with pytest.raises(ValueError, match="optim.train is empty"):
        OptimConfig(train=[])
    assert trained_towers(["video"], ("high",)) == {"video_dit"}
    with pytest.raises(
        UserError, match="optim.train names video_low, but this model has only audio, bridge, video_high"
    ):
        trained_towers(["video_low"], ("high",))


@pytest.mark.parametrize(
    "overrides,said",
    [
        (["optim.train=[video_low]"], r"optim.train=\[video_low\] leaves nothing to train in steps of the high expert"),
        (["model.two_experts=false", "optim.train=[video_low]"], "this model has only"),
        (["optim.train=[sound]"], "optim.train names 'sound'"),
        (["optim.train=[]"], "optim.train is empty"),
    ],
)
def test_a_config_that_trains_nothing_is_refused_in_one_line(overrides, said):
    with pytest.raises(UserError, match=said) as caught:
        compose_train([*runs.SMALL, "run.id=x", "data.path=x", *overrides])
    assert "\n" not in str(caught.value)


def test_memory_is_planned_for_what_trains():
    config, parallel = tiny_config(), ParallelConfig(optimizer_state="host")
    sizes = {tower: host_bytes(config, parallel, 4, True, trained=[tower])["moments"] for tower in GROUPS}
    every = host_bytes(config, parallel, 4, True)
    assert sum(sizes.values()) == every["moments"]
    found = host_bytes(config, parallel, 4, True, trained=["audio_dit"])
    assert found["copy for checkpoints"] == every["moments"] // 2 + 3 * sizes["audio_dit"] // 2


def test_presets_fit_the_real_model():
    sizes = {("experiment=audio_pretrain", "model=mova_360p"): 1.6, ("experiment=[mova_phase1_360p,joint_warm]",): 32.7}
    for overrides, billions in sizes.items():
        config, _ = compose_train(["run.id=x", "data.path=x", *overrides])
        with torch.device("meta"):
            model = JointTransformer(config.model)
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)
        assert sum(p.numel() for p in model.audio_dit.parameters()) == 1_419_193_472
