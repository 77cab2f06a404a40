"""Scores of synchronization: the scorers of data.sync, under the names that they give."""

import math

from data.errors import DataError
from data.scores.decoded import DecodedWindow

HOW = {
    "learned": "score.learned_weights=FILE, which `mova train-sync` makes from your own clips",
    "syncnet": "score.syncnet_weights=FILE, the published weights of SyncNet",
}


class Synchrony:
    """One scorer of data.sync. `weak` correlates motion with onsets: a baseline near chance, not a filter."""

    version = 1

    def __init__(self, name: str, weights: str):
        from data.sync import load_scorer

        if name in HOW and not weights:
            raise DataError(f"the score {name} needs {HOW[name]}")
        self._scorer = load_scorer(name, weights or None)
        self.name, self.columns, self.fingerprint = name, tuple(self._scorer.keys), self._scorer.fingerprint

    def __call__(self, decoded: DecodedWindow) -> dict[str, float]:
        if decoded.frames is None or decoded.waveform is None:
            return dict.fromkeys(self.columns, math.nan)
        pictures = decoded.frames.transpose(0, 1) if self._scorer.colour else decoded.grey[:, None]
        found = self._scorer.score(pictures, decoded.waveform, decoded.fps)
        return {column: float(found[column]) for column in self.columns}
