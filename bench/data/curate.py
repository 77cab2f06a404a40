"""Curation throughput by stage: seconds of clip per second of one core, and which stage is the slowest.

    python -m bench.data.curate source=CLIPS data/buckets=360p       # writes bench/results/curate.md

Everything but the weights-bound sync scorers is measured (give learned_weights=FILE or syncnet_weights=FILE to add
them), twice: every score of every window, and with the gate that spares the judges of speech where nobody speaks.
Processor time is counted, not wall time; but a busy machine shares its caches and memory, so use an idle one.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from core.compose import Schema
from core.program import Call, Program
from data.prepare.curation import BucketConfig, PrepareConfig, prepare
from data.scores import NAMES, ScoreConfig
from data.windows.window import WindowConfig
from tools.bench.record import write_record


@dataclass
class CurateBench:
    """The clips and settings of the measurement.

    source: clips, as for `mova prepare`
    fps: frames per second
    buckets: geometries of windows
    learned_weights: a scorer that `mova train-sync` has saved
    syncnet_weights: the published weights, a local file
    loudness: LUFS that the sound is brought to
    output: folder of the record
    """

    source: str = MISSING
    fps: float = 24
    buckets: list[BucketConfig] = field(default_factory=list)
    learned_weights: str = ""
    syncnet_weights: str = ""
    loudness: float = -23.0
    output: str = "bench/results"


def measure(config: CurateBench, min_speech: float) -> dict[str, Any]:
    """The summary of one run with all scores and MOVA's windows, in one process, which loads all networks anew."""
    weights = {"learned": config.learned_weights, "syncnet": config.syncnet_weights}
    names = [name for name in NAMES if weights.get(name, "there")]
    score = ScoreConfig(
        learned_weights=config.learned_weights, syncnet_weights=config.syncnet_weights, min_speech=min_speech
    )
    with tempfile.TemporaryDirectory() as folder:
        record = prepare(
            PrepareConfig(
                config.source,
                f"{folder}/set",
                fps=config.fps,
                buckets=config.buckets,
                scores=names,
                score=score,
                window=WindowConfig("mova", non_speech=True),
                loudness=config.loudness,
                workers=1,
            )  # fmt: skip
        )
    content: dict[str, Any] = record["summary"]
    return content


def costs(summary: dict[str, Any]) -> dict[str, float]:
    """Core-seconds per clip-second by stage, the most expensive first. Whole files are probed and cut."""
    windows = summary["seconds"]
    cost = {
        stage: cpu / (summary["source_seconds"] if stage in ("probe", "window") else windows)
        for stage, cpu in summary["cpu_seconds"].items()
    }
    return dict(sorted(cost.items(), key=lambda item: -item[1]))


def run(call: Call[CurateBench]) -> None:
    """Measure and write the record."""
    config = call.config
    began = time.monotonic()
    summary = measure(config, 0.0)
    gated = measure(config, ScoreConfig.min_speech)
    cost = costs(summary)
    total, slowest = sum(cost.values()), next(iter(cost))
    rows = [
        (stage, f"{1 / one:,.1f} clip-seconds per core-second ({100 * one / total:.1f} % of the time)")
        for stage, one in cost.items()
        if one > 0
    ]
    rows.append(("all stages, every score", f"**{1 / total:,.2f}** clip-seconds per core-second"))
    rate = 1 / sum(costs(gated).values())
    rows.append(
        (f"all stages, score.min_speech={ScoreConfig.min_speech:g}", f"{rate:,.2f} clip-seconds per core-second")
    )
    rows.append(
        ("wall", f"{time.monotonic() - began:.0f} s for both runs, one worker; the machine may have been shared")
    )
    sizes = sorted({f"{one.frames} frames of {one.width} x {one.height}" for one in config.buckets})
    write_record(
        Path(config.output) / "curate.md",
        "Curation throughput",
        call.command,
        rows,
        f"Slowest stage: **{slowest}**, {100 * cost[slowest] / total:.0f} % of the time. {summary['files']} files, "
        f"{summary['source_seconds']:.0f} s, gave {summary['windows']} windows of {', '.join(sizes) or '49 frames'}. "
        "Windows by MOVA's rule, with the gaps between speech; `probe` and `window` are of whole files: packets and "
        "sound, speech and scene cuts, for which every frame is decoded once, small. The first of `bars`, `motion`, "
        "`learned` and `weak` makes the grey picture for all four. Loading a network is counted in its first window. "
        "Encoding is by the built-in codecs; a real VAE is far slower.",
    )
    for name, value in rows:
        print(f"{name}: {value}")
    print(f"slowest: {slowest}; written: {Path(config.output) / 'curate.md'}")


PROGRAM = Program(
    "curate",
    __doc__,
    run,
    schema=Schema("bench_curate", CurateBench, (("data/buckets", None),)),
    command="python -m bench.data.curate",
)

if __name__ == "__main__":
    PROGRAM.start()
