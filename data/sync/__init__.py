"""Scores of synchronization: does the sound of a window belong to its picture, and by how much is it late?

Three scorers with one interface (docs/sync.md compares them): `syncnet` for talking faces, with the published weights
from a local file; `learned`, trained on one's own clips by `mova train-sync`; `weak`, a weight-free baseline
that is not good enough to filter by.
"""

from typing import Protocol

from torch import Tensor

from data.errors import DataError

SCORERS = ("syncnet", "learned", "weak")


class SyncScorer(Protocol):
    """What every scorer can do.

    name: one of SCORERS; keys: the names of its scores, in the order of `score`; fingerprint: changes whenever the same
    window could get other scores (weights, settings, version of the code); colour: whether it needs colours.
    """

    name: str
    keys: tuple[str, ...]
    fingerprint: str
    colour: bool

    def score(self, frames: Tensor, waveform: Tensor, fps: float) -> dict[str, float]:
        """Scores of one window, NaN each where they can't be measured (silence, too short, no face).

        frames: [F, 3, H, W] RGB in [-1, 1], or [F, 1, H, W] grey where `colour` is false; frame i is shown from i/fps
        to (i+1)/fps; waveform: [n] mono at 16 kHz that begins with the first frame; lags are in seconds and positive
        where the sound is late.
        ValueError for other shapes.
        """
        ...


def load_scorer(name: str, weights: str | None = None) -> SyncScorer:
    """The scorer `name`. weights: its local file (`weak` has none). DataError: unknown name, missing or wrong file."""
    if name == "syncnet":
        from data.sync.syncnet import SyncNetScorer

        return SyncNetScorer(weights)
    if name == "learned":
        from data.sync.learned import LearnedScorer

        return LearnedScorer(weights)
    if name == "weak":
        from data.sync.weak import WeakScorer

        if weights is not None:
            raise DataError(f"the weak sync score has no weights, but {weights} was given; leave it out")
        return WeakScorer()
    raise DataError(f"there is no sync scorer {name!r}; choose one of {', '.join(SCORERS)}")
