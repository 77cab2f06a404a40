"""Trains a synchronization scorer on clips whose picture and sound are in step, and measures it on held-out ones.

    mova train-sync source=clips output=scorer.safetensors

Every training example is a window of a clip with sounds that begin up to a second earlier or later than its picture
(half of them hardly); the sounds of the other clips in the batch are those that don't belong. Beside the scorer comes
`scorer.json` with the settings and what was measured on clips that were not trained on. Clips must be longer than a
window and the largest shift together, so that a shifted sound is real to its ends; shorter ones shorten the window.
"""

from __future__ import annotations

from core.compose import Schema
from core.program import Call, Program
from data.sync.trainer import TrainSyncConfig, train_sync


def _run(call: Call[TrainSyncConfig]) -> None:
    train_sync(call.config)


PROGRAM = Program("train-sync", __doc__, _run, schema=Schema("train_sync", TrainSyncConfig, ()))

if __name__ == "__main__":
    PROGRAM.start()
