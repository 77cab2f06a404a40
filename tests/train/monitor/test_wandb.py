"""One W&B run over stops, kills and resumes: each step once, read back from the files as wandb's own messages."""

import json
import os
import re
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import wandb

from core.run_dir import RunDir
from data.clip import Bucket
from launch.status import wandb_trouble
from tests.shards import make_dataset
from tests.train import runs
from tests.train.monitor.wandb_server import WandbServer
from train.monitor.samples import SampleRecord, add_samples, folder_of
from train.monitor.wandb_log import WandbLog

CLIP = Bucket(frames=2, height=4, width=4, audio_steps=9, fps=24.0, has_video=True, has_audio=True)
REPOSITORY = Path(__file__).parents[3]
SECRETS = ["checkpoint.upload=['true','https://me:SESAME@host/{path}?sig=SESAME','X_TOKEN=SESAME']"]


def messages(octets: bytes) -> Iterator[bytes]:
    """The messages of a .wandb file: LevelDB's log format after a header of 7 bytes (wandb 0.31 has no reader of it in
    Python any more). A message is one piece, or a first, middle ones and a last, none of which crosses a block."""
    block, header = 32768, struct.Struct("<IHB")
    assert octets[:4] == b":W&B"
    place, whole = 7, b""
    while place + header.size <= len(octets):
        left = block - place % block
        if left < header.size:
            place += left
            continue
        checksum, size, kind = header.unpack_from(octets, place)
        part = octets[place + header.size : place + header.size + size]
        if len(part) < size or kind == 0:
            return  # the end of one that was killed
        assert zlib.crc32(bytes([kind]) + part) == checksum
        place += header.size + size
        whole = part if kind in (1, 2) else whole + part
        if kind in (1, 4):
            yield whole


def _complete(octets: bytes) -> bool:
    from wandb.proto import wandb_internal_pb2

    last = wandb_internal_pb2.Record()
    last.ParseFromString([b"", *messages(octets)][-1])
    return last.WhichOneof("record_type") == "exit"


