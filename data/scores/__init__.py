"""Scores of one decoded window, each a small class: name, version, columns, and a call that gives {column: value}.

NaN means that the score cannot be measured here (no sound, too short, gated); the reason is in the column `unmeasured`
of the table of windows, and what a filter does with it is its own setting. Networks are loaded on first use, in the
process that uses them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from core.ranges import bounded
from data.errors import DataError
from data.scores.decoded import DecodedWindow


@dataclass
class ScoreConfig:
    """Settings of the scores.

    silence_db: silence: 25 ms are silent below this level (dB of full scale)
    bandwidth_db: bandwidth: highest frequency within this many dB of the strongest
    dnsmos_max_silence: dnsmos: not measured above this silence ratio (silence scores 1.84, above a brook)
    cut_threshold: shots: of scenedetect's ContentDetector
    bar_level: bars: a row or column is black when no pixel is brighter (0 to 1)
    syncnet_weights: syncnet: the published weights, a local file
    learned_weights: learned: a scorer that `mova train-sync` has saved
    min_speech: dnsmos, syncnet: they judge speech; where there is a speech_fraction they are measured from this one on.
        0.01: any speech at all (the shortest segment is 0.03 of a window of 8 s); 0: every window
    skip_failed: with filters.drop=true: a window that a filter drops for its cheap scores gets no expensive ones;
        scores.parquet then lacks them, and `mova refilter` can't tell what other thresholds would keep
    """

    silence_db: float = bounded(-50.0, "(-inf, inf)")
    bandwidth_db: float = bounded(50.0, "(0, inf)")
    dnsmos_max_silence: float = bounded(0.8, "[0, 1]")
    cut_threshold: float = bounded(27.0, "(0, inf)")  # shots: of scenedetect's ContentDetector
    bar_level: float = bounded(0.06, "[0, 1]")
    syncnet_weights: str = ""
    learned_weights: str = ""
    min_speech: float = bounded(0.01, "[0, 1]")
    skip_failed: bool = False


class Score(Protocol):
    """What every score has."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def columns(self) -> tuple[str, ...]: ...

    def __call__(self, decoded: DecodedWindow) -> dict[str, float]:
        """A value for each of `columns`; NaN where it can't be measured."""


def rates_of(scores: Sequence[Score]) -> set[int]:
    """The rates of sound that scores want beside 16 kHz."""
    return {score.rate for score in scores if hasattr(score, "rate")}


NAMES = ("silence", "bandwidth", "speech", "dnsmos", "shots", "bars", "motion", "weak", "syncnet", "learned")
DEAR = ("learned", "dnsmos", "syncnet")  # measured after all others, the cheapest first; gates spare them
OF_SPEECH = ("dnsmos", "syncnet")  # what they say of other sounds means nothing
DEAF = ("shots", "bars", "motion")  # need no sound
BLIND = ("silence", "bandwidth", "speech", "dnsmos")  # need no picture


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
