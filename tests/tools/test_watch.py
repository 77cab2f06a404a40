"""mova watch: clips from each checkpoint of a run, beside it."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import pytest
import torch
import torch.distributed as dist

from core.errors import EXIT_RETRY, RunError
from core.jsonl import read_lines
from core.run_dir import RunDir
from data.clip import Bucket
from data.codec import EncoderConfig, codecs_of
from data.codec.builtin import audio, text, video
from data.dataset.index import DatasetIndex
from data.dataset.record import seal
from data.media import open_media
from model.sampler import SamplerConfig
from tests.disks import Disk, disk
from tests.distributed import run_cases
from tests.shards import make_dataset
from tests.train import runs
from tools.clip_requests import WatchConfig, caption_of, orders_of
from tools.watch import StopOnSignal, lock, next_checkpoint, pin, watch
from train.monitor.samples import add_samples, held_out_file, read_samples
from train.parallel.mesh import ParallelConfig, make_layout

BUCKET = Bucket(3, 4, 8, 19, 24.0, True, True)  # 9 frames of 64 x 32 pixels
CODECS = {"video": video.fingerprint, "audio": audio.fingerprint, "text": text.fingerprint}
BUILTIN = codecs_of({}, "nobody", EncoderConfig())
SAMPLER = SamplerConfig(steps=1, text_scale=1.0)


NAMES = ("all", "every", "asked", "lonely", "damaged", "foreign", "two")


def copy(folder: Path) -> None:
    """The run once for each case."""
    if dist.get_rank() == 0:
        for name in NAMES:
            shutil.copytree(folder / "runs/run", folder / name)
    dist.barrier()


def go(run: Path, keys: dict) -> str:
    """Watch to the end."""
    return go_until(run, StopOnSignal(), keys)


def go_until(run: Path, stop: StopOnSignal, keys: dict) -> str:
    parallel = ParallelConfig(ulysses=keys.pop("ulysses", 1))
    config = WatchConfig(run=str(run), sampler=SAMPLER, parallel=parallel, poll=0.05, **keys)
    return watch(config, make_layout(parallel, torch.device("cpu")), stop)


def spoil(path: Path, content: bytes) -> None:
    """Rewrite a file before the case begins."""
    dist.barrier()  # the other rank may be reading what is there, for its own `content`
    if dist.get_rank() == 0:
        path.write_bytes(content)
    dist.barrier()


def go_asked(run: Path) -> str:
    """Asked to end after the first clip of a run that never finishes."""
    spoil(run / "status.json", b'{"state": "running"}')
    stop = StopOnSignal()

    def ask() -> None:
        while not read_samples(run):
            time.sleep(0.01)
        stop.asked = True

    thread = threading.Thread(target=ask)
    thread.start()
    ending = go_until(run, stop, {})
    thread.join()
    return ending


def go_lonely(run: Path) -> str:
    """A run that gives no sign."""
    spoil(run / "status.json", b'{"state": "stopped"}')
    return go(run, {"patience": 0.002, "clips": 1})


def go_damaged(run: Path) -> str:
    """The first checkpoint can't be read, though its sizes are right."""
    path = min((run / "checkpoints/step-00000002").glob("*.distcp"))
    spoil(path, bytes(path.stat().st_size))
    return go(run, {"clips": 1})


