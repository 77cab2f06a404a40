"""Clips that were made from the checkpoints of a run, and the record of them.

    runs/<id>/samples/step-00001000/0-text.mp4      one clip
    runs/<id>/samples/held-out/KEY.mp4              a held-out clip that was given, as its latents decode
    runs/<id>/samples/samples.jsonl                 one line a clip, written once the clip lies there whole

`python -m tools.watch` writes them while the run goes on; the report shows them, and so can whatever else follows a run
(`read_samples(run.root)[-8:]`: the newest). A line that names a file which is gone is passed over.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from train.lines import Lines

RECORD = "samples.jsonl"


@dataclass(frozen=True)
class Sample:
    """One clip. `file`: below the samples folder; `step`: updates of the model that made it.

    `kind`: what was given: "text" (a prompt), "image" (prompt and first frame), "sound", "picture"; `source`: key of
    the held-out sample that gave it, or ""; `sampler`: settings; `seconds`: that making took; `measures`: by name.
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


def folder_of(run: Path) -> Path:
    """Where the clips of a run directory lie."""
    return run / "samples"


def held_out_file(run: Path, key: str) -> Path:
    """Where the held-out clip lies that clips with this `source` were given."""
    return folder_of(run) / "held-out" / f"{key}.mp4"


def read_samples(run: Path) -> list[Sample]:
    """Clips of a run directory that are there, by step. What was made twice (after a kill) counts once, the last."""
    folder = folder_of(run)
    try:
        lines = (folder / RECORD).read_text().splitlines()
    except FileNotFoundError:
        return []
    found: dict[str, Sample] = {}
    for line in lines:
        try:
            sample = Sample(**json.loads(line))
        except (ValueError, TypeError):
            continue  # cut off by death, or of another version
        if (folder / sample.file).is_file():
            found[sample.file] = sample
    return sorted(found.values(), key=lambda one: (one.step, one.file))


def add_samples(run: Path, samples: list[Sample]) -> None:
    """Append to the record, on the disk when it returns. The clips must lie there already."""
    lines = Lines(folder_of(run) / RECORD)
    for sample in samples:
        lines.append(asdict(sample))
    lines.sync()
    lines.close()
