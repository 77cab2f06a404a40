"""The phases of MOVA's pretraining: each has the paper's values, fits any number of nodes, and begins with the weights
of the one before, at another resolution too."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import launch.__main__ as program
from core.errors import RunError, UserError
from core.run_dir import RunDir
from data.clip import Bucket
from launch.compose import compose_launch, compose_phases
from tests import weights
from tests.shards import make_dataset
from train.config import compose_train
from train.parallel.mesh import check_degrees

# arXiv 2602.08794, Table 7: clips of a step, shift of the sound, dropped text, steps between checkpoints, CP
PAPER = {
    "mova_phase1_360p": (128, 1.0, 0.5, 5000, 8),
    "mova_phase2_360p": (128, 5.0, 0.2, 5000, 8),
    "mova_phase3_720p": (64, 5.0, 0.2, 2000, 16),
}
TINY = [
    "model=tiny", "model.text_length=512", "parallel=fsdp2", "parallel.ring=1", "parallel.ulysses=1",
    "parallel.compute_dtype=float32", "parallel.recompute=none", "monitor.wandb=disabled", "validation.every=0",
    "data.batch_size=2", "data.shuffle_shards=2", "steps=2", "optim.lr_tower=0", "optim.lr_bridge=0",
]  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_a_phase_has_the_papers_values_and_all_that_a_run_needs(name: str) -> None:
    config, _ = compose_train(["run.id=x", f"experiment={name}", f"data={name[:11]}"])
    sequence = config.parallel.ring * config.parallel.ulysses
    values = (config.data.batch_size, config.objective.shift_audio, config.objective.text_dropout)
    assert (*values, config.checkpoint.permanent_every, sequence) == PAPER[name]
    assert (config.objective.shift_video, config.objective.audio_weight, config.objective.boundary) == (5.0, 0.2, 900)
    assert list(config.objective.expert_cycle) == ["high", "low"]
    optim = config.optim
    assert (optim.lr_tower, optim.lr_bridge, optim.weight_decay) == (1e-5, 2e-5, 0.001)
    assert config.parallel.compute_dtype == "bfloat16" and config.ema.decay > 0 and config.validation.every > 0
    assert config.model.video.dim == 5120 and config.model.two_experts and config.model.text_length == 512
    assert len(config.data.datasets) > 1 and config.data.valid_path is not None
    hours = {"mova_phase1_360p": 61_500, "mova_phase2_360p": 37_600, "mova_phase3_720p": 11_000}[name]
    assert config.steps == pytest.approx(hours * 3600 / 8.05 / config.data.batch_size, rel=0.01)  # one epoch


@pytest.mark.parametrize("world", [64, 128, 192, 512, 1024])
def test_the_default_layout_takes_any_multiple_of_64(world: int) -> None:
    for name, paper in PAPER.items():
        parallel = compose_train(["run.id=x", "data.path=x", f"experiment={name}"])[0].parallel
        replicate, shard, ring, ulysses = check_degrees(parallel, world)
        assert replicate * shard * ring * ulysses == world and shard * ring * ulysses == 64
        assert replicate * shard <= paper[0]  # no more groups than clips


def test_a_number_that_makes_no_copies_is_refused() -> None:
    parallel = compose_train(["run.id=x", "data.path=x", "experiment=mova_phase1_360p"])[0].parallel
    with pytest.raises(RunError, match="copies of 64 ranks each, which do not divide the 96 ranks"):
        check_degrees(parallel, 96)
    assert check_degrees(parallel, 16) == (1, 2, 1, 8)  # fewer than 64: one copy


def test_experiments_combine() -> None:
    config, _ = compose_train(["run.id=x", "data.path=x", "experiment=[mova_phase1_360p,joint_warm]"])
    assert list(config.optim.train) == ["bridge"] and config.objective.bridge_dropout == 0
    assert config.data.batch_size == 128 and config.objective.text_dropout == 0.5 and config.optim.lr_bridge == 2e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets of different geometry, a MOVA folder of the tiny model's sizes, and the tree of conf/data/mova_*."""
    root = tmp_path_factory.mktemp("phases")
    config = compose_train(["run.id=x", "data.path=x", *TINY])[0].model
    weights.mova_folder(root / "mova", config)
    small = Bucket(frames=2, height=2, width=2, audio_steps=5, fps=24.0, has_video=True, has_audio=True)
    large = Bucket(frames=2, height=4, width=6, audio_steps=5, fps=24.0, has_video=True, has_audio=True)
    for phase, bucket in ((1, small), (2, small), (3, large)):
        for name, seed in (("speech/train", 1), ("other/train", 2), ("speech/valid", 3)):
            make_dataset(
                root / f"shards/phase{phase}" / name, [(bucket, 4)], dim=256, seed=10 * phase + seed, mixes=True
            )
    return root


def test_phases_mova_is_a_chain(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One command for 64 GPUs, paths as they stand in conf/: three runs, each from the one before."""
    monkeypatch.chdir(folder)
    model = [argument for argument in TINY if argument.startswith("model")]
    given = ["cluster=slurm", "cluster.nodes=8", "cluster.gpus=8", "phases=mova", "run.id=big", "init.source=mova"]
    launches = compose_phases([*given, *model])
    assert [launch.run_dir.root.name for launch in launches] == ["big-phase1", "big-phase2", "big-phase3"]
    assert [launch.train.init.source for launch in launches] == ["mova", "runs/big-phase1", "runs/big-phase2"]
    assert [launch.train.data.batch_size for launch in launches] == [128, 128, 64]
    assert [launch.train.parallel.ring for launch in launches] == [1, 1, 2]
    with pytest.raises(
        RunError, match="phase phase1: dataset shards/phase1/speech/train .* width 256, the model reads"
    ):
        compose_phases(given)


@pytest.mark.slow
def test_the_chain_runs_at_tiny_size_with_another_resolution_at_its_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a learning rate of 0 the weights of the last phase are those that the first one was given, to the bit."""
    monkeypatch.chdir(folder)
    given = [*TINY, "cluster=local", "cluster.processes=1", "phases=mova", "run.id=tiny", "init.source=mova"]
    assert program.PROGRAM.run(given) == 0
    runs = [RunDir(folder / "runs" / f"tiny-phase{phase}") for phase in (1, 2, 3)]
    assert [json.loads(run.status.read_text())["state"] for run in runs] == ["finished"] * 3
    tables = [json.loads((run.root / "layout.json").read_text()) for run in runs]
    assert "2 x 2 x 2 latents" in str(tables[0]) and "2 x 4 x 6 latents" in str(tables[2])
    for before, run in zip(runs, runs[1:], strict=False):
        assert f"{before.root.relative_to(folder)}/checkpoints/step-00000002" in str(
            json.loads((run.root / "layout.json").read_text())["start of bridge"]
        )
    last = runs[-1].root / "checkpoints" / "step-00000002"
    given_weights = {
        f"model.{part}.{name}": tensor
        for part in ("video_dit", "video_dit_2", "audio_dit", "dual_tower_bridge")
        for name, tensor in weights.folder_tensors(folder / "mova" / part).items()
    }
    found = {name: torch.empty(tensor.shape) for name, tensor in given_weights.items()}
    dcp.load(found, checkpoint_id=last, no_dist=True)
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in given_weights.items())


def test_one_launch_needs_data() -> None:
    with pytest.raises(UserError, match="data.path is missing: give it on the command line"):
        compose_launch(["run.id=x", "experiment=mova_phase1_360p"])
