"""Windows: one after another over several durations, and the rule of the paper."""

import math
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from data.errors import DataError
from data.media import SAMPLE_RATE, Media, open_media
from data.windows.window import (
    Geometry,
    SceneDetector,
    SpeechDetector,
    WindowConfig,
    WindowStage,
    choose_buckets,
    find_speech,
    fixed_windows,
    gap_windows,
    mova_windows,
    scene_cuts,
    shot_kind,
)

SECONDS, LOOKBACK = 193 / 24, 4.025
MakeMedia = Callable[..., Path]


def scene_file(generator: np.random.Generator) -> tuple[list[tuple[float, float]], list[float], tuple[float, float]]:
    """Speech and cuts as a film of one to three minutes may have them."""
    times = np.cumsum(generator.exponential(3.0, 2 * int(generator.integers(1, 20)))) + generator.uniform(0, 5)
    speech = [(float(start), float(end)) for start, end in zip(times[::2], times[1::2], strict=True)]
    span = (float(generator.uniform(0, 0.1)), float(times[-1] + generator.uniform(0, 12)))
    return speech, np.sort(generator.uniform(*span, int(generator.integers(0, 25)))).tolist(), span


def test_every_window_obeys_the_rule() -> None:
    generator, seen = np.random.default_rng(0), set()
    for trial in range(300):
        speech, cuts, span = scene_file(generator)
        draw = np.random.Generator(np.random.Philox(key=trial))
        windows = mova_windows(speech, cuts, span, SECONDS, draw, LOOKBACK)
        again = mova_windows(speech, cuts, span, SECONDS, np.random.Generator(np.random.Philox(key=trial)), LOOKBACK)
        assert windows == again
        free, number = -math.inf, 0
        for start, kind in windows:
            # the segment that the window belongs to begins with it or after it, within the lookback; those before it
            # began inside the last window, or their own windows did not fit
            owners = [
                i for i, (begin, _) in enumerate(speech) if start <= begin <= start + LOOKBACK + 1e-9 and i >= number
            ]
            assert owners
            number = owners[0]
            begin = speech[number][0]
            assert begin >= free and start >= max(free, span[0]) and start + SECONDS <= span[1]
            if number == 0:
                assert start == begin
            else:
                assert start >= speech[number - 1][1]  # never inside the speech before
                assert not [cut for cut in cuts if start < cut <= begin]  # never before the scene's start
            inside = [cut for cut in cuts if start < cut < start + SECONDS]
            assert kind == ("multi speech" if inside else "single speech")
            free, number = start + SECONDS, number + 1
            seen.add((kind, number == 1))
        for shots in ("single", "multi"):
            draw = np.random.Generator(np.random.Philox(key=trial))
            only = mova_windows(speech, cuts, span, SECONDS, draw, LOOKBACK, shots)
            assert all(kind == f"{shots} speech" for _, kind in only)
    assert len(seen) == 4  # all cases occurred


def test_starts_are_uniform_between_the_bounds() -> None:
    speech, cuts = [(0.0, 1.0), (20.0, 21.0)], [17.0]  # lookback would reach to 15.975, the scene begins at 17
    starts = []
    for seed in range(400):
        draw = np.random.Generator(np.random.Philox(key=seed))
        starts.append(mova_windows(speech, cuts, (0.0, 60.0), SECONDS, draw, LOOKBACK)[1][0])
    assert 17 <= min(starts) < 17.1 and 19.9 < max(starts) <= 20
    assert np.mean(starts) == pytest.approx(18.5, abs=0.15) and np.std(starts) == pytest.approx(3 / 12**0.5, abs=0.08)


def test_the_next_segment_is_the_first_after_the_window() -> None:
    speech = [(1.0, 2.0), (3.0, 4.0), (9.0, 9.5), (9.6, 30.0)]  # the window of the first ends at 9.04
    draw = np.random.Generator(np.random.Philox(key=1))
    windows = mova_windows(speech, [], (0.0, 60.0), SECONDS, draw, LOOKBACK)
    assert windows[0][0] == 1.0 and 9.5 <= windows[1][0] <= 9.6 and len(windows) == 2
    assert mova_windows([(1.0, 2.0)], [], (0.0, 9.0), SECONDS, draw, LOOKBACK) == []  # does not fit
    assert mova_windows([], [], (0.0, 90.0), SECONDS, draw, LOOKBACK) == []