def go_foreign(run: Path, valid: Path) -> str:
    """The held-out set has latents of another codec. It is the last case: the set stays so."""
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(valid)
        make_dataset(valid, [(BUCKET, 8)], dim=8, seed=1, encoders=CODECS | {"video": "another"})
    dist.barrier()
    try:
        return go(run, {})
    except RunError as error:
        return str(error)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watch")
    for name, seed in (("data", 0), ("valid", 1)):
        make_dataset(folder / name, [(BUCKET, 8)], dim=8, seed=seed, encoders=CODECS)
    shutil.copytree(folder / "valid", folder / "kept")
    keys = (
        "steps=6",
        "objective.shift_video=3",
        "objective.shift_audio=1.5",
        "objective.boundary=750",
        "model.video.text_dim=8",
        "model.audio.text_dim=8",
        "checkpoint.every=2",
        "checkpoint.keep=3",
    )
    valid = f"data.valid_path={folder}/valid"
    kinds = {"kinds": ["image", "sound"], "clips": 1, "prompts": ["A <ball>."], "impacts": True}
    said = run_cases(
        2,
        {
            "train": (runs.train, (folder / "runs", folder / "data", "run", valid, *keys)),
            "copy": (copy, (folder,)),
            "all": (go, (folder / "all", kinds)),
            "two": (go, (folder / "two", kinds | {"ulysses": 2})),
            "every": (go, (folder / "every", {"every": 3, "clips": 1})),
            "asked": (go_asked, (folder / "asked",)),
            "lonely": (go_lonely, (folder / "lonely",)),
            "damaged": (go_damaged, (folder / "damaged",)),
            "foreign": (go_foreign, (folder / "foreign", folder / "valid")),
        },
    )
    shutil.rmtree(folder / "valid")
    (folder / "kept").rename(folder / "valid")
    return folder, {name: folder / name for name in NAMES}, said


def test_each_checkpoint_gives_each_clip_once_and_then_it_ends(made):
    folder, copies, said = made
    assert "has finished" in said["all"][0]
    key = DatasetIndex.open(folder / "valid").key(0)
    samples = read_samples(copies["all"])
    names = [f"image-{key}", "prompt-0", f"sound-{key}"]
    assert [one.file for one in samples] == [f"step-{step:08d}/{name}.mp4" for step in (2, 4, 6) for name in names]
    assert {one.prompt for one in samples if one.kind == "text"} == {"A <ball>."}
    assert {one.prompt for one in samples if one.source} == {"a test"}  # the caption of the held-out clip
    sampler = samples[0].sampler
    assert sampler["steps"] == 1
    assert [sampler[key] for key in ("shift_video", "shift_audio", "boundary")] == [3.0, 1.5, 750.0]  # as trained
    for one in samples:
        assert {"loudness", "motion", "impacts_seen", "impacts_heard", "impacts_f1"} == set(one.measures)
    for one in samples:
        with open_media(copies["all"] / "samples" / one.file) as media:
            assert media.sound_span is not None and media.frame_times is not None and len(media.frame_times) == 9
    assert held_out_file(copies["all"], key).is_file()
    left = {path.name for path in (copies["all"] / "samples").iterdir()}
    assert left == {"held-out", "samples.jsonl", ".watch-lock", *(f"step-{step:08d}" for step in (2, 4, 6))}


def test_layouts_make_the_same_clips_and_each_is_recorded_once(made):
    _, copies, said = made
    assert said["two"][0] == said["two"][1] == said["all"][0]
    one, two = ([sample.file for sample in read_samples(copies[name])] for name in ("all", "two"))
    assert one == two and len(one) == len((copies["two"] / "samples/samples.jsonl").read_text().splitlines())


def test_every_so_many_steps_and_always_the_last(made):
    assert [one.step for one in read_samples(made[1]["every"])] == [2, 6]
    assert len(read_samples(made[1]["every"])) == 2


def test_asked_to_end_it_ends_after_the_clip_at_work(made):
    _, copies, said = made
    assert said["asked"] == ["stopped on request"] * 2
    assert 1 <= len(read_samples(copies["asked"])) < 6
    assert not list((copies["asked"] / "samples").rglob(".partial*"))


def test_it_does_not_wait_for_ever(made):
    assert "no activity of the run" in made[2]["lonely"][0]


def test_latents_of_another_codec_are_refused(made):
    assert "has video of another" in made[2]["foreign"][0] and not read_samples(made[1]["foreign"])


def test_a_checkpoint_that_cannot_be_read_is_passed_over(made):
    _, copies, said = made
    assert "has finished" in said["damaged"][0]
    assert [one.step for one in read_samples(copies["damaged"])] == [4, 6]


