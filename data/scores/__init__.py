"""Scores of one decoded window, each a small class: name, version, columns, and a call that gives {column: value}.

A value of NaN says that it can't be measured here (no sound, too short, gated): what a filter does with that is its own
setting. Networks are loaded on first use, in the process that uses them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from data.errors import DataError


@dataclass
class Decoded:
    """A window as it will be encoded. frames: [3, F, H, W] in [-1, 1] or None; waveform: [n] mono at 16 kHz or None."""

    frames: Tensor | None
    waveform: Tensor | None
    fps: float


@dataclass
class ScoreConfig:
    """Settings of the scores."""

    silence_db: float = -50.0  # silence: a part of 25 ms is silent below this level (dB of full scale)
    bandwidth_db: float = 50.0  # bandwidth: highest frequency within so many dB of the strongest
    dnsmos_max_silence: float = 0.8  # dnsmos: not measured above this silence ratio; silence scores 1.84, above a brook
    cut_threshold: float = 27.0  # shots: of scenedetect's ContentDetector
    bar_level: float = 0.06  # bars: a row or column is black when no pixel of it is brighter (0 to 1)
    syncnet_weights: str = ""  # syncnet: the published weights, a local file
    learned_weights: str = ""  # learned: a scorer that `python -m data.train_sync` has saved


class Score(Protocol):
    """What every score has."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def columns(self) -> tuple[str, ...]: ...

    def __call__(self, decoded: Decoded) -> dict[str, float]:
        """A value for each of `columns`; NaN where it can't be measured."""


NAMES = ("silence", "bandwidth", "speech", "dnsmos", "shots", "bars", "motion", "weak", "syncnet", "learned")


def make_scores(names: Sequence[str], config: ScoreConfig) -> list[Score]:
    """The scores of these names, in this order. DataError for an unknown one, or where its weights are not there."""
    from data.scores.picture import BlackBars, Motion, ShotCount
    from data.scores.sound import Bandwidth, SilenceRatio
    from data.scores.speech import Dnsmos, SpeechFraction
    from data.scores.synchrony import Synchrony

    scores: list[Score] = []
    for name in names:
        if name == "silence":
            scores.append(SilenceRatio(config.silence_db))
        elif name == "bandwidth":
            scores.append(Bandwidth(config.bandwidth_db))
        elif name == "speech":
            scores.append(SpeechFraction())
        elif name == "dnsmos":
            scores.append(Dnsmos(config.dnsmos_max_silence, config.silence_db))
        elif name == "shots":
            scores.append(ShotCount(config.cut_threshold))
        elif name == "bars":
            scores.append(BlackBars(config.bar_level))
        elif name == "motion":
            scores.append(Motion())
        elif name == "weak":
            scores.append(Synchrony("weak", ""))
        elif name == "syncnet":
            scores.append(Synchrony("syncnet", config.syncnet_weights))
        elif name == "learned":
            scores.append(Synchrony("learned", config.learned_weights))
        else:
            raise DataError(f"scores={list(names)}: {name} is unknown; there are {', '.join(NAMES)}")
    if len(set(names)) != len(names):
        raise DataError(f"scores={list(names)} names one twice")
    return scores
