"""Scores against signals whose answer is known."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data.errors import DataError
from data.media import open_media
from data.prepare.stages import Measure, gain_db, lufs
from data.scores import NAMES, Score, ScoreConfig, make_scores
from data.scores.decoded import DecodedWindow
from data.scores.picture import shrink
from data.windows.filter import Filter, FilterConfig

RATE = 16000
WIDE = 48000


def noise(seconds: float, seed: int = 0, highest: float = 8000.0, rate: int = RATE) -> Tensor:
    """White noise up to a frequency, root mean square 0.1."""
    n = round(seconds * rate)
    spectrum = torch.fft.rfft(torch.randn(n, generator=torch.Generator().manual_seed(seed)))
    spectrum[round(highest / rate * n) :] = 0
    wave = torch.fft.irfft(spectrum, n)
    return wave * 0.1 / wave.square().mean().sqrt()


def measure(
    name: str, frames: Tensor | None = None, waveform: Tensor | None = None, **config: float
) -> dict[str, float]:
    (score,) = make_scores([name], ScoreConfig(**config))  # type: ignore[arg-type]
    values = score(DecodedWindow(frames, waveform, 24.0))
    assert tuple(values) == score.columns
    return values


def test_silence_ratio() -> None:
    wave = torch.cat([noise(3.0), torch.zeros(RATE), 1e-4 * noise(1.0)])
    assert measure("silence", waveform=wave)["silence_ratio"] == pytest.approx(0.4, abs=0.01)
    assert measure("silence", waveform=torch.zeros(RATE))["silence_ratio"] == 1
    assert measure("silence", waveform=wave, silence_db=-120)["silence_ratio"] == pytest.approx(0.2, abs=0.01)
    assert math.isnan(measure("silence", waveform=torch.zeros(100))["silence_ratio"])


def wide(wave: Tensor) -> DecodedWindow:
    """A window with this sound at 48 kHz."""
    return DecodedWindow(None, torch.zeros(RATE), 24.0, {WIDE: wave})


@pytest.mark.parametrize("highest", [900.0, 4000.0, 7000.0, 12000.0, 20000.0])
def test_bandwidth_is_where_the_sound_ends(highest: float) -> None:
    (score,) = make_scores(["bandwidth"], ScoreConfig())
    wave = noise(2.0, highest=highest, rate=WIDE) + 1e-5 * noise(2.0, seed=1, highest=24000, rate=WIDE)
    assert score(wide(wave))["bandwidth"] == pytest.approx(highest, abs=80)
    assert score(wide(1e-3 * wave))["bandwidth"] == pytest.approx(highest, abs=80)  # not of the level


def test_bandwidth_of_nothing() -> None:
    (score,) = make_scores(["bandwidth"], ScoreConfig())
    assert score(wide(torch.zeros(WIDE)))["bandwidth"] == 0
    assert score(wide(torch.full((WIDE,), 0.3)))["bandwidth"] < 100  # a constant is no sound


def test_black_bars() -> None:
    frames = torch.rand(3, 41, 80, 100, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert measure("bars", frames)["black_bars"] == 0
    frames[:, :, :10] = frames[:, :, 70:] = -0.97  # letterbox, with the codec's noise
    assert measure("bars", frames)["black_bars"] == pytest.approx(0.25)
    frames[..., 90:] = -1
    assert measure("bars", frames)["black_bars"] == pytest.approx(1 - 0.75 * 0.9)
    frames[:, 2, :, :] = 1  # one bright frame: not a bar
    assert measure("bars", frames)["black_bars"] == 0
    assert measure("bars", -torch.ones(3, 5, 8, 8))["black_bars"] == 1


def test_motion() -> None:
    still = torch.rand(3, 1, 64, 64).expand(3, 9, 64, 64)
    assert measure("motion", still) == {"motion": 0, "motion_peak": 0}
    jump = torch.cat([-torch.ones(3, 4, 64, 64), torch.ones(3, 5, 64, 64)], dim=1)
    assert measure("motion", jump) == {"motion": pytest.approx(1 / 8), "motion_peak": pytest.approx(1)}
    assert math.isnan(measure("motion", still[:, :1])["motion"])


def test_bars_and_motion_are_those_of_a_loop_over_pixels() -> None:
    generator = torch.Generator().manual_seed(1)
    frames = torch.rand(3, 4, 137, 131, generator=generator) * 2 - 1  # shrunk by 2, with a rest on both sides
    frames[:, :, :9], frames[..., 120:] = -0.95, -0.9
    red, green, blue = frames.double().numpy()
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    lit = [[max(grey[f, y, x] for f in range(4)) / 2 + 0.5 > 0.06 for x in range(131)] for y in range(137)]
    rows = [y for y in range(137) if any(lit[y])]
    columns = [x for x in range(131) if any(line[x] for line in lit)]
    inside = (rows[-1] - rows[0] + 1) / 137 * (columns[-1] - columns[0] + 1) / 131
    assert inside < 0.9 and measure("bars", frames)["black_bars"] == pytest.approx(1 - inside, abs=1e-6)
    means = [
        [grey[f, y : y + 2, x : x + 2].mean() for y in range(0, 136, 2) for x in range(0, 130, 2)] for f in range(4)
    ]
    changes = [
        sum(abs(b - a) for a, b in zip(means[f], means[f + 1], strict=True)) / len(means[f]) / 2 for f in range(3)
    ]
    expected = {"motion": sum(changes) / 3, "motion_peak": max(changes)}
    assert measure("motion", frames) == pytest.approx(expected, rel=1e-5)


def test_shots_are_told_apart_on_averages() -> None:
    frames = torch.rand(3, 2, 259, 384, generator=torch.Generator().manual_seed(2)) * 2 - 1
    small = shrink(frames, 128)
    means = frames[:, :, :258].double().reshape(3, 2, 86, 3, 128, 3).mean(dim=(3, 5))
    expected = ((means + 1) * 127.5).permute(1, 2, 3, 0).numpy()
    assert small.shape == (2, 86, 128, 3) and np.abs(small - expected).max() <= 0.501


def test_shots_are_counted() -> None:
    scenes = [torch.rand(3, 1, 72, 128, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in range(3)]
    frames = torch.cat([scene.expand(3, 20, 72, 128) for scene in scenes], dim=1)
    assert measure("shots", frames)["shot_count"] == 3
    assert measure("shots", frames[:, :20])["shot_count"] == 1


def test_what_is_not_there_is_not_measured() -> None:
    config = ScoreConfig()
    for name in NAMES[:8]:
        (score,) = make_scores([name], config)
        blind = score(DecodedWindow(None, noise(2.0), 24.0, {WIDE: noise(2.0, rate=WIDE)}))
        deaf = score(DecodedWindow(torch.zeros(3, 49, 64, 64), None, 24.0))
        assert any(all(map(math.isnan, values.values())) for values in (blind, deaf)), name


def test_speech_scores_on_natural_clips(real_clips: Path) -> None:
    found = {}
    for name in ("psychopy_jwp_intro_talk.mp4", "mdn_stream_of_water.mp4"):
        with open_media(real_clips / name) as media:
            wave = media.sound(media.span[0], 3 * RATE)
        found[name] = measure("speech", waveform=wave) | measure("dnsmos", waveform=wave)
    talk, water = found.values()
    assert talk["speech_fraction"] > 0.6 and water["speech_fraction"] == 0
    assert talk["dnsmos_ovrl"] > 2 > 1.5 > water["dnsmos_ovrl"] > 0.9


def test_dnsmos_is_gated_by_silence() -> None:
    wave = torch.cat([noise(0.5), torch.zeros(round(3.5 * RATE))])
    assert math.isnan(measure("dnsmos", waveform=wave)["dnsmos_ovrl"])
    assert math.isfinite(measure("dnsmos", waveform=wave, dnsmos_max_silence=0.9)["dnsmos_ovrl"])
    assert math.isnan(measure("dnsmos", waveform=torch.zeros(RATE))["dnsmos_ovrl"])


def test_unknown_scores_and_missing_weights_are_named() -> None:
    for names, message in (
        (["beauty"], "beauty is unknown"),
        (["motion", "motion"], "twice"),
        (["learned"], "learned_weights"),
    ):
        with pytest.raises(DataError, match=message):
            make_scores(names, ScoreConfig())


def test_a_score_that_fails_costs_its_window_only() -> None:
    class Broken:
        name, version, columns = "broken", 1, ("x",)

        def __call__(self, decoded: DecodedWindow) -> dict[str, float]:
            raise ValueError("odd content")

    broken: Score = Broken()
    with pytest.raises(DataError, match="broken failed.*odd content"):
        Measure([broken]).one(broken, DecodedWindow(None, None, 24.0))


class Fixed:
    """A score of known values that counts its calls."""

    version = 1

    def __init__(self, name: str, **values: float):
        self.name, self.columns, self.values, self.calls = name, tuple(values), values, 0

    def __call__(self, decoded: DecodedWindow) -> dict[str, float]:
        self.calls += 1
        return self.values


def run(
    stage: Measure, dropping: Filter | None = None, **known: float
) -> tuple[dict[str, float], str, set[str], list[str]]:
    """(scores, why some are not measured, columns that were spared, stages in order) of a window with sound."""
    stages: list[str] = []

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        stages.append(name)
        yield

    scores = dict(known)
    why, spared = stage(DecodedWindow(None, noise(1.0), 24.0), scores, dropping, timed)
    return scores, why, spared, stages


def test_judges_of_speech_need_speech() -> None:
    for spoken, least, measured in ((0.0, 0.01, 0), (0.03, 0.01, 1), (0.0, 0.0, 1), (0.3, 0.5, 0), (math.nan, 0.01, 1)):
        judge = Fixed("dnsmos", dnsmos_ovrl=3.0)
        scores, why, spared, stages = run(Measure([judge, Fixed("speech", speech_fraction=spoken)], least))
        assert judge.calls == measured and math.isnan(scores["dnsmos_ovrl"]) == (measured == 0) and not spared
        assert ("dnsmos: speech_fraction" in why and f"min_speech={least:g}" in why) == (measured == 0)
        assert stages[0] == "score/speech"  # first what is cheap, whatever was asked for first
    judge = Fixed("dnsmos", dnsmos_ovrl=3.0)
    assert run(Measure([judge], 0.01))[0]["dnsmos_ovrl"] == 3.0  # nothing says how much speech there is
    assert math.isnan(run(Measure([judge], 0.01), speech_fraction=0.0)[0]["dnsmos_ovrl"])  # a manifest does
    with pytest.raises(DataError, match="min_speech=1.5"):
        Measure([], 1.5)


def test_dear_scores_of_a_window_that_is_dropped_are_spared_only_when_asked() -> None:
    def scores() -> list[Score]:
        return [Fixed("learned", learned_sync=0.9), Fixed("silence", silence_ratio=0.95), Fixed("motion", motion=0.1)]

    columns = ("learned_sync", "silence_ratio", "motion", "elsewhere")
    strict = Filter(FilterConfig({"silence_ratio": [None, 0.8], "learned_sync": [0.5, None]}), columns)
    for skip, dropping, known, spared in (
        (True, strict, {}, True),
        (False, strict, {}, False),
        (True, None, {}, False),  # filters.drop=false: all windows are stored with all scores
        (True, Filter(FilterConfig({"silence_ratio": [None, 0.99], "learned_sync": [0.95, None]}), columns), {}, False),
        (True, Filter(FilterConfig({"elsewhere": [1, None]}), columns), {"elsewhere": 0.5}, True),
    ):
        stage = Measure(scores(), skip_failed=skip)
        found, why, columns_spared, stages = run(stage, dropping, **known)
        assert math.isnan(found["learned_sync"]) == spared == (columns_spared == {"learned_sync"})
        assert ("score/learned" in stages) != spared and found["silence_ratio"] == 0.95 and found["motion"] == 0.1
        assert why.startswith("learned: skipped, as the window fails ") == spared
    assert strict.failures({"silence_ratio": 0.95}, {"learned_sync"}) == ["silence_ratio <= 0.8"]
    assert len(strict.failures({"silence_ratio": 0.95})) == 2


def test_why_a_score_is_missing_is_told() -> None:
    stage = Measure(make_scores(["silence", "motion", "weak"], ScoreConfig()))
    timed = lambda name: contextlib.nullcontext()  # noqa: E731
    moving = torch.rand(3, 49, 16, 16) * 2 - 1
    for decoded, expected in (
        (DecodedWindow(None, noise(2.0), 24.0), "motion, weak: no picture"),
        (DecodedWindow(moving, None, 24.0), "silence, weak: no sound"),
        (DecodedWindow(moving, torch.zeros(32000), 24.0), "weak: silent, still or too short"),
        (DecodedWindow(moving, noise(2.0), 24.0), ""),
    ):
        assert stage(decoded, {}, None, timed)[0] == expected


def test_loudness_reaches_its_target() -> None:
    wave = 0.05 * torch.from_numpy(np.sin(2 * np.pi * 997 * np.arange(4 * RATE) / RATE)).float()
    before = lufs(wave, RATE)
    assert before == pytest.approx(20 * math.log10(0.05) - 3.01, abs=0.3)  # BS.1770: a 997 Hz sine at 0 dBFS has -3.01
    gain = gain_db(wave, before, -23.0)
    assert lufs(wave * 10 ** (gain / 20), RATE) == pytest.approx(-23.0, abs=0.05)
    assert float((wave * 10 ** (gain_db(wave, before, -1.0) / 20)).abs().max()) == pytest.approx(0.99, abs=1e-3)
    assert gain_db(torch.zeros(RATE), lufs(torch.zeros(RATE), RATE), -23.0) == 0
    assert gain_db(1e-5 * wave, -120.0, -23.0) == 30  # noise is not raised without limit
