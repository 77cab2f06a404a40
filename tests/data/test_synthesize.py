"""Synthetic clips: what is seen and heard happens when the truth says, after H.264 and AAC."""

import hashlib
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import DataError
from data.media import SAMPLE_RATE, open_media
from data.synthesize import VOICES, SynthesizeConfig, balls_at, draw_scenes, synthesize

CLIPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(SynthesizeConfig(output=str(tmp_path_factory.mktemp("clips")), clips=CLIPS, seed=5, workers=2))


def heard(sound: np.ndarray) -> list[float]:
    """Onsets in seconds: where the energy of the next 10 ms first exceeds what is left of the last event."""
    step = SAMPLE_RATE // 1000
    power = np.square(sound[: len(sound) // step * step].astype(np.float64)).reshape(-1, step).mean(1)  # a ms each
    after = np.convolve(power, np.ones(10), "full")[9:]
    before = np.concatenate([np.zeros(20), np.convolve(power, np.ones(20), "full")[: len(power)]])[: len(power)] / 2
    jumps = np.flatnonzero(after > 6 * before + 2e-3)
    onsets: list[float] = []
    last = -1.0
    for jump in jumps / 1000:
        if jump - last > 0.15:
            # `after` rises when its window reaches the event: walk on to the first loud millisecond
            first = int(jump * 1000)
            peak = power[first : first + 30].max()
            onsets.append((first + int(np.argmax(power[first : first + 30] > 0.02 * peak))) / 1000)
        last = jump
    return onsets


def centres(frames: np.ndarray, colour: list[int]) -> np.ndarray:
    """[F, 2] centre (x, y) of the pixels nearer to `colour` than to grey; frames [F, H, W, 3] in 0..255."""
    direction = np.array(colour, float) - np.mean(colour)
    weight = np.clip((frames - frames.mean(-1, keepdims=True)) @ direction / (direction @ direction) - 0.4, 0, None)
    y, x = np.mgrid[0 : frames.shape[1], 0 : frames.shape[2]]
    total = weight.sum((1, 2))
    return np.stack([(weight * x).sum((1, 2)) / total, (weight * y).sum((1, 2)) / total], 1)


def turns(track: np.ndarray, kind: str, fps: float) -> list[float]:
    """Times at which the motion [F] turns: a bouncing ball where it is lowest, else the ends on either side."""
    found = []
    for i in range(1, len(track) - 1):
        near = track[max(0, i - 3) : i + 4]
        if track[i] == near.max() or (kind != "bounce" and track[i] == near.min()):
            found.append(i / fps)
    return found


def test_sound_starts_within_10_ms_of_the_truth(folder: Path) -> None:
    worst = 0.0
    for path in sorted(folder.glob("*.mp4")):
        truth = [event["time"] for event in json.loads(path.with_suffix(".json").read_text())["events"]]
        with open_media(path) as media:
            onsets = heard(media.sound(0.0, round(49 / 24 * SAMPLE_RATE)).numpy())
        assert len(onsets) == len(truth), (path.name, onsets, truth)
        worst = max(worst, np.abs(np.array(onsets) - truth).max())
    assert worst < 0.010, worst


def test_the_picture_turns_within_a_frame_of_the_truth(folder: Path) -> None:
    for path in sorted(folder.glob("*.mp4")):
        record = json.loads(path.with_suffix(".json").read_text())
        truth = [event["time"] for event in record["events"]]
        with open_media(path) as media:
            frames = (media.frames(0.0, 49, 24, 64, 64).permute(1, 2, 3, 0).numpy() + 1) * 127.5
        if record["kind"] == "collide":
            frames = frames[:, :, :32]  # the left ball
        track = centres(frames, record["objects"][0]["colour"])[:, 1 if record["kind"] == "bounce" else 0]
        found = turns(track, record["kind"], 24)
        for time in truth:
            assert min(abs(time - turn) for turn in found) < 1 / 24, (path.name, record["kind"], truth, found)
        extra = [turn for turn in found if min(abs(time - turn) for time in truth) >= 1 / 24 and 0.13 < turn < 1.9]
        assert not extra, (path.name, record["kind"], extra, truth)


def test_all_kinds_and_captions(folder: Path) -> None:
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("clip-*.json"))]
    assert {record["kind"] for record in records} == {"bounce", "collide", "tick"}
    assert len({record["objects"][0]["pitch"] for record in records}) == CLIPS
    for number, record in enumerate(records):
        assert (folder / f"clip-{number:06d}.txt").read_text().strip() == record["caption"]
        times = [event["time"] for event in record["events"]]
        assert times and times[0] >= 0.12 and times[-1] <= record["seconds"] - 0.14
        assert all(later - earlier >= 0.4499 for earlier, later in zip(times, times[1:], strict=False))
        assert 300 <= record["objects"][0]["pitch"] <= 900


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_clips_depend_on_seed_and_number_only(folder: Path, tmp_path: Path) -> None:
    again = digests(synthesize(SynthesizeConfig(output=str(tmp_path / "a"), clips=3, seed=5, workers=1)))
    assert again.items() <= digests(folder).items()
    assert draw_scenes(6, 0, 2.0, 64, 64, "bounce") != draw_scenes(5, 0, 2.0, 64, 64, "bounce")


def test_running_again_makes_only_what_is_missing(tmp_path: Path) -> None:
    config = SynthesizeConfig(output=str(tmp_path), clips=2, workers=1)
    before = digests(synthesize(config))
    (tmp_path / "clip-000001.mp4").unlink()
    kept = (tmp_path / "clip-000000.mp4").stat().st_mtime_ns
    assert digests(synthesize(config)) == before
    assert (tmp_path / "clip-000000.mp4").stat().st_mtime_ns == kept
    with pytest.raises(DataError, match="other settings"):
        synthesize(SynthesizeConfig(output=str(tmp_path), clips=2, seed=1, workers=1))


def test_juggled_balls_have_voices_and_lanes_of_their_own() -> None:
    for number in range(20):
        scenes = draw_scenes(3, number, 49 / 24, 64, 64, "juggle")
        voices = [(scene.hue, scene.radius, scene.pitch) for scene in scenes]
        assert len(scenes) in (2, 3) and set(voices) <= set(VOICES) and len(set(voices)) == len(voices)
        for time in np.arange(49) / 24:
            places = [(scene, *balls_at(scene, float(time), 64, 64)[0]) for scene in scenes]
            for scene, x, _ in places:
                assert scene.left <= x - scene.radius and x + scene.radius <= scene.left + scene.room
            for (one, left, _), (other, right, _) in pairwise(sorted(places, key=lambda place: place[1])):
                assert left + one.radius <= right - other.radius  # none hides another


@pytest.mark.parametrize(
    "setting", [{"clips": 0}, {"height": 63}, {"frames": 5}, {"sample_rate": 44100}, {"kinds": ["fly"]}]
)
def test_settings_that_cannot_be_met_are_named(setting: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=next(iter(setting)) if "frames" not in setting else "more frames"):
        synthesize(SynthesizeConfig(**{"output": str(tmp_path / "x"), "clips": 1, "workers": 1, **setting}))  # type: ignore
    assert not (tmp_path / "x").exists()


def test_command_line_names_a_wrong_key(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data.synthesize", f"output={tmp_path}", "clip=3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (
        done.returncode != 0
        and "there is no key clip; did you mean clips?" in done.stderr
        and "Traceback" not in done.stderr
    )
    done = subprocess.run([*command[:-1]], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode != 0 and "clips is missing" in done.stderr and "Traceback" not in done.stderr
