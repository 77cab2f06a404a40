"""init.*: weights of another run or of a folder, a fresh optimizer, step 0; under every engine and layout."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file, save_file

from core.errors import UserError
from data.clip import Bucket
from launch.compose import compose_launch
from model.convert import load_mova
from model.weights.files import SafetensorsFiles
from tests import weights as made
from tests.distributed import run_cases
from tests.selection import chosen
from tests.shards import make_dataset
from tests.train.runs import metrics, train
from tests.train.starts import start_and_save, whole_model
from train.start.weights import told as told_of

BUCKET = Bucket(frames=2, height=2, width=2, audio_steps=5, fps=24.0, has_video=True, has_audio=True)
TAKEN = chosen(  # of a folder by each layout
    {
        "mova-fsdp2": {}, "mova-hsdp": {"dp_replicate": 2},
        **{f"mova-zero{stage}": {"engine": f"zero{stage}"} for stage in (1, 2, 3)},
    },
    "mova-fsdp2", "mova-hsdp", "mova-zero3",
)  # fmt: skip
STILL = ["optim.lr_tower=0", "optim.lr_bridge=0", "steps=1", "validation.every=0", "ema.decay=0.9"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("init")
    make_dataset(root / "data", [(BUCKET, 8)], dim=6)
    made.mova_folder(root / "mova")
    made.mova_folder(root / "one expert", made.joint_config(two_experts=False))
    made.diffusers_folder(root / "diffusers")
    made.diffusers_model(4, in_channels=16, num_layers=1).save_pretrained(root / "small" / "transformer")
    return root


def source_run(root: Path, data: Path, name: str, *overrides: str) -> dict:
    """A run whose model is that of its weights."""
    return train(root, data, name, *STILL, *overrides, of_source=True)


def saved(root: Path, name: str, init: dict[str, str], **parallel: object) -> tuple:
    """A checkpoint of the weights as they are taken, without a step."""
    return start_and_save, (root / name, init, parallel, 0.9)


@pytest.fixture(scope="module")
def outcomes(root: Path) -> dict:
    """Whole runs where the loop has a part in what is tested; of the layouts only what they take."""
    data, first, mova = root / "data", root / "first", {"source": f"{root}/mova"}
    towers = {"source": f"{root}/diffusers", "audio": f"{root}/small"}
    cases = {
        "first": (train, (root, data, "first", "steps=3", "validation.every=0")),
        "fsdp2": (train, (root, data, "fsdp2", *STILL, f"init.source={first}")),
        "zero2": (train, (root, data, "zero2", *STILL, f"init.source={first}", "parallel=zero2")),
        "again": (train, (root, data, "fsdp2", *STILL, "steps=2", f"init.source={first}")),
        "mova-fsdp2": (source_run, (root, data, "mova-fsdp2", f"init.source={root}/mova", f"data.valid_path={data}")),
        "mova-again": (source_run, (root, data, "mova-fsdp2", f"init.source={root}/mova", "steps=2")),
        "one": saved(root, "one", {"source": f"{first}/checkpoints/step-00000003"}),
        **{name: saved(root, name, mova, **layout) for name, layout in TAKEN.items() if layout},
        "expert": saved(root, "expert", {"source": f"{root}/one expert"}),
        "parts": saved(root, "parts", {**towers, "bridge": "zero"}),
        "drawn": saved(root, "drawn", {**towers, "bridge": "fresh"}, engine="zero2"),
    }
    return run_cases(2, cases)


def stored(checkpoint: Path, kind: str = "model.") -> dict[str, torch.Tensor]:
    described = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {key: torch.empty(one.size) for key, one in described.items() if key.startswith(kind)}
    dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    return {key.removeprefix(kind): tensor for key, tensor in tensors.items()}


def state(root: Path, run: str) -> dict:
    return json.loads((root / run / "checkpoints" / "step-00000001" / "state.json").read_text())


@pytest.mark.parametrize("run", ["fsdp2", "zero2", "one"])
def test_weights_are_taken_and_the_optimizer_is_fresh(root: Path, outcomes: dict, run: str) -> None:
    """At a learning rate of 0, what is saved after a step is what was taken."""
    assert run == "one" or outcomes[run][0].get("ending") == "finished", outcomes[run][0]
    there = root / run / "checkpoints" / "step-00000001"
    taken, given = stored(there), stored(root / "first" / "checkpoints" / "step-00000003")
    assert taken.keys() == given.keys() and len(taken) > 20
    assert all(torch.equal(taken[key], given[key]) for key in taken)
    if run == "one":
        return
    assert set(state(root, run)["optimizer_steps"].values()) == {1}
    assert f"tensors of {root}/first/checkpoints/step-00000003 (checkpoint, float32" in outcomes[run][0]["said"]


@pytest.mark.parametrize("run", TAKEN)
def test_a_folder_is_taken_slice_by_slice(root: Path, outcomes: dict, run: str) -> None:
    """Every rank reads its own ranges; together they are the folder's tensors. Averages begin from them."""
    given = load_mova(root / "mova").state_dict()
    for kind in ("model.", "ema."):
        taken = stored(root / run / "checkpoints" / "step-00000001", kind)
        assert taken.keys() == given.keys()
        assert all(torch.equal(taken[key], given[key]) for key in given), kind
    origin = state(root, run)["origin"]
    assert list(origin) == ["video_high", "video_low", "audio", "bridge"]
    assert origin["audio"]["taken"] == 42 and origin["audio"]["dtype"] == "bfloat16" and not origin["audio"]["fresh"]
    assert len({one["fingerprint"] for one in origin.values()}) == 4


