"""Checks on all media files of a folder that the decoder shows what a linear decode shows; prints a line per file.

    python -m data.media.check FOLDER           # or: make check-clips CLIPS=FOLDER

Of each file windows at random places are read, rising and not, and each picture is compared with the one that a plain
decode from the first packet has at that time. A file that is refused is named with the reason; that is no difference.
Exit status 1 if any picture differs.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from core.program import Command, refuse_options
from data.errors import DataError
from data.media import Media, open_media
from data.media.media import TIE
from data.media.open import open_container
from data.media.packets import DECODING_TIMES
from data.media.picture import Frames, deinterlaced
from data.media.scale import Scaler

WINDOWS, FRAMES, SIDE = 12, 17, 32  # a film of 2 hours at 24 frames a second takes 0.5 GB
DIFFERS = 0.5  # mean difference of a picture's levels (of 255) from which on it is another one: rounding


def linear_pictures(media: Media) -> tuple[np.ndarray, np.ndarray]:
    """(times [N] in seconds, small pictures [N, 3, SIDE, SIDE]) of a decode from the first packet to the last."""
    scaler = Scaler(SIDE, SIDE, media.pixel_aspect, media.turn)
    times: list[float | None] = []
    pictures: list[np.ndarray] = []
    with open_container(media.path) as container:
        stream = container.streams[media.video_stream]
        ordered = container.format.name in DECODING_TIMES
        plain = enumerate(container.decode(stream))
        stamps: list[int | None] = []
        for _, frame in deinterlaced(_noting(plain, stamps)):
            stamp = stamps[len(pictures)]
            times.append(None if stamp is None or ordered else float(stamp * stream.time_base))
            pictures.append(scaler(frame))
    if None in times:  # by their order: the table of the file knows no more than that either
        assert media.frame_times is not None
        times = [*media.frame_times[: len(pictures)]]
        pictures = pictures[: len(times)]
    order = np.argsort(np.array(times, np.float64), kind="stable")
    return np.array(times, np.float64)[order], np.stack(pictures)[order]


def _noting(frames: Frames, stamps: list[int | None]) -> Frames:
    for number, frame in frames:
        stamps.append(frame.pts)
        yield number, frame


def windows(span: tuple[float, float], length: float) -> Iterator[float]:
    """Starts of windows: rising ones, then others."""
    random = np.random.default_rng(0)
    starts = random.uniform(span[0], max(span[0], span[1] - length), WINDOWS)
    yield from sorted(starts[: WINDOWS // 2])
    yield from starts[WINDOWS // 2 :]


def check(path: Path) -> tuple[bool, str]:
    """(whether nothing differs, words) of one file."""
    try:
        with open_media(path) as media:
            if media.frame_times is None:
                return True, "no picture"
            return _compare(media)
    except DataError as error:
        return True, f"refused: {error}"


def _compare(media: Media) -> tuple[bool, str]:
    assert media.frame_times is not None
    times, pictures = linear_pictures(media)
    fps = min(60.0, max(5.0, len(media.frame_times) / max(1e-3, media.span[1] - media.span[0])))
    wrong, refused, began, count = 0, "", time.perf_counter(), 0
    for start in windows(media.span, FRAMES / fps):
        count += 1
        try:
            found = (media.frames(start, FRAMES, fps, SIDE, SIDE).transpose(0, 1).numpy() + 1) * 127.5
        except DataError as error:
            refused = str(error)
            continue
        middles = start + (np.arange(FRAMES) + 0.5) / fps + TIE
        positions = np.searchsorted(times, middles + 1e-6, side="right") - 1
        first = int(np.searchsorted(times, media.span[0] - 1e-6))
        expected = pictures[np.maximum(positions, first)].astype(np.float32)
        differs = np.abs(found - expected).mean(axis=(1, 2, 3)) > DIFFERS
        wrong += int(differs.any())
    each = (time.perf_counter() - began) / count * 1000
    words = f"{count} windows, {wrong} wrong, {each:.0f} ms each"
    return wrong == 0, words + (f"; refused: {refused}" if refused else "")


def _main(arguments: list[str]) -> int:
    refuse_options("python -m data.media.check", arguments, least=1, most=1)
    if not Path(arguments[0]).is_dir():
        raise DataError(f"{arguments[0]} is not a folder; give a folder of video files")
    paths = sorted(path for path in Path(arguments[0]).rglob("*") if path.is_file())
    began, bad = time.monotonic(), 0
    for number, path in enumerate(paths, 1):
        good, words = check(path)
        bad += not good
        left = (time.monotonic() - began) / number * (len(paths) - number)
        print(f"[{number}/{len(paths)}, {left:.0f} s left] {'ok' if good else 'DIFFERS'} {path}: {words}", flush=True)
    print(f"{len(paths)} files, {bad} differ" if bad else f"{len(paths)} files, no differences")
    return 1 if bad else 0


PROGRAM = Command("check-clips", __doc__, _main)

if __name__ == "__main__":
    PROGRAM.start()
