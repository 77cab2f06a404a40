"""A simultaneous flash and beep, prepared into shards and decoded back: how far apart are they?

    python -m bench.data.flash_beep      # writes bench/results/flash-beep.md

Files of many codecs and containers, sound that starts late or early (an edit list where the container has them), and
sound with holes before the beep. The truth is what was encoded.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch

from bench.data.clips import H264, Case, cases, write_clip
from core.errors import UserError
from core.program import Command
from data.codec.builtin import audio, video
from data.dataset.index import DatasetIndex
from data.prepare.curation import PrepareConfig, prepare
from tools.bench.record import commit, hardware

FLASH, FRAMES, FPS, RATE = 30, 49, 24, 16000  # the first white frame; frames and their rate; Hz of the sound
FLASH_TIME = FLASH / FPS
LENGTH = 60  # frames of a file
STARTS = (0.4, -0.3, 0.03)  # s at which sound starts late or early
HOLES = {"hole-1.mkv": range(20, 21), "hole-2.mp4": range(30, 32), "hole-20.mp4": range(10, 30)}  # packets without
LIMIT = 0.02  # s


@dataclass(frozen=True)
class Offsets:
    """Errors of the times of flash and beep of one file after the way through the shards, in seconds."""

    flash: float
    beep: float

    @property
    def worst(self) -> float:
        """The largest of both errors and of the time between them."""
        return max(abs(self.flash), abs(self.beep), abs(self.flash - self.beep))


def beep(seconds: float, at: float, rate: int = 48000) -> np.ndarray:
    """[samples]: 1 kHz from `at` on."""
    clock = np.arange(round(seconds * rate)) / rate
    return (0.5 * (clock >= at) * np.sin(2 * np.pi * 1000 * (clock - at))).astype(np.float32)


def chosen() -> list[Case]:
    """One case for each codec and container at 24 frames a second."""
    found: dict[tuple[str, str, bool], Case] = {}
    for case in cases():
        if case.rate == "24" and not case.variable:
            found.setdefault((case.codec, case.container, bool(case.muxer)), case)
    return list(found.values())


def make_files(folder: Path) -> int:
    """Write all files; returns their number."""
    numbers = [0] * FLASH + [4095] * (LENGTH - FLASH)
    sound = beep(LENGTH / FPS, FLASH_TIME)
    for case in chosen():
        name = f"{case.codec}{'-fragmented' if case.muxer else ''}.{case.container}"
        write_clip(folder / name, case, LENGTH, sound, numbers)
    plain = Case("libx264", "mp4", str(FPS), *H264["closed 48, 2 B"])
    whole = write_clip(folder / "whole.mp4", plain, LENGTH, sound, numbers)
    for name, lost in HOLES.items():
        without_sound_packets(whole, folder / name, lost)
    for container in ("mp4", "mkv", "mov"):
        for start in STARTS:
            late = beep(LENGTH / FPS, FLASH_TIME - start)
            write_clip(folder / f"start{start}.{container}", plain, LENGTH, late, numbers, start)
    return len(list(folder.iterdir()))


def without_sound_packets(source: Path, target: Path, lost: range) -> None:
    """A copy that lacks some packets of the sound."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        streams = [new.add_stream_from_template(stream) for stream in old.streams]
        number = 0
        for packet in old.demux():
            heard = packet.stream.type == "audio"
            number += heard
            if packet.size and not (heard and number - 1 in lost):
                packet.stream = streams[packet.stream.index]
                new.mux(packet)


def measure(folder: Path, output: Path, workers: int) -> dict[str, Offsets]:
    """By the files' names: what is found after data.prepare has put them into `output` and they are decoded again."""
    prepare(PrepareConfig(str(folder), str(output), frames=FRAMES, height=32, width=96, text_dim=8, workers=workers))
    index, found = DatasetIndex.open(output), {}
    for row in range(len(index)):
        clip = index.read_clip(row)
        if clip.video is None or clip.audio is None:
            continue
        light = video.decode(clip.video)[:, :, 4:12].mean(dim=(0, 2, 3))[1:]  # groups of 4 frames are averaged
        share = (light - light[0]) / (light[-1] - light[0])
        flash = (FRAMES - float(share.sum())) / FPS  # every frame from the flash on counts one
        loud = torch.nonzero(audio.decode(clip.audio)[: round(FRAMES / FPS * RATE)].abs() > 0.1)
        found[clip.meta["source"]] = Offsets(flash - FLASH_TIME, float(loud[0]) / RATE - FLASH_TIME)
    index.close()
    return found


def _main(arguments: list[str]) -> int:
    """Exit status 1 when a file is missing, or off by more than LIMIT."""
    if arguments:
        raise UserError(f"{arguments[0]}: python -m bench.data.flash_beep takes no arguments")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "files"
        folder.mkdir()
        files = make_files(folder)
        found = measure(folder, Path(name) / "set", 2)
    bad = [name for name, one in found.items() if one.worst > LIMIT]
    rows = [
        f"| {name} | {1000 * one.flash:+.1f} | {1000 * one.beep:+.1f} | {1000 * (one.beep - one.flash):+.1f} |"
        for name, one in sorted(found.items())
    ]
    lines = [
        "# Flash and beep", "", "- command: `python -m bench.data.flash_beep`", f"- hardware: {hardware()}",
        f"- commit: {commit()}, av {av.__version__}", f"- date: {time.strftime('%Y-%m-%d')}", "",
        f"{files} files, {len(found)} in the shards; {len(bad)} off by more than {1000 * LIMIT:.0f} ms. A white "
        f"picture and a tone of 1 kHz begin at {FLASH_TIME} s. `start0.4` and so on: the sound begins so many seconds "
        "after the picture; `hole-N`: N packets of the sound are missing. The picture's time is read off the mean "
        "brightness of groups of four frames, the sound's is the first sample above 0.1; a frame lasts 41.7 ms.", "",
        "| file | flash, ms off | beep, ms off | beep after flash, ms |", "|---|---|---|---|", *rows, "",
    ]  # fmt: skip
    Path("bench/results").mkdir(parents=True, exist_ok=True)
    Path("bench/results/flash-beep.md").write_text("\n".join(lines))
    print(
        f"{len(found)} of {files} files, {len(bad)} off by more than {1000 * LIMIT:.0f} ms; bench/results/flash-beep.md"
    )
    return int(bool(bad) or len(found) < files)


PROGRAM = Command("flash-beep", __doc__, _main, command="python -m bench.data.flash_beep")

if __name__ == "__main__":
    PROGRAM.start()
