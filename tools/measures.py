"""Numbers about one generated clip, to follow from checkpoint to checkpoint."""

from __future__ import annotations

import math

from torch import Tensor

from data.sync import SyncScorer, load_scorer
from data.sync.impacts import agreement, impacts_heard, impacts_seen

QUIETEST = 1e-6  # amplitude that counts as none: -120 dB


class Measures:
    """What is measured of a clip. `impacts`: of synthetic clips (data/sync/impacts.py); `sync_weights`: the file of a
    learned scorer (`python -m data.train_sync`). DataError where the file is missing or no such file.
    """

    def __init__(self, impacts: bool = False, sync_weights: str | None = None):
        self._impacts = impacts
        self._scorer: SyncScorer | None = load_scorer("learned", sync_weights) if sync_weights is not None else None

    def __call__(self, pixels: Tensor, sound: Tensor, fps: float) -> dict[str, float]:
        """pixels [3, F, H, W] in -1..1; sound [samples], mono at 16 kHz. What can't be measured is left out.

        loudness: dB below full scale (RMS); motion: mean change of a pixel from frame to frame, of the whole range;
        impacts_seen, impacts_heard, impacts_f1: counts, and F1 of those within 0.1 s; the scorer's own names.
        """
        rms = float(sound.double().square().mean().sqrt()) if len(sound) else 0.0
        found = {"loudness": 20 * math.log10(max(rms, QUIETEST))}
        if pixels.shape[1] > 1:
            found["motion"] = float((pixels[:, 1:] - pixels[:, :-1]).abs().mean()) / 2
        if self._impacts:
            seen, heard = impacts_seen(pixels, fps), impacts_heard(sound)
            found |= {"impacts_seen": len(seen), "impacts_heard": len(heard)}
            found["impacts_f1"] = agreement([seen], [heard]).f1
        if self._scorer is not None:
            found |= self._scorer.score(pixels.transpose(0, 1), sound, fps)
        return {name: round(value, 4) for name, value in found.items() if math.isfinite(value)}
