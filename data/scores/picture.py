"""Scores of the picture that need no network."""

import math

import numpy as np
from torch import Tensor
from torch.nn.functional import avg_pool2d

from data.scores.decoded import DecodedWindow
from data.windows.window import SceneDetector, need

SMALL = 64  # rows or columns at most that motion is measured on
SCENE = 128  # rows or columns at most that shots are told apart on


class ShotCount:
    """`shot_count`: shots in the window by scenedetect; 1 = a single one."""

    name, version, columns = "shots", 1, ("shot_count",)

    def __init__(self, threshold: float):
        need("the score shots", "scenedetect", "cv2")
        self.threshold = threshold

    def __call__(self, decoded: DecodedWindow) -> dict[str, float]:
        if decoded.frames is None:
            return {"shot_count": math.nan}
        detector = SceneDetector(decoded.fps, self.threshold)
        detector.add(shrink(decoded.frames, SCENE))
        return {"shot_count": float(1 + len(detector.cuts))}


class BlackBars:
    """`black_bars`: share of the encoded picture taken by rows and columns at its edges that stay black throughout."""

    name, version, columns = "bars", 1, ("black_bars",)

    def __init__(self, level: float):
        self.level = level

    def __call__(self, decoded: DecodedWindow) -> dict[str, float]:
        if decoded.frames is None:
            return {"black_bars": math.nan}
        brightest = (decoded.grey.amax(dim=0) + 1) / 2  # [H, W]
        rows = _inside(brightest.amax(dim=1) > self.level)
        columns = _inside(brightest.amax(dim=0) > self.level)
        return {"black_bars": 1 - rows * columns}


class Motion:
    """`motion`: mean change of brightness from frame to frame (0 to 1), `motion_peak`: the largest of one frame."""

    name, version, columns = "motion", 1, ("motion", "motion_peak")

    def __call__(self, decoded: DecodedWindow) -> dict[str, float]:
        if decoded.frames is None or decoded.frames.shape[1] < 2:
            return dict.fromkeys(self.columns, math.nan)
        factor = _factor(decoded.grey, SMALL)
        small = avg_pool2d(decoded.grey, factor) if factor > 1 else decoded.grey
        change = small.diff(dim=0).abs().mean(dim=(1, 2)) / 2
        return {"motion": float(change.mean()), "motion_peak": float(change.max())}


def shrink(frames: Tensor, largest: int) -> np.ndarray:
    """[3, F, H, W] in [-1, 1] -> uint8 RGB [F, h, w, 3], shrunk by a whole factor, by averaging, to about `largest`."""
    import cv2

    factor = _factor(frames, largest)
    height, width = (side // factor for side in frames.shape[-2:])
    planes = frames[..., : height * factor, : width * factor].numpy()
    small = np.empty((frames.shape[1], height, width, 3), np.uint8)
    for channel in range(3):
        for number, plane in enumerate(planes[channel]):  # several times faster than avg_pool2d
            shrunk = cv2.resize(plane, (width, height), interpolation=cv2.INTER_AREA)
            small[number, :, :, channel] = ((shrunk + 1) * 127.5).round()
    return small


def _factor(pictures: Tensor, largest: int) -> int:
    """By how much [..., H, W] is shrunk to have at most about `largest` rows and columns."""
    return max(1, round(max(pictures.shape[-2:]) / largest))


def _inside(bright: Tensor) -> float:
    """Share of a side between its first and its last bright place; 0 when all is dark."""
    positions = bright.nonzero()
    return float(positions[-1] - positions[0] + 1) / len(bright) if len(positions) else 0.0
