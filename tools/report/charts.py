"""Curves as SVG: which metrics share a chart, the axes, the paths. The page's script only adds the readout.

Metrics are selected by name; one that no chart selects gets its own chart, so that none is lost.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tools.report.history import Curve, History

WIDTH, HEIGHT = 560.0, 170.0  # of the plot, in the units of its viewBox
LEFT, TOP, BOTTOM = 52.0, 8.0, 22.0  # margins for the numbers of the axes
NOISY = 40  # points from which a curve of training is smoothed, the points themselves drawn faintly
SMOOTHING = 0.04  # of the points: width of the window
OUTLIERS = 0.5  # percent of the points at either end that may lie outside of the axis
MOST_CURVES = 12  # in one chart
COLOURS = 8
MEANING = {"valid/": 2, "high": 0, "low": 1, "bridge": 4, "audio": 3, "tower": 5}  # word in a name -> its colour
# Kinds of kernels, planned and profiled (train/monitor/kernel_kinds.py), by what a chart calls them.
KERNELS = {
    "gemm": "matrix products", "attention": "attention", "elementwise": "elementwise kernels",
    "collectives": "collectives", "host_copies": "copies from and to the host",
}  # fmt: skip


@dataclass(frozen=True)
class ChartKind:
    """A chart that a page has when there are metrics for it. `names`: a pattern; `zero`: the axis begins at 0."""

    section: str
    title: str
    names: str
    unit: str = ""
    zero: bool = False


KINDS = (
    ChartKind("Losses", "Video", r"train/loss_video(_high|_low)?|valid/video"),
    ChartKind("Losses", "Audio", r"train/loss_audio(_high|_low)?|valid/audio"),
    ChartKind("Losses", "Weighted sum", r"train/loss( \(.*\))?|valid/loss"),
    ChartKind("Losses", "Validation by expert", r"valid/(video|audio)_(high|low)"),
    ChartKind("Losses", "Validation of the averaged weights", r"valid/ema/.*"),
    ChartKind("Losses", "Video by noise level", r"train/loss_video_noise_.*"),
    ChartKind("Losses", "Audio by noise level", r"train/loss_audio_noise_.*"),
    ChartKind("Optimization", "Gradient norm", r"train/grad_norm.*"),
    ChartKind("Optimization", "Parameter norm", r"train/param_norm.*"),
    ChartKind("Optimization", "Update to weight", r"train/update_ratio.*"),
    ChartKind("Optimization", "Learning rate", r"train/lr.*", zero=True),
    ChartKind("Optimization", "Bridge: its addition relative to the stream", r"train/bridge.*", zero=True),
    ChartKind("Speed and memory", "Tokens per second", r"perf/tokens.*", zero=True),
    ChartKind("Speed and memory", "Clips per second", r"perf/clips.*", zero=True),
    ChartKind("Speed and memory", "MFU and HFU", r"perf/(planned_)?(mfu|hfu).*", zero=True),
    ChartKind("Speed and memory", "Step time", r"perf/(planned_)?step_time", "s", zero=True),
    *(
        ChartKind("Speed and memory", f"Time of {title}", rf"perf/(planned|profiled)_{kind}_time", "s", zero=True)
        for kind, title in KERNELS.items()
    ),
    ChartKind("Speed and memory", "Waiting", r"perf/.*(wait|stall).*", "s", zero=True),
    ChartKind("Speed and memory", "Bytes sent by a rank", r"perf/comm/.*_bytes", zero=True),
    ChartKind("Speed and memory", "Memory", r"perf/(planned_)?memory.*", "GiB", zero=True),
)
SECTIONS = {"train": "Optimization", "valid": "Losses", "perf": "Speed and memory", "data": "Data seen"}
ORDER = ("Losses", "Optimization", "Speed and memory", "Data seen", "Other metrics")


@dataclass
class Line:
    """One curve of a chart. `faint`: path of the values, or of the area between least and largest; `area`: which."""

    name: str
    colour: int
    last: str
    path: str
    faint: str
    area: bool
    dots: list[tuple[float, float]]


@dataclass
class Chart:
    """A chart to draw. Positions are in the viewBox; `data`: values for the readout."""

    section: str
    title: str
    unit: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[float]
    outside: int
    left_out: int
    data: dict[str, Any] = field(default_factory=dict)


def make_charts(history: History, resumed: Sequence[int]) -> dict[str, list[Chart]]:
    """{section: its charts}, in the order of the page. `resumed`: steps at which a line stands."""
    left = dict(history.curves)
    sections: dict[str, list[Chart]] = {name: [] for name in ORDER}
    for kind in KINDS:
        names = [name for name in left if re.fullmatch(kind.names, name)]
        if names:
            chart = _chart(kind, [left.pop(name) for name in sorted(names)], history.steps, resumed)
            sections[kind.section].append(chart)
    for name, curve in sorted(left.items()):
        section = SECTIONS.get(name.partition("/")[0], "Other metrics")
        sections[section].append(_chart(ChartKind(section, name, ""), [curve], history.steps, resumed))
    return {name: charts for name, charts in sections.items() if charts}


def _chart(kind: ChartKind, curves: list[Curve], steps: int, resumed: Sequence[int]) -> Chart:
    shown = curves[:MOST_CURVES]
    low, high = _limits(shown, kind.zero)
    lines, outside = [], 0
    for curve, colour in zip(shown, _colours([one.name for one in shown])):
        lines.append(_line(curve, colour, steps, low, high))
        outside += int(((curve.high > high) | (curve.low < low)).sum())
    read = [_readout(curve) | {"colour": line.colour} for curve, line in zip(shown, lines)]
    return Chart(
        kind.section, kind.title, kind.unit, lines,
        [(_x(tick, steps), short(tick)) for tick in ticks(0, steps - 1, 6) if tick == int(tick)],
        [(_y(tick, low, high), short(tick)) for tick in ticks(low, high, 4)],
        [round(_x(step, steps), 1) for step in resumed if 0 <= step < steps],
        outside, len(curves) - len(shown),
        {"steps": steps, "lines": read},
    )  # fmt: skip


def _colours(names: list[str]) -> list[int]:
    """A colour for each curve: the one of its meaning if no earlier curve has it, for the others one of the rest."""
    mixed = not all(name.startswith("valid/") for name in names)  # validation beside training
    chosen: dict[str, int] = {}
    for name in names:
        meant = [colour for word, colour in MEANING.items() if word in name and (mixed or word != "valid/")]
        if meant and meant[0] not in chosen.values():
            chosen[name] = meant[0]
    free = [colour for colour in range(COLOURS) if colour not in chosen.values()]
    others = iter(free + list(range(COLOURS)) * 2)
    return [chosen[name] if name in chosen else next(others) for name in names]


def _limits(curves: list[Curve], zero: bool) -> tuple[float, float]:
    """Limits of the y axis: a few outliers may lie outside, since one spike would flatten everything else."""
    lows, highs = np.concatenate([one.low for one in curves]), np.concatenate([one.high for one in curves])
    few = len(lows) < 4 * NOISY
    low = float(lows.min() if few else np.percentile(lows, OUTLIERS))
    high = float(highs.max() if few else np.percentile(highs, 100 - OUTLIERS))
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low if zero and low == 0 else low - room), high + room


def _line(curve: Curve, colour: int, steps: int, low: float, high: float) -> Line:
    xs = _x(curve.steps, steps)
    noisy = len(xs) > NOISY and curve.name.startswith(("train/loss", "train/grad", "perf/"))
    middle = smooth(curve.mean) if noisy else curve.mean
    faint, area = "", False
    if curve.thinned:
        there = zip([*xs, *xs[::-1]], [*_y(curve.high, low, high), *_y(curve.low, low, high)[::-1]])
        faint, area = _path(there) + "Z", True
    elif noisy:
        faint = _path(zip(xs, _y(curve.mean, low, high)))
    few = len(xs) <= NOISY
    points = list(zip(xs, _y(middle, low, high)))
    dots = [(round(float(x), 1), round(float(y), 1)) for x, y in points] if few else []
    return Line(curve.name, colour, number(curve.last), _path(points), faint, area, dots)


def smooth(values: np.ndarray) -> np.ndarray:
    """[n] centred moving mean; the window shrinks at both ends, so that they are not drawn towards the middle."""
    half = max(1, round(SMOOTHING * len(values)))
    positions = np.arange(len(values))
    reach = np.minimum(half, np.minimum(positions, positions[::-1]))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    result: np.ndarray = (sums[positions + reach + 1] - sums[positions - reach]) / (2 * reach + 1)
    return result


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) between low and high, approximately this many."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number for an axis: 20k, 1.5M, 2e-05."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def number(value: float) -> str:
    """A value of a metric, with four significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _x(step: Any, steps: int) -> Any:
    return LEFT + WIDTH * step / max(steps - 1, 1)


def _y(value: Any, low: float, high: float) -> Any:
    return TOP + HEIGHT * (1 - (value - low) / (high - low))


def _path(points: Any) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _readout(curve: Curve) -> dict[str, Any]:
    """Numbers of a curve for the page's script, five digits each."""

    def rounded(values: np.ndarray) -> list[float]:
        return [float(f"{value:.5g}") for value in values]

    found: dict[str, Any] = {"name": curve.name, "steps": [round(float(step)) for step in curve.steps]}
    found["mean"] = rounded(curve.mean)
    if curve.thinned:
        found |= {"least": rounded(curve.low), "most": rounded(curve.high)}
    return found