def test_gaps_hold_the_windows_without_speech() -> None:
    taken = [(20.0, "single speech")]
    windows = gap_windows([(18.0, 19.0), (21.0, 22.0)], [3.0], (1.0, 46.0), 8.0, taken)
    assert windows == [
        (1.0, "multi non-speech"),
        (9.0, "single non-speech"),
        (28.0, "single non-speech"),
        (36.0, "single non-speech"),
    ]
    assert gap_windows([], [], (0.0, 7.9), 8.0, []) == []
    assert shot_kind([8.0], 0.0, 8.0) == shot_kind([0.0], 0.0, 8.0) == "single"  # a cut at the edge is not inside


def test_durations_fill_a_file_greedily() -> None:
    long, short = Geometry(49, 24, 64, 64), Geometry(25, 24, 64, 64)
    cut = fixed_windows(1.0, 1.0 + (49 * 2 + 25 + 10) / 24, [long, short])
    assert [window.geometry.frames for window in cut.windows] == [49, 49, 25]
    assert [window.start for window in cut.windows] == pytest.approx([1, 1 + 49 / 24, 1 + 98 / 24])
    assert cut.rest_seconds == pytest.approx(10 / 24)
    assert fixed_windows(0.0, 24 / 24, [long, short]).windows == []


def test_the_nearest_aspect_ratio_is_chosen(make_media: MakeMedia, tmp_path: Path) -> None:
    buckets = [Geometry(frames, 24, *size) for size in ((48, 80), (80, 48), (64, 64)) for frames in (25, 49)]
    for size, expected in (((48, 64), (48, 80)), ((64, 48), (80, 48)), ((64, 68), (64, 64))):
        path = make_media(tmp_path / f"{size[0]}.mp4", times=[i / 24 for i in range(4)], size=size)
        with open_media(path) as media:
            chosen = choose_buckets(buckets, media)
        assert [(one.height, one.width) for one in chosen] == [expected] * 2 and [one.frames for one in chosen] == [
            49,
            25,
        ]


def test_cuts_are_found_by_timestamps(make_media: MakeMedia, tmp_path: Path) -> None:
    times = [0.1 * i for i in range(12)] + [1.2 + i / 50 for i in range(60)] + [2.5 + i / 10 for i in range(20)]
    noise = np.random.default_rng(0).integers(0, 255, (3, 48, 64, 3), dtype=np.uint8)
    pictures = [noise[0]] * 12 + [noise[1]] * 60 + [noise[2]] * 20
    path = make_media(tmp_path / "cuts.mkv", times=times, pictures=pictures)
    with open_media(path) as media:
        assert scene_cuts(media, 24.0, 27.0) == pytest.approx([1.2, 2.5], abs=1 / 24)
        assert scene_cuts(media, 24.0, 256.0) == []


def test_speech_is_found_in_speech_only(real_clips: Path) -> None:
    with open_media(real_clips / "psychopy_jwp_intro_talk.mp4") as media:
        sound = torch.cat([*media.sound_blocks(5.0)])
        spoken = sum(end - start for start, end in find_speech(sound)) / (len(sound) / 16000)
    with open_media(real_clips / "mdn_stream_of_water.mp4") as media:
        assert find_speech(torch.cat([*media.sound_blocks(5.0)])) == []
    assert spoken > 0.6 and find_speech(torch.zeros(48000)) == []


@pytest.fixture(scope="module")
def sounds(real_clips: Path) -> list[torch.Tensor]:
    """Speech, water, a film, and one after the other."""
    found = []
    for name in (
        "psychopy_jwp_intro_talk",
        "mdn_stream_of_water",
        "nasa_13013_two_video_two_audio",
        "ltx2_couple_talk",
    ):
        with open_media(real_clips / f"{name}.mp4") as media:
            found.append(torch.cat([*media.sound_blocks(5.0)]))
    return [*found, torch.cat(found)]