def test_a_start_tells_its_sources(root: Path, outcomes: dict) -> None:
    run, origin = "mova-fsdp2", state(root, "mova-fsdp2")["origin"]
    assert outcomes[run][0].get("ending") == "finished", outcomes[run][0]
    assert yaml.safe_load((root / run / "config.yaml").read_text())["model"]["text_length"] == 512
    table = json.loads((root / run / "layout.json").read_text())  # which W&B and the report show
    assert origin["bridge"]["fingerprint"] in table["start of bridge"]


def test_step_0_is_validated_before_training(root: Path, outcomes: dict) -> None:
    assert [record["step"] for record in metrics(root, "mova-fsdp2")[1]] == [0, 1]


def test_parts_of_several_sources(root: Path, outcomes: dict) -> None:
    """The audio tower out of a video tower: all but stem and head, which are drawn and named; a Bridge of zeros."""
    taken = stored(root / "parts" / "checkpoints" / "step-00000001")
    tower = made.own_names(made.diffusers_model(4, in_channels=16, num_layers=1).state_dict())
    fresh = ("patch_embedding.weight", "head.head.weight", "head.head.bias")
    for name, tensor in tower.items():
        assert name in fresh or torch.equal(taken[f"audio_dit.{name}"], tensor), name
    assert taken["audio_dit.patch_embedding.weight"].std() > 0.01 and not taken["audio_dit.head.head.weight"].any()
    assert state(root, "parts")["origin"]["audio"]["fresh"] == list(fresh)
    low = made.own_names(made.diffusers_model(1).state_dict())
    assert all(torch.equal(taken[f"video_dit_2.{name}"], tensor) for name, tensor in low.items())
    bridge = {name: tensor for name, tensor in taken.items() if name.startswith("dual_tower_bridge.")}
    zero = {name for name, tensor in bridge.items() if not tensor.any() and "norm" not in name}
    assert zero == {name for name in bridge if ".inner.o." in name}
    words = dict(told_of(outcomes["parts"][0]))
    assert "3 drawn: patch_embedding.weight, head.head.weight, head.head.bias" in words["audio"]
    assert words["bridge"] == "drawn, with outputs of zero"


def test_a_fresh_bridge_is_drawn_as_the_reference_draws_it(root: Path, outcomes: dict) -> None:
    """Against torch's own modules: uniform within 1/sqrt(inputs), weights and biases; norms 1 and 0."""
    taken = stored(root / "drawn" / "checkpoints" / "step-00000001")
    bound = 48**-0.5
    for name, tensor in taken.items():
        if not name.startswith("dual_tower_bridge."):
            continue
        if "norm" in name:
            assert torch.equal(tensor, torch.full_like(tensor, float(name.endswith("weight")))), name
        else:
            assert 0.8 * bound < tensor.abs().max() <= bound and tensor.mean().abs() < bound / 2, name
    weight = taken["dual_tower_bridge.audio_to_video_conditioners.0.inner.q.weight"]
    assert abs(weight.std() / torch.nn.Linear(48, 48).weight.std() - 1) < 0.1


def test_a_source_with_one_expert_makes_a_model_with_one(root: Path, outcomes: dict) -> None:
    assert "video_low" not in state(root, "expert")["origin"]


