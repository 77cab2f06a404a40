"""`mova plan`: what it prints and writes, what it refuses, and launch.plan."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import launch.__main__ as launcher
from bench.train.planned import cpu_sheet
from core.errors import EXIT_FAILED, EXIT_OK, RunError, UserError
from core.run_dir import RunDir
from data.clip import Bucket
from launch.compose import compose_phases
from launch.planned import plan_launch
from tests.shards import make_dataset
from tools.plan.__main__ import PROGRAM
from tools.plan.page import timeline
from train.monitor.planned import read_planned
from train.plan.timing import Span

NUMBERS = (
    "peak_gib", "step_seconds", "mfu", "hfu", "days", "gpu_days", "clips_per_day", "host_gib", "checkpoint_gib",
    "read_gb_per_s",
)  # fmt: skip
TINY = ["model=tiny", "data.batch_size=4", "cluster=local", "cluster.processes=2"]


def total(value: Any) -> float:
    """A number, or an object with its total and parts."""
    if isinstance(value, dict):
        assert value["total"] == pytest.approx(sum(value["parts"].values()))
        return float(value["total"])
    return float(value)


def plan(*arguments: str) -> int:
    return PROGRAM.run(list(arguments))


@pytest.mark.slow
def test_the_plan_of_a_small_run_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "plan.json", tmp_path / "plan.html"
    assert plan(*TINY, "gpu=h100", "steps=1000", "search=true", "processes=1", f"out={out}", f"page={page}") == EXIT_OK
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    assert found["fits"] is True and all(total(found[name]) >= 0 for name in NUMBERS)
    assert found["gpus"] == 2 and found["steps"] == 1000
    seconds, days = total(found["step_seconds"]), total(found["days"])
    assert found["gpu_days"] == pytest.approx(2 * days) and found["clips_per_day"] == pytest.approx(4000 / days)
    assert found["days"]["parts"]["training"] == pytest.approx(1000 * seconds / 86400)
    assert 0 < found["mfu"] <= found["hfu"] and found["bound_seconds"] <= seconds
    rows = found["search"]
    assert len(rows) > 5 and [row["step_seconds"] for row in rows if row["fits"]] == sorted(
        row["step_seconds"] for row in rows if row["fits"]
    )
    assert rows[0]["reason"] == "the fastest that fits" and all(row["reason"] for row in rows)
    assert {row["recompute"] for row in rows} >= {"none", "selective", "full"}
    assert {row["micro_batch"] for row in rows} == {1, 2} and {row["accumulate"] for row in rows} > {"sharded"}
    for words in ("fits: ", "predicted, not measured", "MFU", "GPU-days", "layouts", "at most"):
        assert words in said
    text = page.read_text()
    assert text.count("<svg") == 4 and "fits: " in text and "http" not in text.replace("http-equiv", "")


def test_the_timeline_has_a_forward_and_a_backward_however_many_micro_batches() -> None:
    """Two of five layers in each picture; here forwards reduce nothing, and backwards take twice as long."""
    spans, now = [], 0.0
    for _ in range(4):
        for layer in range(5):
            spans.append(Span("compute", f"video_dit.blocks.{layer}", now, now := now + 1 / 64))
        for layer in (4, 3, 2, 1, 0):
            spans.append(Span("compute", f"video_dit.blocks.{layer}", now, now := now + 1 / 32))
            spans.append(Span("reduce", f"video_dit.blocks.{layer}", now - 1 / 32, now))
    for micro_batches in (4, 1):
        pictures = str(timeline(spans[: 15 * micro_batches], micro_batches)).split("<br>")[:2]
        assert "forward, 31.2 ms" in pictures[0] and "backward, 62.5 ms" in pictures[1]
        seen = [re.findall(r"<title>video_dit.blocks.(\d): ", picture) for picture in pictures]
        assert seen == [["1", "2"], ["3", "2", "3", "2"]]  # the stream of reductions below the computing one
    assert "too few layers" in timeline(spans[:2], 1)


@pytest.mark.slow
def test_what_does_not_fit_comes_with_a_remedy(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sheet = tmp_path / "small.yaml"
    whole = vars(cpu_sheet()) | {"device": "cuda", "memory_gib": 2.595, "title": "small"}
    sheet.write_text(yaml.safe_dump(whole))
    assert plan(*TINY, f"gpu={sheet}", "processes=1", "data.batch_size=16", "data.micro_batch=8") == EXIT_OK
    said = capsys.readouterr().out
    assert "ways to share a clip, about " in said and " of them fit" in said
    assert "DOES NOT FIT" in said and "remedy      parallel." in said and "recompute=" in said.partition("remedy")[2]


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["gpu=h101"], "there is no such sheet; did you mean h100"),
        (["gpu=h100", "rate=best"], "rate 'best' is not one of low, middle, high"),
        (["gpu=h100", "frames=100"], "frames=100 is not 1 + 4k"),
        (["gpu=h100", "width=100"], "width=100 is no multiple of 16"),
        (["gpu=h100", "parallel.ulysses=3"], "does not divide"),
        (["gpu=h100", "data.batch_size=1"], "data.batch_size=1 is less than the 2 groups of ranks"),
        (["gpu=h100", "optim.lr_towr=1"], "did you mean optim.lr_tower"),
        (["gpu=h100", "parallel.engine=zero2"], "parallel.engine=zero2 can't be planned: the time model has"),
        (["gpu=h100", "parallel.compute_dtype=float32"], "float32 can't be planned for a GPU: its sheet has the rates"),
        (["gpu=h100", "out=/nowhere/plan.json"], "out=/nowhere/plan.json: no file can be written there"),
        (["gpu=h100", "page=/"], "page=/: no file can be written there"),
        (["gpu=h100", "hours=nan"], "hours is nan; it must be above 0"),
        (["gpu=h100", "assume.price=inf"], "assume.price is inf"),
        (["gpu=h100", "experiment=nope"], "conf/experiment has no nope; choose one of"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*TINY, *arguments) == EXIT_FAILED
    said = capsys.readouterr().err
    assert words in said and said.startswith("error: ") and said.count("\n") == 1


def test_a_cluster_without_gpus_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("model=tiny", "gpu=h100", "cluster.nodes=2") == EXIT_FAILED
    assert "cluster.gpus is 0: say how many GPUs a node has" in capsys.readouterr().err


def test_clips_in_pixels_and_hours_of_video(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    given = ["gpu=h100", "frames=25", "height=128", "width=96", "hours=2", f"out={out}"]
    assert plan(*TINY, *given) == EXIT_OK
    found = json.loads(out.read_text())
    assert found["video_tokens"] == 7 * 8 * 6
    assert found["steps"] == -(-2 * 3600 * 24 // (25 * 4)) and found["video_hours"] == pytest.approx(2, abs=0.01)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    bucket = Bucket(frames=2, height=2, width=2, audio_steps=5, fps=24.0, has_video=True, has_audio=True)
    return make_dataset(tmp_path / "data", [(bucket, 8)], dim=6)


@pytest.mark.parametrize("cluster", ["local", "slurm"])
def test_a_launch_that_does_not_fit_is_refused_before_anything_is_written(
    dataset: Path, tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("submit", "train_here"):
        monkeypatch.setattr(launcher, name, lambda *_: pytest.fail("it was started"))
    sheet = tmp_path / "small.yaml"
    sheet.write_text(yaml.safe_dump(vars(cpu_sheet()) | {"device": "cuda", "memory_gib": 2.51, "title": "small"}))
    given = [
        "model=tiny", "model.video.text_dim=6", "model.audio.text_dim=6", f"run.root={tmp_path}/runs", "run.id=big",
        f"data.path={dataset}", "data.batch_size=2", f"cluster={cluster}", "launch.plan=true", f"launch.gpu={sheet}",
    ]  # fmt: skip
    with pytest.raises(RunError, match=r"needs 2\.\d GiB of each GPU \(weights .*small has 2\.5: nothing"):
        launcher.main(given)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match="launch.plan=true needs the kind of GPU"):
        launcher.main(given[:-1])


def test_a_plan_lies_in_the_folder_of_its_run_and_stands_beside_what_is_measured(dataset: Path, tmp_path: Path) -> None:
    (submitted,) = compose_phases(
        ["model=tiny", "model.video.text_dim=6", "model.audio.text_dim=6", f"run.root={tmp_path}", "run.id=small",
         f"data.path={dataset}", "data.batch_size=2", "cluster.processes=2", "launch.plan=true", "launch.gpu=h100"]
    )  # fmt: skip
    run = submitted.run_dir
    run.root.mkdir()
    run.plan.write_text(plan_launch(submitted))
    found = json.loads(run.plan.read_text())
    planned = read_planned(run, 2)
    kinds = {name: planned.pop(name) for name in list(planned) if name.endswith("_time") and "step" not in name}
    assert kinds == {f"perf/planned_{kind}_time": busy for kind, busy in found["kernel_seconds"].items()}
    assert len(kinds) == 5 and kinds["perf/planned_gemm_time"] > 0 and kinds["perf/planned_host_copies_time"] == 0
    assert planned == {
        "perf/planned_step_time": found["step_seconds"]["total"],
        "perf/planned_memory_gib": found["peak_gib"]["total"],
        "perf/planned_mfu": found["mfu"],
    }
    assert found["video_tokens"] == 2  # of the dataset's largest clip, without anybody naming its size
    assert read_planned(run, 4) == {}  # of other GPUs
    run.plan.write_text("{")
    assert read_planned(run, 2) == {} and read_planned(RunDir(tmp_path / "other"), 2) == {}