def test_speech_in_blocks_is_that_of_the_whole(sounds: list[torch.Tensor]) -> None:
    from silero_vad import get_speech_timestamps, load_silero_vad

    stock = load_silero_vad(onnx=True)  # the network that takes one frame a call
    for sound in sounds:
        expected = [(one["start"] / 16000, one["end"] / 16000) for one in get_speech_timestamps(sound, stock)]
        assert find_speech(sound) == expected
        for block in (700, 16000, 50001):  # no multiples of a frame
            detector = SpeechDetector()
            for part in sound.split(block):
                detector.add(part)
            assert detector.segments() == expected
    assert len(expected) > 4


def test_cuts_are_those_of_scenedetect() -> None:
    from scenedetect import ContentDetector, FrameTimecode

    for seed in range(6):
        generator = np.random.default_rng(seed)
        scenes = generator.integers(0, 256, (40, 6, 8, 3))
        lengths = generator.integers(1, 30, 40)  # from single frames, which are merged, to whole scenes
        pictures = np.repeat(scenes, lengths, axis=0) * generator.uniform(0.5, 1, (lengths.sum(), 1, 1, 1))
        pictures = pictures.astype(np.uint8)
        stock, expected = ContentDetector(threshold=27.0, min_scene_len=12), []
        for number, picture in enumerate(pictures):
            bgr = np.ascontiguousarray(picture[..., ::-1])
            expected += [cut.frame_num for cut in stock.process_frame(FrameTimecode(number, 24.0), bgr)]
        detector = SceneDetector(24.0, 27.0)
        for part in np.split(pictures, range(48, len(pictures), 48)):
            detector.add(part)
        assert detector.cuts == expected and len(expected) > 10


class LongFilm(Media):
    """A file of any length that is never there as a whole: a new scene and a new noise every four seconds."""

    def __init__(self, seconds: int):
        super().__init__(Path("film.mkv"))
        self.frame_times, self.video_end = np.arange(0, seconds, 0.04), float(seconds)
        self.size, self.sound_span = (72, 128), (0.0, float(seconds))
        self.passes = 0

    def sound_blocks(self, seconds: float) -> Iterator[torch.Tensor]:
        for number in range(math.ceil(self.video_end / seconds)):
            noise = np.random.default_rng(number).normal(0, 0.1, round(seconds * SAMPLE_RATE))
            yield torch.from_numpy(noise.astype(np.float32))

    def scan_frames(self, fps: float, height: int) -> Iterator[np.ndarray]:
        self.passes += 1
        for number in range(round(self.video_end * fps / 48)):
            scene = np.random.default_rng(number // 2).integers(0, 256, (1, height, 128, 3), dtype=np.uint8)
            yield np.repeat(scene, 48, axis=0)


def test_a_long_film_takes_no_more_memory_than_a_short_one() -> None:
    stage = WindowStage(WindowConfig("mova", non_speech=True), [Geometry(49, 24.0, 64, 64)])
    stage(LongFilm(16), "ab" * 32)  # loads the network
    peaks = []
    for seconds in (60, 480):
        tracemalloc.start()
        film = LongFilm(seconds)
        assert len(stage(film, "ab" * 32).windows) > seconds / 3
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1e6  # 480 s are 31 MB of sound and 318 MB of pictures


def test_segments_of_a_file_share_one_pass() -> None:
    stage = WindowStage(WindowConfig("mova", non_speech=True), [Geometry(49, 24.0, 64, 64)])
    film = LongFilm(48)
    for start, end in ((0.0, 10.0), (10.5, 20.0), (30.0, 48.0)):
        cut = stage(film, "ab" * 32, (start, end))
        assert cut.windows and all(start <= one.start and one.start + 49 / 24 <= end for one in cut.windows)
    assert film.passes == 1
    stage(LongFilm(16), "cd" * 32)
    assert film.passes == 1 and stage(LongFilm(16), "ab" * 32).span == 16  # another file has its own content


def test_wrong_settings_are_named() -> None:
    for settings, message in (
        ({"rule": "best"}, "window.rule"),
        ({"shots": "few"}, "window.shots"),
        ({"lookback": -1.0}, "lookback"),
    ):
        with pytest.raises(DataError, match=message):
            WindowStage(WindowConfig(**settings), [Geometry(49, 24, 64, 64)])  # type: ignore[arg-type]
