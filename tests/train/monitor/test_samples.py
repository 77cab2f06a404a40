"""Records that name files show and send nothing that lies outside of their run, whoever wrote them."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from core.run_dir import RunDir
from tools.report.__main__ import render
from train.checkpoint.uploads import waiting_uploads
from train.monitor.samples import SampleRecord, add_samples, read_samples

SECRET = b"the private key of somebody"
GOOD = {"step": 5, "file": "step-00000005/a.mp4", "kind": "text", "prompt": "a test", "seed": 0}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one true clip, a secret beside it and one within it."""
    run = tmp_path / "runs" / "x"
    (run / "samples" / "step-00000005").mkdir(parents=True)
    (run / "samples" / "held-out").mkdir()
    (run / "samples" / "step-00000005" / "a.mp4").write_bytes(b"a clip")
    (run / "config.yaml").write_text("steps: 9\n")
    for secret in (tmp_path / "secret.mp4", tmp_path / "runs" / "secret.mp4", run / "secret.mp4"):
        secret.write_bytes(SECRET)
    add_samples(run, [SampleRecord(**GOOD)])
    return run


def record(run: Path, **values: Any) -> None:
    with open(run / "samples" / "samples.jsonl", "a") as file:
        file.write(json.dumps({**GOOD, **values}) + "\n")


def shown(run: Path) -> list[str]:
    """Files of the report, after a look for the secret in it."""
    page = render(RunDir(run), 12, 10_000_000)
    assert base64.b64encode(SECRET).decode()[:-4] not in page and SECRET.decode() not in page
    return [sample.file for sample in read_samples(run)]


def test_a_true_clip_is_shown(run: Path) -> None:
    assert shown(run) == [GOOD["file"]]
    assert base64.b64encode(b"a clip").decode() in render(RunDir(run), 12, 10_000_000)


@pytest.mark.parametrize(
    "name",
    ["{tmp}/secret.mp4", "../../secret.mp4", "../secret.mp4", "step-00000005/../../secret.mp4", "/etc/passwd",
     "link.mp4", "linked/secret.mp4", "circle.mp4", "nul\0.mp4", "step-00000005", "."],
)  # fmt: skip
def test_a_name_or_a_link_that_leads_out_is_passed_over(run: Path, tmp_path: Path, name: str) -> None:
    (run / "samples" / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (run / "samples" / "linked").symlink_to(tmp_path)
    (run / "samples" / "circle.mp4").symlink_to("circle.mp4")
    record(run, file=name.format(tmp=tmp_path))
    assert shown(run) == [GOOD["file"]]


def test_a_held_out_clip_cannot_lead_out(run: Path, tmp_path: Path) -> None:
    (run / "samples" / "held-out" / "linked.mp4").symlink_to(tmp_path / "secret.mp4")
    for number, source in enumerate(("../../../secret", f"{tmp_path}/secret", "../../secret", "linked")):
        (run / "samples" / f"{number}.mp4").write_bytes(b"a clip")
        record(run, file=f"{number}.mp4", source=source)
    assert shown(run) == ["3.mp4", GOOD["file"]]  # its own clip is there, what it was given is not


def test_a_samples_folder_that_is_a_link_to_elsewhere(run: Path, tmp_path: Path) -> None:
    (run / "samples").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "b.mp4").write_bytes(SECRET)
    (run / "samples").symlink_to(tmp_path / "elsewhere")
    record(run, file="b.mp4")
    assert shown(run) == []


@pytest.mark.parametrize(
    "values",
    [{"file": 5}, {"file": None}, {"step": "5"}, {"prompt": ["a"]}, {"measures": {"f1": "x"}}, {"measures": [1]},
     {"source": {}}, {"another": 1}],
)  # fmt: skip
def test_a_line_that_means_something_else_is_passed_over(run: Path, values: dict[str, Any]) -> None:
    (run / "samples" / "b.mp4").write_bytes(b"a clip")
    record(run, **{"file": "b.mp4", **values})
    with open(run / "samples" / "samples.jsonl", "ab") as file:
        file.write(b'[1, 2]\n5\n"text"\n\xff\xfe\n')
    assert shown(run) == [GOOD["file"]]


def test_uploads_that_wait_are_checkpoints_of_the_run(run: Path) -> None:
    for folder in (run / "checkpoints" / "step-00000005", run.parent / "y" / "step-00000007"):
        folder.mkdir(parents=True)
        (folder / "COMMITTED").write_text("{}")
    names = ["step-00000005", "../../y/step-00000007", str(run.parent / "y" / "step-00000007"), 7, None]
    (run / "uploads.json").write_text(json.dumps({"waiting": names}))
    assert waiting_uploads(run / "checkpoints") == [run / "checkpoints" / "step-00000005"]