def test_a_run_with_a_checkpoint_goes_on_from_its_own(root: Path, outcomes: dict) -> None:
    for name in ("again", "mova-again"):
        assert outcomes[name][0]["ending"] == "finished"
        assert "resumed from" in outcomes[name][0]["said"]
    later = json.loads((root / "mova-fsdp2" / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert later["origin"] == state(root, "mova-fsdp2")["origin"]


REFUSED = {
    "nowhere": (["init.source=nowhere"], "init.source=nowhere does not exist"),
    "empty": (["init.source=empty"], "neither config.json nor any folder of a known layout"),
    "a text": (["init.source=text.md"], "text.md: not a readable safetensors file"),
    "a loop": (["init.source=loop"], "init.source=loop does not exist"),
    "no audio": (["init.source=diffusers"], "init.audio has no source: .* give init.audio=FOLDER, or init.audio=fresh"),
    "no bridge": (
        ["init.source=diffusers", "init.audio=small"],
        "init.bridge has no source: .* init.bridge=fresh or init.bridge=zero",
    ),
    "model": (
        ["init.source=mova", "model=tiny", "model.video.text_dim=6", "model.audio.text_dim=6"],
        r"another model than the configured one \(model -> source\): video.dim: 192 -> 48 \(mova/video_dit\)",
    ),
    "a value": (["init.source=mova", "model.video.ffn_dim=80"], "video.ffn_dim: 80 -> 64"),
    "words": (["init.source=mova", "data.path=wide"], "8.* 6|6.* 8"),
    "experts": (["init.source=mova", "init.video_low=wider"], "have different sizes: ffn_dim: 64 -> 80"),
    "clip": (["init.source=mova", "init.video_high=clip"], "CLIP image-to-video weights"),
    "5B": (["init.source=mova", "init.video_high=five"], "VAE of Wan 2.2's 5B model"),
    "missing": (["init.source=mova", "init.video_high=lacking"], r"head.modulation: not there -> \(1, 2, 48\)"),
    "unknown": (["init.source=mova", "init.video_high=surplus"], r"extra.weight: \(3,\) -> not there"),
    "no key": (["init.source=mova", "init.video_high=keyless"], "lacks the key 'num_attention_heads'|'ffn_dim'"),
}


@pytest.fixture(scope="module")
def wrong(root: Path) -> Path:
    """Sources of which each is wrong in one way."""
    (root / "empty").mkdir()
    (root / "text.md").write_text("# no weights")
    (root / "loop").symlink_to("loop")
    make_dataset(root / "wide", [(BUCKET, 4)], dim=8)
    made.diffusers_model(1, ffn_dim=80).save_pretrained(root / "wider")
    tower = root / "diffusers" / "transformer"
    for name in ("clip", "five", "lacking", "surplus", "keyless"):
        shutil.copytree(tower, root / name)
    tensors, config = load_file(tower / made.FILE), json.loads((tower / "config.json").read_text())
    for name, changed in (("clip", {"image_dim": 1280}), ("five", {"in_channels": 48})):
        (root / name / "config.json").write_text(json.dumps(config | changed))
    (root / "keyless" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "ffn_dim"}))
    save_file({k: v for k, v in tensors.items() if k != "scale_shift_table"}, root / "lacking" / made.FILE)
    save_file(tensors | {"extra.weight": torch.zeros(3)}, root / "surplus" / made.FILE)
    return root


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_is_refused_before_anything_is_read(
    wrong: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line at the launch, from headers and configs alone."""
    monkeypatch.chdir(wrong)
    monkeypatch.setattr(SafetensorsFiles, "read", lambda *_: pytest.fail("weights were read"))
    given, told = REFUSED[name]
    with pytest.raises(UserError, match=told) as caught:
        compose_launch(["cluster=local", "cluster.processes=1", "run.id=refused", "data.path=data", *given])
    assert "\n" not in str(caught.value) and not (wrong / "runs" / "refused").exists()


def forward(model: torch.nn.Module, picture: bool, sound: bool) -> tuple:
    """Answers for random latents of two clips; without one of the two where it is not given."""
    generator = torch.Generator().manual_seed(2)
    video, condition, audio, text = (
        torch.randn(shape, generator=generator)
        for shape in ((2, 16, 2, 4, 4), (2, 20, 2, 4, 4), (2, 128, 9), (2, 5, 6))
    )
    with torch.no_grad():
        out = model(
            video=video if picture else None, audio=audio if sound else None, condition=condition if picture else None,
            text=text, t_video=torch.tensor([950.0, 930.0]), t_audio=torch.tensor([400.0, 10.0]), fps=24.0,
            expert="high",
        )  # fmt: skip
    return out.video, out.audio


def test_a_bridge_of_zeros_leaves_both_towers_as_they_were_alone(root: Path) -> None:
    """Bit for bit; a fresh one, and the source's own, do not."""
    alone = whole_model(source=f"{root}/mova")
    expected = forward(alone, True, False)[0], forward(alone, False, True)[1]
    found = forward(whole_model(source=f"{root}/mova", bridge="zero"), True, True)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    for other in (alone, whole_model(source=f"{root}/mova", bridge="fresh")):
        assert not any(torch.equal(a, b) for a, b in zip(forward(other, True, True), expected, strict=True))
