"""Scores against signals whose answer is known."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data.decode import open_media
from data.errors import DataError
from data.scores import NAMES, Decoded, Score, ScoreConfig, make_scores
from data.stages import Measure, gain_db, lufs

RATE = 16000


def noise(seconds: float, seed: int = 0, highest: float = 8000.0) -> Tensor:
    """White noise up to a frequency, root mean square 0.1."""
    n = round(seconds * RATE)
    spectrum = torch.fft.rfft(torch.randn(n, generator=torch.Generator().manual_seed(seed)))
    spectrum[round(highest / RATE * n) :] = 0
    wave = torch.fft.irfft(spectrum, n)
    return wave * 0.1 / wave.square().mean().sqrt()


def measure(
    name: str, frames: Tensor | None = None, waveform: Tensor | None = None, **config: float
) -> dict[str, float]:
    (score,) = make_scores([name], ScoreConfig(**config))  # type: ignore[arg-type]
    values = score(Decoded(frames, waveform, 24.0))
    assert tuple(values) == score.columns
    return values


def test_silence_ratio() -> None:
    wave = torch.cat([noise(3.0), torch.zeros(RATE), 1e-4 * noise(1.0)])
    assert measure("silence", waveform=wave)["silence_ratio"] == pytest.approx(0.4, abs=0.01)
    assert measure("silence", waveform=torch.zeros(RATE))["silence_ratio"] == 1
    assert measure("silence", waveform=wave, silence_db=-120)["silence_ratio"] == pytest.approx(0.2, abs=0.01)
    assert math.isnan(measure("silence", waveform=torch.zeros(100))["silence_ratio"])


@pytest.mark.parametrize("highest", [900.0, 2000.0, 4000.0, 7000.0])
def test_bandwidth_is_where_the_sound_ends(highest: float) -> None:
    wave = noise(2.0, highest=highest) + 1e-5 * noise(2.0, seed=1)
    assert measure("bandwidth", waveform=wave)["bandwidth"] == pytest.approx(highest, abs=80)
    assert measure("bandwidth", waveform=1e-3 * wave)["bandwidth"] == pytest.approx(highest, abs=80)  # not of the level


def test_bandwidth_of_nothing() -> None:
    assert measure("bandwidth", waveform=torch.zeros(RATE))["bandwidth"] == 0
    assert measure("bandwidth", waveform=torch.full((RATE,), 0.3))["bandwidth"] < 100  # a constant is no sound


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


def test_shots_are_counted() -> None:
    scenes = [torch.rand(3, 1, 72, 128, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in range(3)]
    frames = torch.cat([scene.expand(3, 20, 72, 128) for scene in scenes], dim=1)
    assert measure("shots", frames)["shot_count"] == 3
    assert measure("shots", frames[:, :20])["shot_count"] == 1


def test_what_is_not_there_is_not_measured() -> None:
    config = ScoreConfig()
    for name in NAMES[:8]:
        (score,) = make_scores([name], config)
        blind = score(Decoded(None, noise(2.0), 24.0))
        deaf = score(Decoded(torch.zeros(3, 49, 64, 64), None, 24.0))
        assert any(all(map(math.isnan, values.values())) for values in (blind, deaf)), name


def test_speech_scores_on_natural_clips(real_clips: Path) -> None:
    found = {}
    for name in ("psychopy_jwp_intro_talk.mp4", "mdn_stream_of_water.mp4"):
        with open_media(real_clips / name) as media:
            wave = media.sound(media.audio_start, 3 * RATE)
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

        def __call__(self, decoded: Decoded) -> dict[str, float]:
            raise ValueError("odd content")

    broken: Score = Broken()
    with pytest.raises(DataError, match="broken failed.*odd content"):
        Measure([broken]).one(broken, Decoded(None, None, 24.0))


def test_loudness_reaches_its_target() -> None:
    wave = 0.05 * torch.from_numpy(np.sin(2 * np.pi * 997 * np.arange(4 * RATE) / RATE)).float()
    before = lufs(wave)
    assert before == pytest.approx(20 * math.log10(0.05) - 3.01, abs=0.3)  # BS.1770: a 997 Hz sine at 0 dBFS has -3.01
    gain = gain_db(wave, before, -23.0)
    assert lufs(wave * 10 ** (gain / 20)) == pytest.approx(-23.0, abs=0.05)
    assert float((wave * 10 ** (gain_db(wave, before, -1.0) / 20)).abs().max()) == pytest.approx(0.99, abs=1e-3)
    assert gain_db(torch.zeros(RATE), lufs(torch.zeros(RATE)), -23.0) == 0
    assert gain_db(1e-5 * wave, -120.0, -23.0) == 30  # noise is not raised without limit
