"""Clips generated from the checkpoints of a run, and their records.

    runs/<id>/samples/step-00001000/0-text.mp4      one clip
    runs/<id>/samples/held-out/KEY.mp4              a held-out clip that was given, as its latents decode
    runs/<id>/samples/samples.jsonl                 one line per clip, written once the clip is complete

`mova watch` writes them during the run; the report shows them, and so can any other program that follows a run
(`read_samples(run.root)[-8:]`: the newest). A line that names a missing file, or one outside
the samples folder, is skipped.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from core.jsonl import JsonLines, read_lines

RECORD = "samples.jsonl"
KEY = re.compile(r"[A-Za-z0-9_-]+")  # of a sample: a plain name


@dataclass(frozen=True)
class SampleRecord:
    """One clip. `file`: below the samples folder; `step`: updates of the model that made it.

    `kind`: what was given: "text" (a prompt), "image" (prompt and first frame), "sound", "picture"; `source`: key of
    the held-out sample that gave it, or ""; `sampler`: settings; `seconds`: that making took; `measures`: by name;
    `encoders`: fingerprints of the codecs that decoded it.
    """

    step: int
    file: str
    kind: str
    prompt: str
    seed: int
    source: str = ""
    sampler: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    measures: dict[str, float] = field(default_factory=dict)
    encoders: dict[str, str] = field(default_factory=dict)


def folder_of(run: Path) -> Path:
    """The folder of a run directory's clips."""
    return run / "samples"


def held_out_name(key: str) -> str:
    """The path below the samples folder of the held-out clip that clips with this `source` were given."""
    return f"held-out/{key}.mp4"


def held_out_file(run: Path, key: str) -> Path:
    """Its whole path."""
    return folder_of(run) / held_out_name(key)


def clip_file(run: Path, name: str) -> Path | None:
    """The file of this name below the samples folder; None if it does not exist, or if the name or a link leads out of
    that folder: a foreign record must not show files from elsewhere."""
    path = folder_of(run) / name
    try:
        inside = path.resolve(strict=True).is_relative_to(run.resolve() / folder_of(Path()).name)
    except (OSError, ValueError, RuntimeError):  # ValueError: a null character; RuntimeError: a circle of links
        return None
    return path if inside and path.is_file() else None


def read_samples(run: Path) -> list[SampleRecord]:
    """The existing clips of a run directory, by step. Of a clip made twice (after a kill) only the last counts."""
    found: dict[str, SampleRecord] = {}
    for record in read_lines(folder_of(run) / RECORD):
        sample = _parse(record)
        if sample is not None and clip_file(run, sample.file) is not None:
            found[sample.file] = sample
    return sorted(found.values(), key=lambda one: (one.step, one.file))


def _parse(record: dict[str, Any]) -> SampleRecord | None:
    """The sample of a record; None for a record of another version or kind."""
    try:
        sample = SampleRecord(**record)
    except TypeError:
        return None
    kinds = {"step": int, "file": str, "kind": str, "prompt": str, "seed": int, "source": str, "sampler": dict,
             "seconds": int | float, "measures": dict}  # fmt: skip
    if any(not isinstance(getattr(sample, name), kind) for name, kind in kinds.items()):
        return None
    numbers = all(isinstance(value, int | float) for value in sample.measures.values())
    return sample if numbers and (not sample.source or KEY.fullmatch(sample.source)) else None


def add_samples(run: Path, samples: list[SampleRecord]) -> None:
    """Append to the record and write it through to the disk. The clips must exist already."""
    lines = JsonLines(folder_of(run) / RECORD)
    for sample in samples:
        lines.append(asdict(sample))
    lines.sync()
    lines.close()
