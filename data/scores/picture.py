"""Scores of the picture that need no network."""

import math

import torch
from torch import Tensor

from data.scores import Decoded
from data.window import SceneDetector, need

SMALL = 64  # rows or columns at most that motion is measured on


class ShotCount:
    """`shot_count`: shots in the window by scenedetect; 1 = a single one."""

    name, version, columns = "shots", 1, ("shot_count",)

    def __init__(self, threshold: float):
        need("the score shots", "scenedetect", "cv2")
        self.threshold = threshold

    def __call__(self, decoded: Decoded) -> dict[str, float]:
        if decoded.frames is None:
            return {"shot_count": math.nan}
        detector = SceneDetector(decoded.fps, self.threshold)
        detector.add(smaller(decoded.frames, 128))
        return {"shot_count": float(1 + len(detector.cuts))}


class BlackBars:
    """`black_bars`: share of the encoded picture taken by rows and columns at its edges that stay black throughout."""

    name, version, columns = "bars", 1, ("black_bars",)

    def __init__(self, level: float):
        self.level = level

    def __call__(self, decoded: Decoded) -> dict[str, float]:
        if decoded.frames is None:
            return {"black_bars": math.nan}
        brightest = ((luma(decoded.frames) + 1) / 2).amax(dim=0)  # [H, W]
        rows = _inside(brightest.amax(dim=1) > self.level)
        columns = _inside(brightest.amax(dim=0) > self.level)
        return {"black_bars": 1 - rows * columns}


class Motion:
    """`motion`: mean change of brightness from frame to frame (0 to 1), `motion_peak`: the largest of one frame."""

    name, version, columns = "motion", 1, ("motion", "motion_peak")

    def __call__(self, decoded: Decoded) -> dict[str, float]:
        if decoded.frames is None or decoded.frames.shape[1] < 2:
            return dict.fromkeys(self.columns, math.nan)
        change = luma(smaller(decoded.frames, SMALL)).diff(dim=0).abs().mean(dim=(1, 2)) / 2
        return {"motion": float(change.mean()), "motion_peak": float(change.max())}


def luma(frames: Tensor) -> Tensor:
    """[3, F, H, W] -> brightness [F, H, W] in the same range (BT.601 weights)."""
    return 0.299 * frames[0] + 0.587 * frames[1] + 0.114 * frames[2]


def smaller(frames: Tensor, largest: int) -> Tensor:
    """[3, F, H, W] shrunk by a whole factor, by averaging, to at most about `largest` rows and columns."""
    factor = max(1, round(max(frames.shape[-2:]) / largest))
    return torch.nn.functional.avg_pool2d(frames, factor) if factor > 1 else frames


def _inside(bright: Tensor) -> float:
    """Share of a side between its first and its last bright place; 0 when all is dark."""
    places = bright.nonzero()
    return float(places[-1] - places[0] + 1) / len(bright) if len(places) else 0.0
