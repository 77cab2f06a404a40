"""Measures of one generated clip, to compare checkpoints."""

from __future__ import annotations

import math

from torch import Tensor
from torchaudio.functional import resample

from data.media import SAMPLE_RATE
from data.sync import SyncScorer, load_scorer
from data.sync.impacts import agreement, impacts_heard, impacts_seen

QUIETEST = 1e-6  # amplitude that counts as none: -120 dB


class Measures:
    """Measures a clip. `impacts`: of synthetic clips (data/sync/impacts.py); `sync_weights`: the file of a
    learned scorer (`mova train-sync`). DataError if the file is missing or not a scorer.
    """

    def __init__(self, impacts: bool = False, sync_weights: str | None = None):
        self._impacts = impacts
        self._scorer: SyncScorer | None = load_scorer("learned", sync_weights) if sync_weights is not None else None

    def __call__(self, pixels: Tensor | None, sound: Tensor | None, fps: float, rate: int) -> dict[str, float]:
        """pixels [3, F, H, W] in -1..1; sound [samples], mono at `rate` Hz. What can't be measured is left out, as is
        what needs a picture, or a sound, that is not there (None).

        loudness: dB below full scale (RMS); motion: mean change of a pixel from frame to frame, of the whole range;
        impacts_seen, impacts_heard, impacts_f1: counts, and F1 of those within 0.1 s; the scorer's own names.
        """
        found: dict[str, float] = {}
        sound = resample(sound, rate, SAMPLE_RATE) if sound is not None else None
        if sound is not None:
            rms = float(sound.double().square().mean().sqrt()) if len(sound) else 0.0
            found["loudness"] = 20 * math.log10(max(rms, QUIETEST))
        if pixels is not None and pixels.shape[1] > 1:
            found["motion"] = float((pixels[:, 1:] - pixels[:, :-1]).abs().mean()) / 2
        if pixels is not None and sound is not None:
            if self._impacts:
                seen, heard = impacts_seen(pixels, fps), impacts_heard(sound)
                found |= {"impacts_seen": len(seen), "impacts_heard": len(heard)}
                found["impacts_f1"] = agreement([seen], [heard]).f1
            if self._scorer is not None:
                found |= self._scorer.score(pixels.transpose(0, 1), sound, fps)
        return {name: round(value, 4) for name, value in found.items() if math.isfinite(value)}