def test_a_checkpoint_outlives_its_rotation(made, tmp_path):
    run = RunDir(tmp_path / "run")
    shutil.copytree(made[1]["all"] / "checkpoints", run.checkpoints)
    path = run.checkpoints / "step-00000004"
    size = sum(file.stat().st_size for file in path.iterdir())
    pinned = pin(path, run)
    shutil.rmtree(path)
    assert pinned is not None and sum(file.stat().st_size for file in pinned.iterdir()) == size
    assert pin(path, run) is None  # gone before it was taken
    gone = run.checkpoints / "step-00000006"
    (gone / "COMMITTED").unlink()
    assert next_checkpoint(run, 2, 0, True) is None


def test_a_run_is_watched_once_and_what_was_made_is_not_made_again(made):
    run = made[1]["all"]
    command = [sys.executable, "-m", "tools.watch", str(run), "kinds=[image,sound]", "clips=1", "prompts=['A <ball>.']",
               "sampler.steps=1", "sampler.text_scale=1"]  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in (run / "samples").rglob("*.mp4")}
    with lock(RunDir(run)):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and "is already being watched" in done.stderr and "Traceback" not in done.stderr
    lost = run / "samples" / read_samples(run)[-1].file
    lost.unlink()  # as if it had been ended before this one
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "has finished" in done.stdout, done.stderr
    after = {path: path.stat().st_mtime_ns for path in (run / "samples").rglob("*.mp4")}
    assert after.keys() == before.keys() and [path for path in after if after[path] != before[path]] == [lost]


