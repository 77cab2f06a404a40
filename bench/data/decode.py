"""Decoding: whether frames match their times, how fast it is, and how much memory it needs.

    python -m bench.data.decode [CLIPS]   # writes bench/results/decode.md; CLIPS: a folder of real clips, for the speed

Files of many codecs, containers, frame rates and GOP structures are made with av's own encoders; their frames show
their number. Windows at random times, in increasing order and not, are compared with the encoded frames. For
comparison: decord (if installed) with its own index, and the peak memory of a process that reads a long file.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from bench.data.clips import Case, cases, read_number, write_clip, write_film
from core.program import Command
from data.errors import DataError
from data.media import SAMPLE_RATE, open_media
from tools.bench.record import commit, hardware

FRAMES, WINDOW, WINDOWS = 240, 25, 16
Reader = Callable[[float], list[int]]  # the numbers that are shown in the window that begins at a time


def tried(reader: Reader, case: Case, origin: float) -> tuple[int, int, float]:
    """(windows with a wrong frame, windows refused, processor ms a window)."""
    times, fps = case.times(FRAMES), float(Fraction(case.rate))
    starts = np.random.default_rng(5).uniform(0, max(0.01, times[-1] - WINDOW / fps), WINDOWS)
    wrong = refused = 0
    began = time.process_time()
    for start in [*sorted(starts[: WINDOWS // 2]), *starts[WINDOWS // 2 :]]:
        moments = start + (np.arange(WINDOW) + 0.5) / fps + 0.002
        allowed = [np.searchsorted(times, moments + slip, side="right") - 1 for slip in (-0.0011, 0.0, 0.0011)]
        try:
            found = reader(origin + start)
        except DataError:
            refused += 1
            continue
        wrong += any(one not in some for one, some in zip(found, zip(*allowed, strict=True), strict=True))
    return wrong, refused, (time.process_time() - began) / WINDOWS * 1000


def by_media(path: Path, case: Case) -> tuple[int, int, float]:
    """With data.media, opening included."""
    began = time.process_time()
    fps = float(Fraction(case.rate))
    try:
        media = open_media(path)
    except DataError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 0, WINDOWS, 0.0
    opened = (time.process_time() - began) / WINDOWS * 1000
    with media:

        def read(start: float) -> list[int]:
            pixels = media.frames(start, WINDOW, fps, *case.size)
            return [read_number(one) for one in ((pixels + 1) * 127.5).mean(dim=0).numpy()]

        wrong, refused, each = tried(read, case, media.span[0])
    return wrong, refused, each + opened


def by_decord(path: Path, case: Case) -> tuple[int, int, float] | None:
    """With decord alone, by its own timestamps, opening included; None where it opens nothing."""
    try:
        import decord

        began = time.process_time()
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        begins = np.asarray(reader.get_frame_timestamp(range(len(reader))))[:, 0]
        opened = (time.process_time() - began) / WINDOWS * 1000
    except Exception:  # an ImportError, or one of decord's many
        return None
    fps = float(Fraction(case.rate))

    def read(start: float) -> list[int]:
        moments = start + (np.arange(WINDOW) + 0.5) / fps + 0.002
        places = np.clip(np.searchsorted(begins, moments, side="right") - 1, 0, len(begins) - 1)
        try:
            pictures = reader.get_batch(places.tolist()).asnumpy()
        except Exception as error:
            raise DataError(str(error)) from error
        return [read_number(one.astype(np.float32).mean(axis=-1)) for one in pictures]

    wrong, refused, each = tried(read, case, float(begins[0]))
    return wrong, refused, each + opened


def table(folder: Path) -> tuple[list[str], int]:
    """Rows of the table, and how many of data.media's windows are wrong or refused."""
    rows = [
        "| codec | container | rate | GOP | windows | wrong | refused | ms a window | decord: wrong | refused | ms |"
    ]
    rows.append("|---|---|---|---|---|---|---|---|---|---|---|")
    bad = 0
    for case in cases():
        path = write_clip(folder / case.name, case, FRAMES)
        wrong, refused, each = by_media(path, case)
        bad += wrong + refused
        other = by_decord(path, case)
        words = "cannot open it | | " if other is None else f"{other[0]} | {other[1]} | {other[2]:.1f}"
        kind = f"{case.container}{', fragmented' if case.muxer else ''}"
        rate = f"{case.rate}{', variable' if case.variable else ''}"
        rows.append(
            f"| {case.codec} | {kind} | {rate} | {case.gop} | {WINDOWS} | {wrong} | {refused} | {each:.1f} | {words} |"
        )
        print(rows[-1], flush=True)
        path.unlink()
    return rows, bad


