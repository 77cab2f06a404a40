"""A run, a dataset, a held-out set and a start of different encoders never meet silently: each refuses, naming both."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from core.errors import RunError
from data.clip import Bucket
from tests.distributed import run_cases
from tests.shards import make_dataset
from tests.train.runs import train
from tools.export.folder import export
from tools.export.request import ExportRequest
from train.encoders import encoders_of_data

A = {"video": "wan-vae-1-aa", "audio": "dac-vae-1-aa", "text": "umt5-1-aa"}
KINDS = {kind: A | {kind: f"{kind}-bb"} for kind in A}
SHORT = ["steps=1", "validation.every=0"]
ONE = "checkpoints/step-00000001"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoders")
    bucket = Bucket(frames=2, height=2, width=2, audio_steps=5, fps=24.0, has_video=True, has_audio=True)
    for number, (name, encoders) in enumerate({"a": A, "none": None, **KINDS}.items()):
        make_dataset(root / name, [(bucket, 8)], encoders=encoders, seed=number)
    return root


@pytest.fixture(scope="module")
def outcomes(root: Path) -> dict:
    def run(name: str, data: str, *keys: str) -> tuple:
        return train, (root, root / data, name, *SHORT, *keys)

    start = f"init.source={root}/first"
    later = f"data.segments=[{{first_step: 1, datasets: [{{path: {root}/audio}}]}}]"
    mixed = f"data.datasets=[{{path: {root}/a}}, {{path: {root}/text}}]"
    cases = {
        "first": run("first", "a"),
        "unknown": run("unknown", "none"),
        **{f"start {kind}": run(f"start-{kind}", kind, start) for kind in KINDS},
        **{f"resume {kind}": run("first", kind, "steps=2") for kind in KINDS},
        **{f"validation {kind}": run(f"valid-{kind}", "a", f"data.valid_path={root}/{kind}") for kind in KINDS},
        "grown": run("grown", "a"),
        "grown, not asked": run("grown", "a", "steps=2", later),
        "grown, asked": run("grown", "a", "steps=2", later, "data.ignore_encoders=true"),
        "segments": run("segments", "a", later),
        "mixing": run("mixing", "a", "data.path=null", mixed),
        "ignored": run("ignored", "video", start, "data.ignore_encoders=true"),
        "taken": run("taken", "a", f"init.source={root}/unknown"),
        "export": (exported, (root,)),
        **{f"folder {kind}": run(f"folder-{kind}", kind, f"init.source={root}/out") for kind in KINDS},
        "folder ignored": run("folder-ignored", "text", f"init.source={root}/out", "data.ignore_encoders=true"),
        "folder taken": run("folder-taken", "a", f"init.source={root}/silent"),
        "folder damaged": run("folder-damaged", "a", f"init.source={root}/damaged"),
        "folder gives": run("folder-gives", "none", f"init.source={root}/out"),
    }
    return {name: found[0] for name, found in run_cases(1, cases).items()}


def exported(root: Path) -> None:
    """out: of the first run; silent: the same without a word of its encoders."""
    export(ExportRequest(root / "first", root / "out", None, "safetensors", None, "float32", None))
    shutil.copytree(root / "out", root / "silent")
    facts = json.loads((root / "out" / "training.json").read_text())
    (root / "silent" / "training.json").write_text(json.dumps(facts | {"encoders": {}}))
    shutil.copytree(root / "out", root / "damaged")
    (root / "damaged" / "training.json").write_text(json.dumps(facts | {"encoders": ["wan"]}))


def state(root: Path, run: str) -> dict:
    return json.loads((root / run / ONE / "state.json").read_text())


def test_fingerprints_stand_in_the_checkpoint(root: Path, outcomes: dict) -> None:
    assert outcomes["first"]["ending"] == "finished", outcomes["first"]
    assert state(root, "first")["encoders"] == A and state(root, "unknown")["encoders"] == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["start", "resume", "validation", "folder"])
def test_each_fingerprint_is_compared_and_both_are_named(outcomes: dict, way: str, kind: str) -> None:
    message = outcomes[f"{way} {kind}"]["error"]
    assert A[kind] in message and f"{kind}-bb" in message and "data.ignore_encoders=true" in message
    named = {"validation": "data.valid_path=", "folder": "/out"}
    assert named.get(way, "first/checkpoints") in message


def test_two_datasets_of_a_run_are_compared(outcomes: dict) -> None:
    assert A["audio"] in outcomes["segments"]["error"] and "audio-bb" in outcomes["segments"]["error"]
    assert A["text"] in outcomes["mixing"]["error"] and "text-bb" in outcomes["mixing"]["error"]


def test_a_resumed_run_takes_other_encoders_when_it_is_told_so(root: Path, outcomes: dict) -> None:
    assert outcomes["grown"]["ending"] == "finished"
    assert "audio-bb" in outcomes["grown, not asked"]["error"]
    assert outcomes["grown, asked"].get("ending") == "finished", outcomes["grown, asked"]


def test_an_explicit_key_goes_on_and_is_recorded(root: Path, outcomes: dict) -> None:
    assert outcomes["ignored"]["ending"] == "finished"
    content = state(root, "ignored")
    assert content["encoders"] == KINDS["video"] and content["config"]["data"]["ignore_encoders"] is True
    assert A["video"] in outcomes["ignored"]["said"] and "video-bb" in outcomes["ignored"]["said"]
    assert outcomes["folder ignored"]["ending"] == "finished"
    content = state(root, "folder-ignored")
    assert content["encoders"] == KINDS["text"] and content["config"]["data"]["ignore_encoders"] is True


def test_weights_that_name_no_encoders_are_taken_for_those_of_the_data(root: Path, outcomes: dict) -> None:
    for name, source in (("taken", "unknown/checkpoints"), ("folder taken", "silent")):
        assert outcomes[name]["ending"] == "finished" and state(root, name.replace(" ", "-"))["encoders"] == A
        lines = [
            line
            for line in outcomes[name]["said"].splitlines()
            if "names no encoders; those of the data are assumed" in line
        ]
        assert len(lines) == 1 and source in lines[0] and all(one in lines[0] for one in A.values())


def test_data_that_names_no_encoders_takes_those_of_the_weights(root: Path, outcomes: dict) -> None:
    assert outcomes["folder gives"]["ending"] == "finished" and state(root, "folder-gives")["encoders"] == A


def test_a_folder_whose_encoders_cannot_be_read_is_refused(outcomes: dict) -> None:
    assert "damaged states encoders ['wan'], expected texts by kind" in outcomes["folder damaged"]["error"]


def test_a_dataset_is_named_for_what_it_states_itself(root: Path) -> None:
    """Of three datasets, the first says nothing: it is not named for what the second says."""
    one, two, three = (
        SimpleNamespace(index=SimpleNamespace(root=name, encoders=stated))
        for name, stated in (("none", {}), ("a", A), ("b", A | {"audio": "audio-bb"}))
    )
    part = SimpleNamespace(mixture=SimpleNamespace(selections=[one, two, three]))
    with pytest.raises(RunError, match="dataset b is of the audio codec audio-bb, dataset a of dac-vae-1-aa"):
        encoders_of_data([part])  # type: ignore[list-item]