def watcher_of(run: Path, said: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tools.watch", str(run), "kinds=[image]", "clips=1", "sampler.steps=1",
               "sampler.text_scale=1", "poll=0.1", *more]  # fmt: skip
    with open(said, "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file)


def wait_until_it_says(words: str, said: Path, watcher: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while words not in said.read_text():
        assert watcher.poll() is None and time.monotonic() < end, said.read_text()
        time.sleep(0.05)


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def made_on(small: Disk, made: tuple) -> Path:
    """A run that ended a day ago, whose clips and held-out clips are still to be made."""
    run = small.path / "run"
    shutil.copytree(made[1]["all"], run, ignore=shutil.ignore_patterns("samples"))
    for path in (path for path in run.iterdir() if path.is_file()):
        os.utime(path, (time.time() - 86400,) * 2)
    return run


def test_a_start_on_a_full_disk_waits_for_space_and_loses_nothing(made):
    """Not even a lock can be made at first."""
    said = made[0] / "said-at-a-start"
    with disk("40m,nr_inodes=500") as small:
        run = made_on(small, made)
        before = contents(run)
        small.fill()
        small.use_up_files()
        watcher = watcher_of(run, said)
        try:
            wait_until_it_says("cannot write", said, watcher)
            time.sleep(1)
            assert watcher.poll() is None and contents(run) == before
            small.free()
            assert watcher.wait(120) == 0, said.read_text()
        finally:
            watcher.kill()
        words = said.read_text()
        assert words.count("cannot write") == words.count("run: there is space again") == 1 and "has finished" in words
        records = read_lines(run / "samples" / "samples.jsonl")
        assert [one["step"] for one in records] == [2, 4, 6]
        assert contents(run).items() > before.items() and (run / "samples/held-out").is_dir()


def test_a_start_on_a_disk_that_stays_full_ends_so_that_it_can_be_made_up_for(made):
    """With the status of a full disk, though its log lies there as well; nothing is half there."""
    with disk("40m") as small:
        run, said = made_on(small, made), small.path / "said"
        said.write_bytes(b"." * 4096)  # a page: the next letter needs space
        before = contents(run)
        small.fill()
        watcher = watcher_of(run, said, "patience=0.002")
        try:
            assert watcher.wait(120) == EXIT_RETRY
        finally:
            watcher.kill()
        assert contents(run) == before | {"samples/.watch-lock": b""}
        small.free()
        watcher = watcher_of(run, said, "patience=0.002")
        try:
            assert watcher.wait(120) == 0, said.read_text()[4096:]
        finally:
            watcher.kill()
        assert len(read_lines(run / "samples" / "samples.jsonl")) == 3


def test_a_full_disk_costs_time_and_no_clip(made):
    """It fills up while clips are made, and is freed."""
    with disk("40m") as small:
        run = small.path / "run"
        shutil.copytree(made[1]["all"], run, ignore=shutil.ignore_patterns("step-*.mp4", "samples.jsonl"))
        for folder in (run / "samples").glob("step-*"):
            shutil.rmtree(folder)
        small.fill()
        said = made[0] / "said"
        watcher = watcher_of(run, said)
        try:
            wait_until_it_says("cannot write", said, watcher)
            time.sleep(1)
            assert watcher.poll() is None and not list((run / "samples").rglob("*.partial-*"))
            small.free()
            assert watcher.wait(120) == 0, said.read_text()
        finally:
            watcher.kill()
        assert "has finished" in said.read_text() and said.read_text().count("cannot write") == 1
        records = read_lines(run / "samples" / "samples.jsonl")  # read_samples follows no path through /proc
        assert [one["step"] for one in records] == [2, 4, 6]
        assert all((run / "samples" / one["file"]).stat().st_size > 0 for one in records)


def test_records_survive_a_half_written_line_and_a_lost_file(made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made[1]["all"] / "samples", run / "samples")
    record = run / "samples/samples.jsonl"
    first = read_samples(run)[0]
    record.write_text(record.read_text() + '{"step": 4, "fi')
    add_samples(run, [first])
    assert len(read_samples(run)) == 9
    (run / "samples" / first.file).unlink()
    assert len(read_samples(run)) == 8
    assert json.loads(record.read_text().splitlines()[-1])["file"] == first.file


def test_captions_that_are_nowhere_are_empty(made, tmp_path):
    shutil.copytree(made[0] / "valid", tmp_path / "valid")
    index = DatasetIndex.open(tmp_path / "valid")
    assert caption_of(index, 3) == "a test"
    (tmp_path / "valid/text-plain-000000.tar").unlink()
    assert caption_of(index, 3) == ""


@pytest.mark.parametrize(
    "keys,message",
    [({"kinds": ["smell"]}, "smell"), ({"kinds": []}, "nothing to generate")],
)
def test_impossible_wishes(keys, message):
    with pytest.raises(ValueError, match=message):
        WatchConfig(run="x", **keys)


def test_a_run_without_a_held_out_set_says_what_to_give(made, tmp_path):
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    run.config.write_text("data: {valid_path: null}\n")
    with pytest.raises(RunError, match=r"give kinds=\[\] and prompts"):
        orders_of(WatchConfig(run=str(run.root)), run, BUILTIN)
    assert [one.kind for one in orders_of(WatchConfig(run="x", kinds=[], prompts=["a"]), run, BUILTIN)] == ["text"]


@pytest.mark.parametrize(
    "shards,picture,sound,kinds",
    [
        ([(False, True), (True, False), (True, True)], True, True, ["text", "image", "picture", "sound"]),
        ([(False, True), (True, False)], True, False, ["text", "image"]),
        ([(False, True)], False, True, ["text"]),
    ],
)
def test_held_out_clips_without_sound_or_picture_are_followed_by_such_where_there_are_no_whole_ones(
    tmp_path, shards, picture, sound, kinds
):
    buckets = [(Bucket(3, 4, 8, 19, 24.0, video, audio), 2) for video, audio in shards]
    record = make_dataset(tmp_path / "valid", buckets, dim=8) / "index/dataset.json"
    fields = json.loads(record.read_text())
    del fields["sha256"]
    record.write_bytes(seal(fields | {"encoders": CODECS}))
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    run.config.write_text(f"data: {{valid_path: {tmp_path}/valid}}\n")
    orders = orders_of(
        WatchConfig(run=str(run.root), kinds=["text", "image", "picture", "sound"], clips=1), run, BUILTIN
    )
    assert [one.kind for one in orders] == kinds
    assert {(one.picture, one.sound) for one in orders} == {(picture, sound)}
    with av.open(orders[0].given) as container:
        assert (len(container.streams.video), len(container.streams.audio)) == (picture, sound)
    if not picture:
        with pytest.raises(RunError, match="image needs a picture"):
            orders_of(WatchConfig(run=str(run.root), kinds=["image"]), run, BUILTIN)
