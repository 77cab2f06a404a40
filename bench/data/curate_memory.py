"""Peak memory of data.prepare on a short, a long and a very long film: it must not grow with the length.

    python -m bench.data.curate_memory                # 10 s, 10 min and 2 h; writes bench/results/curate-memory.md

The films are made by PyAV: small frames, and 48 kHz stereo sound. Each is curated by a run of its own with one worker;
the peaks are those of the kernel (VmHWM).
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from core.child import command, environment
from core.compose import Schema
from core.program import Call, Program
from data.errors import DataError
from tools.bench.record import write_record

RATE, FPS = 48000, 24


@dataclass
class CurateMemory:
    """The films of the measurement.

    seconds: length of each
    rule: of the windows: fixed or mova
    output: folder of the record
    """

    seconds: list[int] = field(default_factory=lambda: [10, 600, 7200])
    rule: str = "mova"
    output: str = "bench/results"


def write_film(path: Path, seconds: int) -> None:
    """A film whose picture changes its brightness and whose sound is noise that comes and goes."""
    generator = np.random.default_rng(0)
    noise = generator.normal(0, 0.1, (2, 1152)).astype(np.float32)
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("mpeg4", rate=FPS)
        video.height, video.width, video.pix_fmt = 64, 96, "yuv420p"
        audio: Any = container.add_stream("mp2", rate=RATE, layout="stereo")
        pictures = [generator.integers(0, 255, (96, 96), np.uint8) // 8 + np.uint8(9 * n) for n in range(24)]
        sent = 0
        for number in range(seconds * FPS):
            frame = av.VideoFrame.from_ndarray(pictures[number // 100 % 24], format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(video.encode(frame))
            while sent < (number + 1) * RATE // FPS:
                loud = np.float32(1 if sent // RATE % 4 else 0.01)
                samples = np.ascontiguousarray((noise * loud * 32767).astype(np.int16).T.reshape(1, -1))
                part = av.AudioFrame.from_ndarray(samples, format="s16", layout="stereo")
                part.sample_rate, part.pts, part.time_base = RATE, sent, Fraction(1, RATE)
                container.mux(audio.encode(part))
                sent += 1152
        container.mux(video.encode(None))
        container.mux(audio.encode(None))


def curate(film: Path, output: Path, rule: str) -> tuple[dict[str, float], dict[str, Any], float]:
    """(peak in MB by role, the summary, seconds) of one run of data.prepare."""
    typed = [f"source={film}", f"output={output}", "workers=1"]
    typed += [f"data/window={rule}", "frames=49", "height=64", "width=96", "scores=[silence,motion,speech]"]
    typed += ["window.non_speech=true"] if rule == "mova" else []
    began = time.monotonic()
    run = subprocess.Popen(
        command("data.prepare", more=typed),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    peaks: dict[int, float] = {}
    while run.poll() is None:
        for pid in [run.pid, *_workers(run.pid)]:
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                peaks[pid] = int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6
        time.sleep(0.1)
    if run.returncode != 0:
        assert run.stderr is not None
        raise DataError(f"data.prepare failed: {run.stderr.read().strip()[-500:]}")
    summary = json.loads((output / "prepare.json").read_text())["summary"]
    others = [peak for pid, peak in peaks.items() if pid != run.pid]
    return {"parent": peaks[run.pid], "worker": max(others)}, summary, time.monotonic() - began


def _workers(pid: int) -> list[int]:
    """The children of a process's children: of its fork server, which imports torch and does no file itself."""
    return [worker for child in _children(pid) for worker in _children(child)]


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def run(call: Call[CurateMemory]) -> None:
    """Measure and write the record."""
    config = call.config
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for seconds in config.seconds:
            film = Path(place) / f"{seconds}.mkv"
            write_film(film, seconds)
            peaks, summary, wall = curate(film, Path(place) / f"set-{seconds}", config.rule)
            text = (
                f"worker {peaks['worker']:,.0f} MB, parent {peaks['parent']:,.0f} MB ({summary['windows_seen']:,} "
                f"windows, {wall:.0f} s)"
            )
            rows.append((f"film of {seconds:,} s, {film.stat().st_size / 1e6:,.0f} MB", text))
            print(f"{rows[-1][0]}: {rows[-1][1]}", flush=True)
            film.unlink()
    path = Path(config.output) / "curate-memory.md"
    notes = (
        "Peak resident memory of the process that decodes (worker) and of the one that stores (parent). Windows by "
        f"the rule {config.rule}, of 49 frames of 96 x 64; most of it is torch itself and the models of the scores."
    )
    write_record(path, "Peak memory of curation", call.command, rows, notes)
    print(f"written: {path}")


PROGRAM = Program(
    "curate-memory",
    __doc__,
    run,
    schema=Schema("bench_curate_memory", CurateMemory, ()),
    command="python -m bench.data.curate_memory",
)

if __name__ == "__main__":
    PROGRAM.start()