def peak(path: Path) -> None:
    """Print the peak of this process's memory in MB: after importing, and after windows over the whole file."""
    torch.set_num_threads(1)
    print(_peak())
    with open_media(path) as media:
        start, end = media.span
        for place in np.linspace(start, end - 2.1, 24):
            media.frames(float(place), 49, 24, 64, 192)
            media.sound(float(place), 2 * SAMPLE_RATE)
        for _ in media.sound_blocks(30.0):
            pass
        for _ in media.scan_frames(4, 32):
            pass
    print(_peak())


def _peak() -> int:
    """Largest resident memory so far in MB (rusage would count that of the parent, too)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024


def memory(folder: Path) -> list[str]:
    """Peak memory by length of the file."""
    rows = ["| length | opening, 24 windows, all sound, a scan: peak | of which imports |", "|---|---|---|"]
    for words, seconds in (("10 s", 10), ("10 min", 600), ("2 h", 7200)):
        path = write_film(folder / "film.mp4", seconds)
        command = [sys.executable, "-m", "bench.data.decode", "--peak", str(path)]
        before, after = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-2:]
        rows.append(f"| {words} | {after} MB | {before} MB |")
        print(rows[-1], flush=True)
    return rows


def speed(clips: Path) -> list[str]:
    """Clip-seconds per core-second of decoding windows of 49 frames at 24 a second, 640 x 352, with their sound."""
    rows = ["| clip | size | clip-seconds per core-second, opening included |", "|---|---|---|"]
    all_seconds = all_cost = 0.0
    for path in sorted(clips.iterdir()):
        began = time.process_time()
        try:
            media = open_media(path)
        except DataError:
            continue
        seconds = 0.0
        with media:
            while media.span[0] + seconds + 49 / 24 <= media.span[1]:
                media.frames(media.span[0] + seconds, 49, 24, 352, 640)
                if media.sound_span is not None:
                    media.sound(media.span[0] + seconds, round(49 / 24 * SAMPLE_RATE))
                seconds += 49 / 24
        cost = time.process_time() - began
        all_seconds, all_cost = all_seconds + seconds, all_cost + cost
        rows.append(f"| {path.name} | {media.size[1]} x {media.size[0]} | {seconds / cost:.1f} |")
    rows.append(f"| all | | **{all_seconds / all_cost:.1f}** |")
    print(rows[-1], flush=True)
    return rows


def _main(arguments: list[str]) -> int:
    if arguments[:1] == ["--peak"]:
        peak(Path(arguments[1]))
        return 0
    torch.set_num_threads(1)  # as in a worker
    with tempfile.TemporaryDirectory() as name:
        rows, bad = table(Path(name))
        memory_rows = memory(Path(name))
    lines = ["# Decoding", "", f"- command: `{' '.join(['python -m bench.data.decode', *arguments])}`"]
    lines += [
        f"- hardware: {hardware()}",
        f"- commit: {commit()}, av {av.__version__}",
        f"- date: {time.strftime('%Y-%m-%d')}",
    ]
    lines += ["", "## Frames by time", ""]
    lines += [f"{len(rows) - 2} files of {FRAMES} frames, {WINDOWS} windows of {WINDOW} "
              f"frames each at random places; processor time, opening included. data.media: {bad} windows wrong or "
              "refused.", "", *rows, "", "## Memory", "", *memory_rows, ""]  # fmt: skip
    if arguments:
        lines += ["## Speed", "", *speed(Path(arguments[0])), ""]
    Path("bench/results").mkdir(parents=True, exist_ok=True)
    Path("bench/results/decode.md").write_text("\n".join(lines))
    return 1 if bad else 0


PROGRAM = Command("decode", __doc__, _main, command="python -m bench.data.decode")

if __name__ == "__main__":
    PROGRAM.start()
