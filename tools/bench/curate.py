"""Curation throughput by stage: seconds of clip per second of one core, and which stage is the slowest.

    python -m tools.bench.curate source=CLIPS data/buckets=360p       # writes bench/curate.md

Everything but the weights-bound sync scorers is measured (give learned_weights=FILE or syncnet_weights=FILE to add
them). Processor time is counted, not wall time, so that other load on the machine does not enter.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from data.errors import DataError
from data.prepare import BucketConfig, PrepareConfig, prepare
from data.scores import NAMES, ScoreConfig
from data.window import WindowConfig
from tools.bench.record import write_record


@dataclass
class CurateBench:
    """What is measured."""

    source: str = MISSING  # clips, as for data.prepare
    fps: float = 24
    buckets: list[BucketConfig] = field(default_factory=list)
    learned_weights: str = ""
    syncnet_weights: str = ""
    loudness: float = -23.0
    output: str = "bench"


def measure(config: CurateBench) -> dict[str, Any]:
    """The summary of one run with all scores and MOVA's windows, in one process."""
    weights = {"learned": config.learned_weights, "syncnet": config.syncnet_weights}
    names = [name for name in NAMES if weights.get(name, "there")]
    score = ScoreConfig(learned_weights=config.learned_weights, syncnet_weights=config.syncnet_weights)
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
    return record["summary"]


def costs(summary: dict[str, Any]) -> dict[str, float]:
    """Core-seconds per clip-second by stage, the dearest first. Whole files are probed and cut."""
    windows = summary["seconds"]
    cost = {
        stage: cpu / (summary["source_seconds"] if stage in ("probe", "window") else windows)
        for stage, cpu in summary["cpu_seconds"].items()
    }
    return dict(sorted(cost.items(), key=lambda item: -item[1]))


def main() -> None:
    """The program."""
    ConfigStore.instance().store(name="bench_curate_schema", node=CurateBench)
    _run()


@hydra.main(version_base=None, config_path="pkg://conf", config_name="bench_curate")
def _run(cfg: DictConfig) -> None:
    config: Any = OmegaConf.to_object(cfg)
    began = time.monotonic()
    try:
        summary = measure(config)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    cost = costs(summary)
    total, slowest = sum(cost.values()), next(iter(cost))
    rows = [
        (stage, f"{1 / one:,.1f} clip-seconds per core-second ({100 * one / total:.1f} % of the time)")
        for stage, one in cost.items()
        if one > 0
    ]
    rows.append(("all stages", f"{1 / total:,.2f} clip-seconds per core-second"))
    rows.append(("wall", f"{time.monotonic() - began:.0f} s in one process, the machine may have been shared"))
    sizes = sorted({f"{one.frames} frames of {one.width} x {one.height}" for one in config.buckets})
    write_record(
        Path(config.output) / "curate.md",
        "Curation throughput",
        " ".join(["python -m tools.bench.curate", *sys.argv[1:]]),
        rows,
        f"Slowest stage: **{slowest}**, {100 * cost[slowest] / total:.0f} % of the time. {summary['files']} files, "
        f"{summary['source_seconds']:.0f} s, gave {summary['windows']} windows of {', '.join(sizes) or '49 frames'}. "
        "Windows by MOVA's rule, with the gaps between speech; `window` is the detection of speech and scene cuts, for "
        "which every frame is decoded once more. Encoding is by the built-in codecs; a real VAE is far slower.",
    )
    for name, value in rows:
        print(f"{name}: {value}")
    print(f"slowest: {slowest}; written: {Path(config.output) / 'curate.md'}")


if __name__ == "__main__":
    main()
