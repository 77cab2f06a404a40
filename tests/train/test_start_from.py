"""run.start_from: another run's weights, a fresh optimizer, step 0; under both kinds of engine."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from data.clip import Bucket
from tests.distributed import run_cases
from tests.shards import make_dataset
from tests.train.runs import train

STILL = ["optim.lr_tower=0", "optim.lr_bridge=0", "steps=1", "validation.every=0"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("start_from")
    bucket = Bucket(frames=2, height=2, width=2, audio_steps=5, fps=24.0, has_video=True, has_audio=True)
    make_dataset(root / "data", [(bucket, 8)], dim=6)
    return root


@pytest.fixture(scope="module")
def outcomes(root: Path) -> dict:
    data, first = root / "data", root / "first"
    cases = {
        "first": (train, (root, data, "first", "steps=3", "validation.every=0")),
        "fsdp2": (train, (root, data, "fsdp2", *STILL, f"run.start_from={first}")),
        "zero2": (train, (root, data, "zero2", *STILL, f"run.start_from={first}", "parallel=zero2")),
        "one": (train, (root, data, "one", *STILL, f"run.start_from={first}/checkpoints/step-00000003")),
        "wider": (train, (root, data, "wider", *STILL, f"run.start_from={first}", "model.video.ffn_dim=80")),
        "nothing": (train, (root, data, "nothing", *STILL, f"run.start_from={root}/nowhere")),
        "again": (train, (root, data, "fsdp2", *STILL, "steps=2", f"run.start_from={first}")),
    }
    return run_cases(2, cases)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    described = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {key: torch.empty(one.size) for key, one in described.items() if key.startswith("model.")}
    dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    return tensors


@pytest.mark.parametrize("run", ["fsdp2", "zero2", "one"])
def test_weights_are_taken_and_the_optimizer_is_fresh(root: Path, outcomes: dict, run: str) -> None:
    """At a learning rate of 0, what is saved after a step is what was taken."""
    assert outcomes[run][0].get("ending") == "finished", outcomes[run][0]
    there = root / run / "checkpoints" / "step-00000001"
    taken, given = weights(there), weights(root / "first" / "checkpoints" / "step-00000003")
    assert taken.keys() == given.keys() and len(taken) > 20
    assert all(torch.equal(taken[key], given[key]) for key in taken)
    assert set(json.loads((there / "state.json").read_text())["optimizer_steps"].values()) == {1}
    assert f"weights of {root}/first/checkpoints/step-00000003" in outcomes[run][0]["said"]


def test_a_run_with_a_checkpoint_goes_on_from_its_own(outcomes: dict) -> None:
    assert outcomes["again"][0]["ending"] == "finished"
    assert "resumed from" in outcomes["again"][0]["said"] and "weights of" not in outcomes["again"][0]["said"]


def test_what_cannot_be_taken_is_refused(outcomes: dict) -> None:
    assert "holds other parameters than the model" in outcomes["wider"][0]["error"]
    assert "ffn" in outcomes["wider"][0]["error"]
    assert "nowhere cannot be used" in outcomes["nothing"][0]["error"]
