"""Weights out: what was read is written again to the byte, from any layout and number of ranks; others load it, and it
answers as it did in training."""

import dataclasses
import json
import os
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open

import tools.export.__main__ as export_program
import tools.sample as sample_program
from core.errors import RunError
from data.clip import Bucket
from launch.snapshot import umask
from model.convert import load_mova
from model.joint import JointTransformer
from model.tower import sinusoid
from tests import weights as made
from tests.disks import disk
from tests.distributed import run_cases
from tests.model.reference import ask, recorded, write_folder
from tests.shards import make_dataset
from tests.train.runs import train
from tests.train.starts import start_and_save
from tools.export import folder as export_folder
from tools.export.folder import export
from tools.export.request import ExportRequest
from train.checkpoint.checkpoint import MARKER, committed, hold
from train.checkpoint.saver import _prune

CASE = "released"  # of tests/model/reference.py
SHARDED = {
    "fsdp2": {}, "hsdp": {"dp_replicate": 2}, "zero2": {"engine": "zero2"}, "zero3": {"engine": "zero3"},
}  # fmt: skip
RUNS = ["alone", *(f"{name}-{world}" for world in (2, 4) for name in SHARDED)]
TEXT_DIM = 8  # the least that the built-in text codec makes
CONFIG = made.joint_config(text_dim=TEXT_DIM)
PARTS = ("video_dit", "video_dit_2", "audio_dit", "dual_tower_bridge")
LEARNS = (
    "steps=2", "ema.decay=0.9", "checkpoint.every=1", "checkpoint.keep=3", "optim.lr_tower=1e-2", "validation.every=0",
    "objective.boundary=850",
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that hold what they were given, on 1, 2 and 4 ranks, and two that learn: all of it, and the Bridge alone."""
    root = tmp_path_factory.mktemp("export")
    bucket = Bucket(frames=2, height=2, width=2, audio_steps=5, fps=24.0, has_video=True, has_audio=True)
    make_dataset(root / "data", [(bucket, 8)], dim=TEXT_DIM)
    made.mova_folder(root / "mova", CONFIG)
    made.diffusers_folder(root / "diffusers", text_dim=TEXT_DIM)
    made.diffusers_model(4, TEXT_DIM, in_channels=16, num_layers=1).save_pretrained(root / "small" / "transformer")
    write_folder(CASE, recorded(CASE)[1], root / "reference")
    mova = {"source": f"{root}/mova"}
    for world in (4, 2):
        run_cases(world, {n: (start_and_save, (root / f"{n}-{world}", mova, kind)) for n, kind in SHARDED.items()})
    parts = {"source": f"{root}/diffusers", "audio": f"{root}/small", "bridge": "fresh"}
    cases = {
        "alone": (start_and_save, (root / "alone", mova, {})),
        "of diffusers": (start_and_save, (root / "of-diffusers", parts, {})),
        "of the reference": (start_and_save, (root / "of-the-reference", {"source": f"{root}/reference"}, {})),
        "learned": (started, (root, "learned", (f"init.source={root}/mova", *LEARNS))),
        "frozen": (started, (root, "frozen", (f"init.source={root}/mova", *LEARNS, "optim.train=[bridge]"))),
    }
    outcomes = run_cases(1, cases)
    assert all(outcomes[name][0].get("ending") == "finished" for name in ("learned", "frozen")), outcomes
    return root


def started(root: Path, name: str, overrides: tuple[str, ...]) -> dict:
    return train(root, root / "data", name, *overrides, of_source=True)


def order(root: Path, run: str, out: Path, **more) -> ExportRequest:
    usual = ExportRequest(root / run, out, None, "mova", None, "bfloat16", None)
    return dataclasses.replace(usual, **more)


@pytest.mark.parametrize("run", RUNS)
def test_what_was_read_is_written_again_to_the_byte(root: Path, tmp_path: Path, run: str) -> None:
    export(order(root, run, tmp_path / "out", dtype="source"))
    for part in PARTS:
        for file in ("config.json", made.FILE):
            assert (tmp_path / "out" / part / file).read_bytes() == (root / "mova" / part / file).read_bytes()


def test_diffusers_files_come_back_to_the_byte(root: Path, tmp_path: Path) -> None:
    """What was read of them; what was drawn beside them is float32."""
    export(order(root, "of-diffusers", tmp_path / "out", format="diffusers", dtype="source"))
    for part in ("transformer", "transformer_2"):
        assert (tmp_path / "out" / part / made.FILE).read_bytes() == (
            root / "diffusers" / part / made.FILE
        ).read_bytes()
        ours, theirs = (
            json.loads((at / part / "config.json").read_text()) for at in (tmp_path / "out", root / "diffusers")
        )
        assert ours == {key: value for key, value in theirs.items() if key in ours} and theirs.keys() - ours.keys() <= {
            "_diffusers_version"
        }
    tower = made.own_names(made.diffusers_model(4, TEXT_DIM, in_channels=16, num_layers=1).state_dict())
    audio = made.folder_tensors(tmp_path / "out" / "audio_dit")
    fresh = ("patch_embedding.weight", "head.head.weight", "head.head.bias")
    assert all(torch.equal(audio[name], tensor) for name, tensor in tower.items() if name not in fresh)
    assert {tensor.dtype for tensor in audio.values()} == {torch.float32}


def test_an_export_answers_as_the_reference_does(root: Path, tmp_path: Path) -> None:
    """Numbers that the reference itself gave (tests/model/record_reference.py), through init, checkpoint and export."""
    export(order(root, "of-the-reference", tmp_path / "out", dtype="float32"))
    model, (numbers, _) = load_mova(tmp_path / "out"), recorded(CASE)
    for part, expert in (("video_dit", "high"), ("video_dit_2", "low")):
        with torch.no_grad():
            answer = ask(model, CASE, expert)
        for modality in ("video", "audio"):
            theirs = numbers[f"{part}.{modality}"]
            assert (getattr(answer, modality) - theirs).norm() / theirs.norm() < 3e-6, (part, modality)


def learned(root: Path, kind: str, step: int = 2, run: str = "learned") -> JointTransformer:
    """A run's model, by torch's own reader of checkpoints. What is frozen has no average."""
    path = root / run / "checkpoints" / f"step-{step:08d}"
    there = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    model = JointTransformer(CONFIG)
    tensors = {
        f"{kind}.{name}" if f"{kind}.{name}" in there else f"model.{name}": tensor
        for name, tensor in model.state_dict().items()
    }
    dcp.load(tensors, checkpoint_id=path, no_dist=True)
    return model.eval()


def test_frozen_parts_are_exported_as_they_were_given(root: Path, tmp_path: Path) -> None:
    """Their averages are their weights, which the checkpoint holds once; the Bridge's are the average."""
    path = root / "frozen" / "checkpoints" / "step-00000002"
    kept = [name for name in dcp.FileSystemReader(path).read_metadata().state_dict_metadata if name.startswith("ema.")]
    assert kept and all(name.startswith("ema.dual_tower_bridge.") for name in kept)
    export(order(root, "frozen", tmp_path / "out", dtype="float32", weights="ema"))
    given, found = load_mova(root / "mova", dtype=torch.float32).state_dict(), load_mova(tmp_path / "out").state_dict()
    averaged, raw = (learned(root, kind, run="frozen").state_dict() for kind in ("ema", "model"))
    for name, tensor in found.items():
        in_bridge = name.startswith("dual_tower_bridge.")
        assert torch.equal(tensor, averaged[name] if in_bridge else given[name]), name
    assert any(not torch.equal(averaged[name], raw[name]) for name in found if name.startswith("dual_tower_bridge."))


@pytest.mark.parametrize(("weights", "kind"), [(None, "ema"), ("raw", "model")])
def test_the_averages_or_the_raw_weights(root: Path, tmp_path: Path, weights: str | None, kind: str) -> None:
    export(order(root, "learned", tmp_path / "out", dtype="float32", weights=weights, step=1))
    expected, other = learned(root, kind, 1), learned(root, kind, 2)
    found = load_mova(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())
    assert any(not torch.equal(found[name], tensor) for name, tensor in other.state_dict().items())
    assert json.loads((tmp_path / "out" / "training.json").read_text())["weights"] == ("raw" if weights else "ema")


def test_a_learned_tower_answers_in_diffusers_as_here(root: Path, tmp_path: Path) -> None:
    """To 1e-5 as it is, to 1e-6 with diffusers' sinusoid in float64: both experts, none swapped, no name left over."""
    from diffusers import WanTransformer3DModel

    export(order(root, "learned", tmp_path / "out", format="diffusers", dtype="float32"))
    model = learned(root, "ema")
    torch.manual_seed(1)
    video, condition, text = torch.randn(2, 16, 3, 4, 6), torch.randn(2, 20, 3, 4, 6), torch.randn(2, 5, TEXT_DIM)
    for expert, folder, t in (("high", "transformer", 937.25), ("low", "transformer_2", 313.5)):
        theirs, told = WanTransformer3DModel.from_pretrained(
            tmp_path / "out", subfolder=folder, output_loading_info=True
        )
        assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
        given = {"encoder_hidden_states": text, "timestep": torch.tensor([t, t / 2])}
        with torch.no_grad():
            ours = model(
                video=video, audio=None, condition=condition, text=text, t_video=given["timestep"], t_audio=None,
                expert=expert,
            ).video  # fmt: skip
            for bar in (1e-5, 1e-6):
                answer = theirs(torch.cat((video, condition), 1), **given).sample
                assert (ours - answer).norm() / answer.norm() < bar, (expert, bar)
                theirs.condition_embedder.timesteps_proj.forward = lambda t: sinusoid(t, 32).float()


def test_bfloat16_keeps_in_float32_what_loaders_keep(root: Path, tmp_path: Path) -> None:
    export(order(root, "learned", tmp_path / "out"))
    for part in PARTS:
        with safe_open(tmp_path / "out" / part / made.FILE, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118  not a dict
                kept = part != "dual_tower_bridge" and any(w in name for w in ("modulation", "time_embedding", "norm3"))
                assert file.get_tensor(name).dtype == (torch.float32 if kept else torch.bfloat16), name


def test_files_are_split_with_an_index_and_have_the_mode_of_the_umask(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.weights.write.SHARD_BYTES", 60_000)
    old = os.umask(0o027)
    try:
        export(order(root, "alone", tmp_path / "out", dtype="source"))
    finally:
        os.umask(old)
    folder = tmp_path / "out" / "video_dit"
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2 and all(path.stat().st_size < 70_000 for path in files)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}
    given = made.folder_tensors(root / "mova" / "video_dit")
    found = made.folder_tensors(folder)
    assert found.keys() == given.keys() and all(torch.equal(found[name], given[name]) for name in given)
    index = json.loads((folder / f"{made.FILE}.index.json").read_text())
    assert index["weight_map"].keys() == given.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in given.values())


def base_folder(folder: Path) -> Path:
    """What a MOVA folder holds beside the four parts, as bytes that nobody may read."""
    for name in ("video_vae", "audio_vae", "text_encoder", "tokenizer", "scheduler"):
        (folder / name).mkdir(parents=True)
        (folder / name / "bytes").write_bytes(name.encode() * 100)
    index = {"tokenizer": ["transformers", "T5Tokenizer"], "text_encoder": ["transformers", "Other"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_base_folder_completes_an_export(root: Path, tmp_path: Path) -> None:
    alone = export(order(root, "learned", tmp_path / "alone"))
    assert alone[-1].startswith("missing for MOVA.from_pretrained: video_vae, audio_vae")
    base = base_folder(tmp_path / "base")
    (base / "text_encoder" / "bytes").chmod(0o600)
    lines = export(order(root, "learned", tmp_path / "out", base=base))
    assert len(lines) == 1
    for file in base.glob("*/bytes"):
        copied = tmp_path / "out" / file.parent.name / "bytes"
        assert copied.read_bytes() == file.read_bytes() and copied.stat().st_mode & 0o777 == 0o666 & ~umask()
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    parts = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert {name for name, value in index.items() if isinstance(value, list)} == parts
    assert index["boundary_ratio"] == 0.85 and index["text_encoder"] == ["transformers", "Other"]
    assert index["tokenizer"] == ["transformers", "T5TokenizerFast"]  # the slow one needs a file that is not there


def test_what_cannot_be_done_is_refused_and_leaves_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    out = tmp_path / "out"
    for given, told in (
        (order(root, "alone", tmp_path / "there"), "already exists"),
        (order(root, "nowhere", out), "has no committed checkpoint"),
        (order(root, "alone", out, step=7), "no such checkpoint; available: 1"),
        (order(root, "alone", out, weights="ema"), "keeps no averages"),
        (order(root, "alone", out, base=tmp_path), "lacks video_vae"),
    ):
        with pytest.raises(RunError, match=told):
            export(given)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(RunError, match="out takes"):
        export(order(root, "alone", out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_a_model_that_a_format_cannot_say_needs_the_flat_one(root: Path, tmp_path: Path) -> None:
    """prediction, clock bias, text length: refused by MOVA's and diffusers' formats, kept by ours."""
    path = root / "alone" / "checkpoints" / "step-00000001" / "state.json"
    state = json.loads(path.read_text())
    kept = path.read_text()
    for key, value, told in (
        (("prediction",), "sample", "model.prediction=sample"),
        (("bridge", "clock_bias"), 1.0, "model.bridge.clock_bias"),
        (("text_length",), 32, "model.text_length=32"),
    ):
        model = json.loads(json.dumps(state["config"]["model"]))
        (model if len(key) == 1 else model[key[0]])[key[-1]] = value
        text = json.dumps(state | {"config": state["config"] | {"model": model}})
        path.write_text(text)
        marker = path.with_name(MARKER)
        sizes = json.loads(marker.read_text())
        sizes["files"]["state.json"]["bytes"] = path.stat().st_size
        marker.write_text(json.dumps(sizes))
        for format in ("mova", "diffusers"):
            with pytest.raises(RunError, match=told):
                export(order(root, "alone", tmp_path / "out", format=format))
        export(order(root, "alone", tmp_path / key[-1], format="safetensors"))
        config = json.loads((tmp_path / key[-1] / "config.json").read_text())
        assert (config if len(key) == 1 else config[key[0]])[key[-1]] == value
    path.write_text(kept)
    sizes["files"]["state.json"]["bytes"] = path.stat().st_size
    marker.write_text(json.dumps(sizes))


@pytest.mark.parametrize("format", ["mova", "diffusers", "safetensors"])
def test_every_format_is_a_source_again(root: Path, tmp_path: Path, format: str) -> None:
    from train.start.config import InitConfig
    from train.start.sources import open_sources

    export(order(root, "learned", tmp_path / "out", format=format, dtype="float32"))
    sources = open_sources(InitConfig(source=str(tmp_path / "out")))
    assert sources.model == CONFIG and list(sources.parts) == [
        "video_high",
        "video_low",
        "audio",
        "bridge",
    ]
    expected = learned(root, "ema").state_dict()
    for part, module in zip(sources.parts.values(), PARTS, strict=True):
        for name in part.names:
            value = expected[f"{module}.{name}"].flatten()
            assert torch.equal(part.read(name, 0, len(value)), value), name


def test_rotation_spares_a_checkpoint_that_is_read(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(root / "learned" / "checkpoints", folder)
    first = committed(folder)[0]
    with hold(first):
        _prune(folder, 1, set(), None)
        assert first in committed(folder)
    _prune(folder, 1, set(), None)
    assert first not in committed(folder) and hold(first) is None


def test_the_programs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`mova export`, and a clip from the folder that it wrote equals one from the checkpoint."""
    monkeypatch.chdir(tmp_path)
    assert export_program.PROGRAM.run([f"run={root}/alone", "out=out", "dtype=float32", "weights=raw"]) == 0
    assert "missing for MOVA" in capsys.readouterr().out.splitlines()[-1]
    card = Path("out/README.md").read_text()
    assert card.startswith("---\nlicense: TO FILL IN\n") and "| run | alone, step 1 |" in card
    assert export_program.PROGRAM.run([f"run={root}/alone", "out=out"]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: out=out already exists")
    size = ["frames=5", "fps=24", "height=16", "width=16", "sampler.steps=1", "prompt=a"]
    for source in (f"checkpoint={root}/alone", "model=out"):
        assert sample_program.PROGRAM.run([source, *size, f"out={source[:5]}.mp4"]) == 0, capsys.readouterr().err
    assert Path("check.mp4").read_bytes() == Path("model.mp4").read_bytes()
    assert sample_program.PROGRAM.run(["prompt=a", "out=a.mp4"]) == 1
    assert "give checkpoint=RUN" in capsys.readouterr().err


def test_an_export_that_is_interrupted_leaves_nothing(root: Path, tmp_path: Path) -> None:
    count = 0

    def ends(size: int) -> None:
        nonlocal count
        count += 1
        if count == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(order(root, "alone", tmp_path / "out"), done=ends)
    assert count == 20 and not list(tmp_path.iterdir())


def test_a_full_file_system_is_one_line(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Full at the start, and filled while the export writes; nothing is left there."""
    run = [f"run={root}/alone", "dtype=float32"]
    with disk("8m") as full:
        full.fill()
        assert export_program.PROGRAM.run([*run, f"out={full.path}/out"]) == 1
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and "GB are free" in said[0]
        full.free()
        asked, count = order(root, "alone", full.path / "out", dtype="float32"), 0

        def fills(size: int) -> None:
            nonlocal count
            count += 1
            if count == 20:
                full.fill()

        with pytest.raises(OSError, match="No space left"):
            export(asked, done=fills)
        assert [path.name for path in full.path.iterdir()] == ["filler"]
    (tmp_path / "file").write_text("")
    assert export_program.PROGRAM.run([*run, f"out={tmp_path}/file/out"]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "file" in said[0]


def test_a_checkpoint_that_is_rotated_away_meanwhile_is_not_the_newest(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run deletes the one that was chosen before it could be held: the next choice is taken."""
    run = tmp_path / "run"
    shutil.copytree(root / "learned", run)
    chosen = export_folder.checkpoint_of

    def rotated(*given: Any) -> Path:
        path = chosen(*given)
        if path.name == "step-00000002":
            shutil.rmtree(path)
        return path

    monkeypatch.setattr(export_folder, "checkpoint_of", rotated)
    assert "step 1 of" in export(order(tmp_path, "run", tmp_path / "out"))[0]