def read_back(run: Path) -> dict:
    """{"history": [(step, values)], "config", "alerts"} of the newest offline folder."""
    from wandb.proto import wandb_internal_pb2

    (folder,) = (run / "wandb").glob("offline-run-*")
    (file,) = folder.glob("run-*.wandb")
    ended = time.time() + 30
    while time.time() < ended and not _complete(file.read_bytes()):
        time.sleep(0.05)  # wandb's own process writes the last of it after `finish`
    found: dict = {"history": [], "config": {}, "alerts": [], "id": file.stem.removeprefix("run-")}
    for octets in messages(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(octets)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = {
                (item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item
            }
            found["history"].append((record.history.step.num, items))
        elif kind in ("run", "config"):
            config = record.run.config if kind == "run" else record.config
            found["config"] |= {item.key: json.loads(item.value_json) for item in config.update}
        elif kind == "alert":
            found["alerts"].append((record.alert.title, record.alert.text))
    return found


def expected_rows(run: Path) -> dict[int, dict]:
    rows: dict[int, dict] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        row = rows.setdefault(record.pop("step"), {})
        row |= {name: value for name, value in record.items() if value is not None}
    return rows


def assert_equal(found: dict, run: Path) -> None:
    """Every step once, with what metrics.jsonl says of it."""
    expected = expected_rows(run)
    assert [step for step, _ in found["history"]] == sorted(expected)
    for step, items in found["history"]:
        values = {name: value for name, value in items.items() if not name.startswith(("_", "samples/"))}
        assert values == expected[step], step


def start(root: Path, *overrides: str) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "train", *runs.SMALL, f"run.root={root}", "run.id=one", f"data.path={root / 'data'}",
        f"data.valid_path={root / 'valid'}", "checkpoint.every=3", "monitor.wandb=offline", *SECRETS, *overrides,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, env=environment, cwd=root, stderr=subprocess.PIPE, text=True)


def wait_for(run: Path, steps: int, process: subprocess.Popen) -> None:
    """Until so many steps are recorded, and W&B has begun to write."""
    metrics, deadline = run / "metrics.jsonl", time.time() + 120
    while time.time() < deadline:
        assert process.poll() is None, process.stderr.read()
        trains = metrics.exists() and metrics.read_text().count('"train/loss"') >= steps
        if trains and list((run / "wandb").glob("offline-run-*/run-*.wandb")):
            return
        time.sleep(0.02)
    raise AssertionError("the run does not train")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run stopped, killed, stopped, and gone on with to its end."""
    root = tmp_path_factory.mktemp("wandb")
    make_dataset(root / "data", [(CLIP, 9), (CLIP, 6)])
    make_dataset(root / "valid", [(CLIP, 4)], seed=1)
    run, said = root / "one", []
    for number, ending in enumerate(["stop", "kill", "stop"]):
        process = start(root, "steps=100000")
        before = 0 if not number else len(expected_rows(run))
        wait_for(run, before + 5, process)
        if ending == "kill":
            psutil.Process(process.pid).kill()
        else:
            (run / "stop").touch()
        said.append(process.communicate(timeout=60)[1])
    done = max(expected_rows(run))
    process = start(root, f"steps={done + 3}")
    said.append(process.communicate(timeout=120)[1])
    assert process.returncode == 0, said[-1][-2000:]
    return run, said


def test_each_step_stands_once_with_the_values_of_metrics_jsonl(run):
    found = read_back(run[0])  # one folder is left, whatever was killed
    assert_equal(found, run[0])
    assert len(found["history"]) > 15 and found["id"] == "one"
    assert any("valid/loss" in items for _, items in found["history"])
    steps = [json.loads(line)["step"] for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in (run[0] / "metrics.jsonl").read_text().splitlines() if "train/loss" in line]
    assert len(training) == max(steps)  # the last record is a validation, after so many steps


def test_the_config_and_the_layout_are_attached_and_the_user_hears_how_to_upload(run):
    found = read_back(run[0])
    assert found["config"]["model"]["text_length"] == 4 and "ranks" in found["config"]["layout"]
    assert json.loads((run[0] / "layout.json").read_text()) == found["config"]["layout"]
    (folder,) = (run[0] / "wandb").glob("offline-run-*")
    assert f"wandb sync {folder}" in run[1][-1]


def test_no_file_of_a_run_holds_a_secret_of_its_command(run):
    """Its config, checkpoints, events, and what W&B records of the process."""
    files = [path for path in run[0].rglob("*") if path.is_file()]
    assert {"config.yaml", "state.json", "events.jsonl", "run-one.wandb"} <= {path.name for path in files}
    assert [path for path in files if b"SESAME" in path.read_bytes()] == []
    assert b"https://host/{path}" in (run[0] / "config.yaml").read_bytes()


def log_of(root: Path, *, alert: bool = False, samples: bool = False) -> RunDir:
    run = RunDir.of(str(root), "small")
    run.root.mkdir(exist_ok=True)
    if samples:
        folder_of(run.root).mkdir(exist_ok=True)
        (folder_of(run.root) / "a.mp4").write_bytes(b"not a film, but W&B does not look")
        add_samples(
            run.root, [SampleRecord(step=1, file="a.mp4", kind="text", prompt="a ball", seed=0, measures={"f1": 0.5})]
        )
    log = WandbLog(run, "offline", "mova", {}, None)
    if alert:
        log.alert("small: stopped", "after 3 steps")
    log.close()
    return run


def test_words_alerts_and_a_line_that_death_cut_off(tmp_path):
    (tmp_path / "small").mkdir()
    lines = [
        {"step": 0, "train/loss": 1.0, "train/expert": "high"},
        {"step": 1, "train/loss": None},
        {"step": 1, "v": 2},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "small" / "metrics.jsonl").write_text(text + '{"step": 2, "tr')
    found = read_back(log_of(tmp_path, alert=True).root)
    assert [(step, {k: v for k, v in row.items() if k[0] != "_"}) for step, row in found["history"]] == [
        (0, {"train/loss": 1.0, "train/expert": "high"}), (1, {"v": 2})
    ]  # fmt: skip
    assert found["alerts"] == [("small: stopped", "after 3 steps")]


def test_clips_are_attached_and_still_are_after_the_next_start(tmp_path):
    (tmp_path / "small").mkdir()
    text = "".join(json.dumps({"step": step, "train/loss": 1.0}) + "\n" for step in range(3))
    (tmp_path / "small" / "metrics.jsonl").write_text(text)
    for _ in range(2):
        run = log_of(tmp_path, samples=True)
        (row,) = [row for _, row in read_back(run.root)["history"] if any(key.startswith("samples/") for key in row)]
        assert row["samples/f1/a"] == 0.5 and "of step 1: a ball" in json.dumps(row)
        assert [file.suffix for file in (run.root / "wandb").glob("offline-run-*/files/media/videos/**/*.mp4")] == [
            ".mp4"
        ]
        time.sleep(1.1)  # folders are named by the second


def test_online_the_server_has_each_step_once_after_kills_ahead_of_the_checkpoint_and_behind_it(tmp_path):
    """wandb's own client against a server on loopback; the first kill finds steps there that the run takes back, the
    second one steps that never left. W&B runs already where the starts begin, as under a sweep: there a run that was
    killed would stay open, and the next start would be refused."""
    core = [sys.executable, "-m", "wandb", "beta", "core"]
    bare = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    begun = subprocess.run(
        [*core, "start", "--idle-timeout", "10m"], env=bare, check=True, text=True, stdout=subprocess.PIPE
    )
    shared = bare | {"WANDB_SERVICE": begun.stdout.strip()}
    server = WandbServer()
    run = tmp_path / "small"
    run.mkdir()
    metrics = run / "metrics.jsonl"
    metrics.touch()
    key = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40, "PYTHONPATH": str(REPOSITORY)}

    def write(first: int, end: int, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.train.monitor.wandb_writer", str(run), str(first), str(end), *more]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=shared | key)

    def kill(process: subprocess.Popen[str], steps: int, kept: int) -> None:
        """Once the server has that many; the checkpoint has `kept`."""
        assert process.stdout is not None and process.stdout.readline() == "written\n"
        end = time.monotonic() + 60
        while len(server.history) < steps:
            assert time.monotonic() < end, f"the server has {len(server.history)} of {steps} steps"
            time.sleep(0.1)
        process.kill()
        process.wait()
        metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:kept]))

    try:
        kill(write(0, 12, "hang"), 11, kept=8)  # wandb keeps the newest step until it is complete
        kill(write(8, 16, "hang"), 11, kept=14)
        assert len(server.history) == 11
        assert write(14, 20).wait(60) == 0
    finally:
        server.close()
        subprocess.run([*core, "stop"], env=shared, check=True)
    written = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert server.ids == {"small"}
    assert [row["_step"] for row in server.history] == list(range(20)) == [row["step"] for row in written]
    assert [row["train/loss"] for row in server.history] == [row["train/loss"] for row in written]
    assert server.config["layout"]["value"] == {"ranks": "1 on cpu"} and server.alerts == ["small: finished"]


def test_a_finished_run_that_goes_on_loses_no_step_on_the_server(tmp_path):
    """It ends with a validation after its last step, whose number the first step of the next start has."""
    server, run = WandbServer(), tmp_path / "small"
    run.mkdir()
    metrics = run / "metrics.jsonl"
    metrics.touch()
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    environment |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40, "PYTHONPATH": str(REPOSITORY)}
    try:
        for first, end in ((0, 6), (6, 12)):
            command = [
                sys.executable,
                "-m",
                "tests.train.monitor.wandb_writer",
                str(run),
                str(first),
                str(end),
                "valid",
            ]
            assert subprocess.run(command, env=environment, timeout=90).returncode == 0
    finally:
        server.close()
    trained = [(row["_step"], row["train/loss"]) for row in server.history if "train/loss" in row]
    assert trained == [(step, 1 / (step + 1)) for step in range(12)]
    assert {row["valid/loss"] for row in server.history if "valid/loss" in row} == {6.0, 12.0}


def alone(name, folder):
    """(what a case of wandb_alone.py found, what it said)."""
    command = [sys.executable, "-m", "tests.train.monitor.wandb_alone", name, str(folder)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_the_death_of_wandbs_process_is_said_at_once_and_ends_nothing(tmp_path):
    found, said = alone("death", tmp_path)
    assert "training and metrics.jsonl continue" in found["trouble"] and found["trouble"] in said
    assert found["seconds"] < 5 and found["closing"] < 5
    run = RunDir(tmp_path / "small")
    events = [{"event": "W&B off", "step": 3, "time": "t"}, {"event": "resumed", "step": 3}]
    for known, told in ((1, "off since step 3"), (2, "None")):
        (run.root / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events[:known]))
        assert told in str(wandb_trouble(run))


def test_a_start_is_served_by_its_own_process_whatever_died_before_it_in_the_same_process(tmp_path):
    found, said = alone("after_deaths", tmp_path)
    assert len(found["served"]) == 1 and found["second"] is None and found["sent"] == 1, (found, said)
    dead = [re.search(r"its process (\d+) died", found[name] or "") for name in ("first", "third")]
    assert all(dead) and len({*(int(one[1]) for one in dead), *found["served"], found["foreign"]}) == 4, found


def test_what_a_start_sends_again_takes_a_small_share_of_time(tmp_path):
    """What its pauses leave of the time, which training would have had."""
    found, _ = alone("backlog", tmp_path)
    assert found["sent"] > 0 and found["share"] < 0.25, found


def test_nothing_of_wandb_ends_a_run(tmp_path, monkeypatch, caplog):
    def broken(**_):
        raise RuntimeError("no disk")

    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "metrics.jsonl").write_text("")
    monkeypatch.setattr(wandb, "init", broken)
    assert log_of(tmp_path).root.is_dir()
    assert "W&B is off from here on (RuntimeError: no disk)" in caplog.text
