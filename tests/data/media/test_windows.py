"""Every window holds what a linear decode gives: many codecs, containers, rates and GOP structures, random places."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from bench.data.clips import I_AND_P, Case, cases, picture, read_number, write_clip, x264
from data.media import Media, open_media

FRAMES, LONG, WINDOW = 60, 192, 9


def shown(media: Media, start: float, count: int, fps: float, size: tuple[int, int]) -> list[int]:
    """The numbers of the pictures of a window."""
    grey = ((media.frames(start, count, fps, *size) + 1) * 127.5).mean(dim=0).numpy()
    return [read_number(picture) for picture in grey]


def decoded_linearly(path: Path) -> list[int]:
    """The numbers of all pictures, in the order in which av gives them."""
    with av.open(str(path)) as container:
        return [read_number(frame.to_ndarray(format="gray")) for frame in container.decode(video=0)]


def expected(times: np.ndarray, moments: np.ndarray) -> list[set[int]]:
    """What may be shown: timestamps are rounded to a millisecond in some containers."""
    places = [np.searchsorted(times, moments + 0.002 + slip, side="right") - 1 for slip in (-0.0007, 0.0, 0.0007)]
    return [set(np.maximum(one, 0).tolist()) for one in zip(*places, strict=True)]


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_windows_hold_the_frames_of_their_time(case: Case, tmp_path: Path) -> None:
    path = write_clip(tmp_path / case.name, case, FRAMES)
    assert decoded_linearly(path) == list(range(FRAMES))
    times, fps = case.times(FRAMES), float(Fraction(case.rate))
    with open_media(path) as media:
        assert media.frame_times is not None and len(media.frame_times) == FRAMES
        assert np.abs(media.frame_times - media.span[0] - times).max() < 0.0011
        random = np.random.default_rng(1)
        starts = random.uniform(0, times[-1] - WINDOW / fps, 8)
        for start in [*sorted(starts[:5]), *starts[5:]]:
            found = shown(media, media.span[0] + start, WINDOW, fps, case.size)
            allowed = expected(times, start + (np.arange(WINDOW) + 0.5) / fps)
            assert all(one in some for one, some in zip(found, allowed, strict=True)), (start, found, allowed)


def test_there_are_enough_kinds() -> None:
    all_cases = cases()
    assert len({case.name for case in all_cases}) == len(all_cases) >= 60
    assert len({case.codec for case in all_cases}) >= 15 and len({case.container for case in all_cases}) >= 9


def write_flat(path: Path, case: Case) -> Path:
    """A clip whose pictures are so small that several fit into a packet of a program stream."""
    flat = np.full((case.size[0] // 2, case.size[1]), 90, np.uint8)
    with av.open(str(path), "w", format={"mpg": "mpeg"}.get(case.container)) as container:
        stream = container.add_stream(case.codec, rate=Fraction(case.rate))
        stream.height, stream.width, stream.pix_fmt = *case.size, case.pixels
        stream.options, stream.codec_context.thread_count = dict(case.options), 1
        for number in range(LONG):
            frame = picture(number, flat)
            frame.pts, frame.time_base = number, 1 / Fraction(case.rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    "case",
    [
        Case("libx264", "mxf", "24", *x264("times of decoding", g="24", bf="2")),  # what MXF bears for H.264
        # several pictures have one timestamp
        Case("mpeg2video", "mpg", "24", "small pictures", {"g": "9", "bf": "2", "qmin": "2", "qmax": "2"}),
        Case("mpeg2video", "mpg", "24", "small, intra", {"g": "1", "bf": "0", "qmin": "2", "qmax": "2"}),
    ],
    ids=lambda case: f"{case.container} {case.gop}",
)
def test_pictures_with_wrong_timestamps_are_taken_in_their_order(case: Case, tmp_path: Path) -> None:
    path = write_flat(tmp_path / case.name, case)
    with open_media(path) as media:
        assert media.frame_times is not None and len(media.frame_times) == LONG
        assert np.abs(np.diff(media.frame_times) - 1 / 24).max() < 0.001
        for first in (3, 57, 80, 140, 11):
            assert shown(media, media.span[0] + first / 24, 9, 24, case.size) == list(range(first, first + 9))


def test_empty_slots_of_avi_are_no_missing_pictures(tmp_path: Path) -> None:
    """Its header counts them: programs that drop pictures, and packed B pictures, leave some."""
    whole = write_clip(tmp_path / "whole.avi", Case("mpeg4", "avi", "24", "12, no B", I_AND_P), FRAMES)
    path = tmp_path / "slots.avi"
    with av.open(str(whole)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(video=0)):
            if packet.size:
                packet.stream = stream
                packet.pts = packet.dts = number + 5 * (number > 30)
                new.mux(packet)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames > FRAMES
    with open_media(path) as media:
        assert media.frame_times is not None and len(media.frame_times) == FRAMES
        assert shown(media, media.span[0] + 10 / 24, 5, 24, (64, 192)) == [10, 11, 12, 13, 14]
        assert shown(media, media.span[0] + 40 / 24, 5, 24, (64, 192)) == [35, 36, 37, 38, 39]


def test_making_clips_leaves_this_process_at_its_usual_priority(tmp_path: Path) -> None:
    """libsvtav1, as root, would leave it at real-time priority: workers and threads would starve each other."""
    case = next(case for case in cases() if case.codec == "libsvtav1")
    write_clip(tmp_path / f"clip.{case.container}", case, 5)
    threads = [int(thread) for thread in os.listdir("/proc/self/task")]
    assert {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_OTHER}
