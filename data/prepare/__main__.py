"""From raw video files to a dataset: cut into windows, scored, filtered, encoded, in indexed shards, with a report.

    mova prepare source=clips output=dataset
    mova prepare source='raw/*.mp4' output=dataset frames=49 fps=24 height=64 width=64 holdout=0.05
    mova prepare source=manifest.csv output=dataset data/buckets=360p data/window=mova data/filters=phase1 \
        scores='[silence,bandwidth,speech,dnsmos,shots]' external=scores-from-elsewhere.parquet

A source is a folder, a pattern, a file or a manifest (data/sources). The caption of `clip.mp4` is read from
`clip.txt`, else from "caption" in `clip.json`. A file without sound or without picture gives samples of the other
modality alone. Unusable files and windows are listed in `output/rejected.jsonl`, with the reason; every window with all
its scores is in `output/scores.parquet`. With holdout above 0, whole files go to `output/valid`, the rest to
`output/train`.

Everything is written to `output.partial` first, unit by unit: `output` is complete from the moment it exists, and a run
that was killed continues with the missing units. On a cluster each job does one unit, `unit=3/16`; the last one
to end puts the dataset together.
"""

from __future__ import annotations

import signal
import sys

from core.compose import Schema
from core.program import Call, Program
from core.terminal import escape_letters
from data.prepare.curation import PrepareConfig, prepare


def _begin() -> None:
    escape_letters()
    signal.signal(signal.SIGTERM, _stop)


def _stop(number: int, frame: object) -> None:
    sys.exit(128 + number)  # an exception, so that the workers are ended too


def _run(call: Call[PrepareConfig]) -> None:
    prepare(call.config)


PROGRAM = Program(
    "prepare",
    __doc__,
    _run,
    schema=Schema("prepare", PrepareConfig),
    before=_begin,
    interrupted="stopped; the same command resumes the work",
)

if __name__ == "__main__":
    PROGRAM.start()
