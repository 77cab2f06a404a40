"""Decoding by timestamps, on one clock; bad files are refused with what they declare and what they hold."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from data.media import SAMPLE_RATE, Media, open_media

MakeMedia = Callable[..., Path]


def level(number: int) -> int:
    return 30 + 37 * number % 200


def tone(seconds: float, rate: int = 48000) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)


def click(seconds: float, at: float, rate: int = 48000) -> np.ndarray:
    sound = np.zeros(round(seconds * rate))
    sound[round(at * rate) :] = 0.5 * np.sin(2 * np.pi * 800 * np.arange(len(sound) - round(at * rate)) / rate)
    return sound


def shown(media: Media, start: float, count: int, fps: float) -> list[int]:
    """Grey level of each frame."""
    frames = (media.frames(start, count, fps, 48, 64) + 1) * 127.5
    return [round(float(value)) for value in frames.mean(dim=(0, 2, 3))]


def near(found: list[int], wanted: list[int]) -> bool:
    return len(found) == len(wanted) and max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= 6


def test_frames_come_by_time(make_media: MakeMedia, tmp_path: Path) -> None:
    media = open_media(make_media(tmp_path / "a.mp4"))
    assert media.sound_span is None and media.size == (48, 64)
    assert media.span == pytest.approx((0, 2.5), abs=0.01)
    assert near(shown(media, 0.0, 60, 24), [level(i) for i in range(60)])
    assert near(shown(media, 0.5, 10, 24), [level(i) for i in range(12, 22)])
    assert near(shown(media, 0.0, 20, 12), [level(2 * i + 1) for i in range(20)])  # what is shown in mid-interval
    assert near(shown(media, 0.0, 40, 48), [level(i // 2) for i in range(40)])


def test_variable_frame_rate(make_media: MakeMedia, tmp_path: Path) -> None:
    times = [0.0, 0.04, 0.08, 0.5, 1.0, 1.02, 1.04, 1.9, 2.0]
    media = open_media(make_media(tmp_path / "v.mp4", times=times))
    wanted = [level(max(i for i, time in enumerate(times) if time <= (k + 0.5) / 24)) for k in range(48)]
    assert near(shown(media, 0.0, 48, 24), wanted)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("sound_start", [0.0, 0.478, -0.3])
def test_sound_and_picture_share_a_clock(
    make_media: MakeMedia, tmp_path: Path, sound_start: float, suffix: str
) -> None:
    flash = 36  # the frame at 1.5 s is the first white one
    pictures = [np.full((48, 64, 3), 220 if i >= flash else 30, np.uint8) for i in range(72)]
    path = make_media(
        tmp_path / f"s{suffix}",
        times=[i / 24 for i in range(72)],
        pictures=pictures,
        sound=click(2.6, 1.5 - sound_start),
        sound_start=sound_start,
    )
    media = open_media(path)
    start = media.span[0]
    frames = media.frames(start, 72, 24, 48, 64).mean(dim=(0, 2, 3))
    assert int((frames > 0).nonzero()[0]) == flash
    sound = media.sound(start, 3 * SAMPLE_RATE)
    onset = int((sound.abs() > 0.1).nonzero()[0]) / SAMPLE_RATE
    assert abs(onset - 1.5) < 0.010, onset
    if sound_start > 0:
        assert media.sound_span is not None and media.sound_span[0] - start == pytest.approx(sound_start, abs=0.03)
        assert float(sound[: round((sound_start - 0.05) * SAMPLE_RATE)].abs().max()) == 0


def test_sound_is_silent_outside_the_file(make_media: MakeMedia, tmp_path: Path) -> None:
    media = open_media(make_media(tmp_path / "t.mp4", sound=tone(2.5)))
    assert media.sound_span is not None and media.sound_span[1] - media.sound_span[0] == pytest.approx(2.5, abs=0.05)
    assert float(media.sound(2.3, SAMPLE_RATE)[5000:].abs().max()) == 0
    assert float(media.sound(-1.0, 2 * SAMPLE_RATE)[:SAMPLE_RATE].abs().max()) == 0
    assert float(media.sound(9.0, 100).abs().max()) == 0
    middle = media.sound(1.0, 1600)
    assert float(middle.square().mean().sqrt()) == pytest.approx(0.3 / 2**0.5, rel=0.05)


def test_no_picture(make_media: MakeMedia, tmp_path: Path) -> None:
    media = open_media(make_media(tmp_path / "p.mp4", times=None, sound=tone(1.5, 16000), rate=16000))
    assert media.frame_times is None and media.span == pytest.approx((0, 1.5), abs=0.1)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("part", [0.5, 0.8])
def test_a_truncated_file_names_both_lengths(make_media: MakeMedia, tmp_path: Path, suffix: str, part: float) -> None:
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 255, (48, 64, 3), dtype=np.uint8) for _ in range(96)]
    path = make_media(
        tmp_path / f"whole{suffix}",
        times=[i / 24 for i in range(96)],
        pictures=pictures,
        sound=tone(4.0),
        options={"movflags": "faststart"} if suffix == ".mp4" else {},
    )
    open_media(path).close()
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(DataError, match=r"cut.* is truncated: its .* declares [\d.]+ .* could be decoded"):
        open_media(cut)


def test_truncated_sound_alone_is_noticed(make_media: MakeMedia, tmp_path: Path) -> None:
    path = make_media(tmp_path / "w.mp4", times=None, sound=tone(4.0), options={"movflags": "faststart"})
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(DataError, match="truncated: its sound declares 4"):
        open_media(cut)


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000])
def test_a_file_that_is_no_media_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.mp4").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.mp4 can't be decoded"):
        open_media(tmp_path / "x.mp4")
    with pytest.raises(DataError, match="nowhere"):
        open_media(tmp_path / "nowhere.mp4")


def test_an_mp4_without_its_index_is_named(make_media: MakeMedia, tmp_path: Path) -> None:
    path = make_media(tmp_path / "m.mp4", sound=tone(2.5))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"m\.mp4"):
        open_media(path)


def test_the_first_of_several_streams_is_taken(make_media: MakeMedia, tmp_path: Path) -> None:
    media = open_media(make_media(tmp_path / "two.mp4", more_pictures=(96, 128), sound=tone(2.5)))
    assert media.size == (48, 64)
    assert near(shown(media, 1.0, 10, 24), [level(i) for i in range(24, 34)])


def test_natural_clips_decode(real_clips: Path) -> None:
    for path in sorted(real_clips.glob("*.mp4")) + sorted(real_clips.glob("*.webm")):
        with open_media(path) as media:
            start, end = media.span
            assert end - start > 2 and media.sound_span is not None
            assert media.frames(start + 1, 5, 24, 32, 32).std() > 0.01


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_late_picture_loses_no_sound(make_media: MakeMedia, tmp_path: Path, suffix: str) -> None:
    path = make_media(tmp_path / f"late.{suffix}", times=[0.4 + i / 24 for i in range(40)], sound=click(2.0, 0.2))
    media = open_media(path)
    assert media.sound_span is not None and media.span == pytest.approx((0.4, 0.4 + 40 / 24), abs=0.05)
    sound = media.sound(0.0, 2 * SAMPLE_RATE)
    onset = int((sound.abs() > 0.05).nonzero()[0]) / SAMPLE_RATE
    assert onset == pytest.approx(0.2, abs=0.01) and float(sound[round(1.9 * SAMPLE_RATE) :].abs().max()) > 0.3
    assert float(media.sound(0.4, SAMPLE_RATE)[:160].abs().max()) > 0.3
