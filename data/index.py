"""Builds the index of finished shards.

    mova index dir=DIR

A lost or damaged index costs a scan of the tars, but no data; its bytes equal those that preparation writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from core.compose import Schema
from core.program import Call, Program
from core.terminal import escape_letters
from data.dataset.build import write_index
from data.dataset.index import DatasetIndex


@dataclass
class IndexConfig:
    """The dataset to index.

    dir: folder of finished shards
    """

    dir: str = "???"


def _run(call: Call[IndexConfig]) -> None:
    root = Path(call.config.dir)
    write_index(root)
    index = DatasetIndex.open(root)
    scores = f", scores {', '.join(index.scores)}" if index.scores else ""
    print(f"{root}: {len(index)} samples in {len(index.shards)} shards{scores}; fingerprint {index.fingerprint}")


PROGRAM = Program("index", __doc__, _run, schema=Schema("index", IndexConfig, ()), before=escape_letters)

if __name__ == "__main__":
    PROGRAM.start()
