"""From raw files to a dataset: what is good is kept, what is bad is named, and a rerun never loses or repeats work."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data.codec.builtin import audio, text, video
from data.dataset.index import DatasetIndex
from data.errors import DataError
from data.prepare.claim import MARKER
from data.prepare.curation import PrepareConfig, choose_valid, prepare
from data.prepare.pipeline import Pipeline
from data.sources.listing import Beside, find_files

MakeMedia = Callable[..., Path]


def tone(seconds: float) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * 16000)) / 16000)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, make_media: MakeMedia) -> Path:
    """Every kind of file, good and bad. Windows of 17 frames at 24 per second last 0.708 s."""
    folder = tmp_path_factory.mktemp("raw")
    (folder / "sub").mkdir()
    make_media(folder / "good.mp4", sound=tone(2.5), rate=16000)  # 2.5 s: 3 windows, 0.375 s left over
    (folder / "good.txt").write_text("  A grey field hums.\n")
    make_media(folder / "sub" / "good.mkv", times=[0.01 + i / 24 for i in range(36)], sound=tone(1.6), rate=16000)
    (folder / "sub" / "good.json").write_text('{"caption": "From json.", "other": 1}')
    make_media(folder / "silent.mp4", times=[i / 30 for i in range(50)])
    make_media(folder / "unseen.mp4", times=None, sound=tone(1.5), rate=16000)
    make_media(folder / "short.mp4", times=[i / 24 for i in range(9)])
    make_media(folder / "late.mp4", times=[i / 24 for i in range(40)], sound=tone(0.8), sound_start=0.5, rate=16000)
    make_media(folder / "variable.mp4", times=[0, 0.1, 0.15, 0.6, 0.65, 0.9], sound=tone(0.9), rate=16000)
    whole = make_media(folder / "cut.mp4", sound=tone(2.4), rate=16000, options={"movflags": "faststart"})
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size * 7 // 10])
    (folder / "garbage.mp4").write_bytes(b"no film" * 999)
    shutil.copy(folder / "good.mp4", folder / "good-copy.mp4")
    make_media(folder / "bad-caption.mp4", times=[i / 24 for i in range(20)])
    (folder / "bad-caption.json").write_text("{")
    (folder / "notes.pdf").write_bytes(b"not looked at")
    return folder


def config(source: Path, output: Path, **settings: object) -> PrepareConfig:
    values = {"frames": 17, "height": 32, "width": 48, "samples_per_shard": 2, "text_dim": 64, "workers": 1, **settings}
    return PrepareConfig(source=str(source), output=str(output), **values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def dataset(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "set"
    prepare(config(source, output))
    return output


def test_good_files_become_samples(dataset: Path) -> None:
    index = DatasetIndex.open(dataset)
    assert index.verify() == []
    found: dict[str, list[int]] = {}
    for row in range(len(index)):
        clip, bucket = index.read_clip(row), index.bucket_of(row)
        found.setdefault(clip.meta["source"], []).append(row)
        assert len(clip.key) == 24 and (bucket.frames, bucket.height, bucket.width) == (5, 4, 6)
        assert bucket.audio_steps == audio.steps(round(17 / 24 * 16000)) == 36
        assert (clip.video is not None, clip.audio is not None) == (bucket.has_video, bucket.has_audio)
        if clip.video is not None and clip.condition is not None:
            assert torch.equal(clip.condition[:, 0], clip.video[:, 0])
            black = video.encode(torch.zeros(3, 17, 32, 48)).bfloat16()
            assert torch.equal(clip.condition[:, 1:], black[:, 1:])
    assert {name: len(rows) for name, rows in found.items() if name != "good-copy.mp4"} == {
        "good.mp4": 3,
        "sub/good.mkv": 2,
        "silent.mp4": 2,
        "unseen.mp4": 2,
        "late.mp4": 2,
        "variable.mp4": 1,
    } or "good-copy.mp4" in found  # which of the two copies counts depends on the order of the names' hashes
    assert not index.bucket_of(found["silent.mp4"][0]).has_audio
    assert not index.bucket_of(found["unseen.mp4"][0]).has_video
    assert len(index.buckets) == 3
    caption = index.read_text(found["sub/good.mkv"][0], "builtin")
    assert torch.equal(caption, text.encode("From json.", 64).bfloat16())
    assert torch.equal(index.read_text(found["silent.mp4"][0], "builtin"), index.empty_text())
    assert index.encoders == {"video": video.fingerprint, "audio": audio.fingerprint, "text": text.fingerprint}
    starts = [index.read_meta(row)["start"] for row in sorted(found["late.mp4"])]
    assert starts == pytest.approx([0, 17 / 24], abs=0.002)


def test_what_is_stored_is_the_clip(source: Path, dataset: Path) -> None:
    from data.media import open_media

    index = DatasetIndex.open(dataset)
    row = next(row for row in range(len(index)) if index.read_meta(row)["source"] == "late.mp4")
    clip = index.read_clip(row)
    assert clip.video is not None and clip.audio is not None
    with open_media(source / "late.mp4") as media:
        pixels = media.frames(clip.meta["start"], 17, 24, 32, 48)
    decoded = video.decode(clip.video)
    assert float((decoded[:, 0] - pixels[:, 0]).abs().max()) < 0.03
    groups = [frames[:, 1:].unflatten(1, (4, 4)).mean(2) for frames in (decoded, pixels)]  # the file flickers
    assert float((groups[0] - groups[1]).abs().max()) < 0.05
    sound = audio.decode(clip.audio)
    assert float(sound[: round(0.4 * 16000)].abs().max()) < 0.01 < float(sound[round(0.55 * 16000) :].abs().max())


def test_bad_files_are_named_with_their_reason(dataset: Path) -> None:
    lines = [json.loads(line) for line in (dataset / "rejected.jsonl").read_text().splitlines()]
    reasons = {line["source"]: line["reason"] for line in lines}
    copies = {"good.mp4", "good-copy.mp4"} & set(reasons)
    assert len(copies) == 1 and "same content" in reasons[copies.pop()]
    assert "is truncated: its picture declares" in reasons["cut.mp4"]
    assert "can't be decoded" in reasons["garbage.mp4"]
    assert "shorter than a window" in reasons["short.mp4"]
    assert "caption" in reasons["bad-caption.mp4"]
    assert len(reasons) == 5
    summary = json.loads((dataset / "prepare.json").read_text())["summary"]
    assert (summary["files"], summary["kept"]) == (11, 6) and sum(summary["rejected"].values()) == 5


def test_the_dataset_does_not_depend_on_the_number_of_workers(source: Path, dataset: Path, tmp_path: Path) -> None:
    prepare(config(source, tmp_path / "set", workers=2))
    assert DatasetIndex.open(tmp_path / "set").fingerprint == DatasetIndex.open(dataset).fingerprint
    assert (tmp_path / "set" / "rejected.jsonl").read_bytes() == (dataset / "rejected.jsonl").read_bytes()


def test_a_complete_dataset_is_left_alone(
    source: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Pipeline, "run", None)
    prepare(config(source, dataset))
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"frames: 17, now 21\); choose another folder"):
        prepare(config(source, dataset, frames=21))


def test_unfinished_work_is_done_again(source: Path, dataset: Path, tmp_path: Path) -> None:
    partial = tmp_path / "set.partial"
    partial.mkdir()
    (partial / MARKER).touch()
    (partial / "av-000099.tar").write_bytes(b"half")
    (partial / "index").mkdir()
    prepare(config(source, tmp_path / "set"))
    assert not partial.exists() and not (tmp_path / "set" / MARKER).exists()
    assert DatasetIndex.open(tmp_path / "set").fingerprint == DatasetIndex.open(dataset).fingerprint


def test_other_peoples_folders_are_not_touched(source: Path, tmp_path: Path) -> None:
    for name in ("set", "other.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("years of work")
        with pytest.raises(DataError, match="thesis|exists and is no"):
            prepare(config(source, tmp_path / name.removesuffix(".partial")))
        assert (tmp_path / name / "thesis.tex").exists()


def test_holdout_takes_whole_files(source: Path, tmp_path: Path) -> None:
    prepare(config(source, tmp_path / "set", holdout=0.3))
    names = {}
    for part in ("train", "valid"):
        index = DatasetIndex.open(tmp_path / "set" / part)
        names[part] = {index.read_meta(row)["source"] for row in range(len(index))}
    assert names["train"] and names["valid"] and not names["train"] & names["valid"]
    assert len(names["train"] | names["valid"]) == 6


def test_holdout_has_a_file_a_side_and_is_stable() -> None:
    hashes = [f"{number * 2**251 % 2**256:064x}" for number in range(1, 30)]
    chosen = choose_valid(hashes, 0.2)
    assert chosen == choose_valid(hashes[::-1], 0.2) and choose_valid(hashes[:20], 0.2) == chosen & set(hashes[:20])
    assert len(choose_valid(hashes[10:12], 0.0001)) == 1 and len(choose_valid(hashes[:2], 0.99)) == 1
    assert choose_valid(hashes[:1], 0.5) == set() == choose_valid(hashes, 0)


@pytest.mark.usefixtures("work_here")
def test_a_nan_refuses_its_window_only(make_media: MakeMedia, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raw").mkdir()
    make_media(tmp_path / "raw" / "a.mp4", sound=tone(2.5), rate=16000)
    true_encode, calls = audio.encode, [0]

    def broken(waveform: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return true_encode(waveform) * (float("nan") if calls[0] == 2 else 1)

    monkeypatch.setattr(audio, "encode", broken)
    record = prepare(config(tmp_path / "raw", tmp_path / "set"))
    assert (record["summary"]["windows"], record["summary"]["windows_rejected"]) == (2, 1)
    (line,) = [json.loads(line) for line in (tmp_path / "set" / "rejected.jsonl").read_text().splitlines()]
    assert line["start"] == pytest.approx(17 / 24) and "NaN or inf in the latents of audio" in line["reason"]


def test_nothing_kept_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.mp4").write_bytes(b"x" * 500)
    with pytest.raises(DataError, match="nothing was kept of 1 files"):
        prepare(config(tmp_path / "raw", tmp_path / "set"))
    assert not (tmp_path / "set").exists()


def test_sources_are_folders_patterns_and_files(source: Path, tmp_path: Path) -> None:
    def names(given: Path) -> list[str]:
        return [name for _, name in find_files(str(given), Beside())]

    assert len(names(source)) == 11
    assert names(source / "s*.mp4") == ["short.mp4", "silent.mp4"] and names(source / "good.mp4") == ["good.mp4"]
    (tmp_path / "empty").mkdir()
    for bad, message in ((tmp_path / "empty", "no video files"), (tmp_path / "nowhere", "does not exist")):
        with pytest.raises(DataError, match=message):
            prepare(config(bad, tmp_path / "set"))
        assert not (tmp_path / "set.partial").exists()


@pytest.mark.parametrize(
    "setting", [{"frames": 48}, {"height": 60}, {"width": 0}, {"fps": 0}, {"holdout": 1.0}, {"samples_per_shard": -1}]
)
def test_a_setting_that_cannot_be_met_is_named(setting: dict[str, int], source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=next(iter(setting))):
        prepare(config(source, tmp_path / "set", **setting))


def test_the_command_line_fails_with_one_message(tmp_path: Path) -> None:
    wrong = {
        "frame=17": "there is no key frame; did you mean frames?",
        "frames=17": "error: source /nowhere does not exist",
    }
    command = [sys.executable, "-m", "data.prepare", "source=/nowhere", f"output={tmp_path}/o"]
    runs = [
        subprocess.Popen([*command, last], stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])
        for last in wrong
    ]
    for run, message in zip(runs, wrong.values(), strict=True):
        errors = run.communicate()[1]
        assert run.returncode != 0 and "Traceback" not in errors and message in errors
