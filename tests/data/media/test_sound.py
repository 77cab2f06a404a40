"""Sound stays on the clock of its timestamps, whatever happens in the file."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import torchaudio

from data.errors import DataError
from data.media import SAMPLE_RATE, open_media
from data.media.sound import DecodedSound, Resampler, SoundFile, SoundTimeline

BEEPS = (0.5, 1.5, 2.5, 3.5)


def beeps(seconds: float, rate: int, at: tuple[float, ...] = BEEPS) -> np.ndarray:
    """[samples]: 50 ms of 1 kHz at each time."""
    time = np.arange(round(seconds * rate)) / rate
    on = sum(((time >= begin) & (time < begin + 0.05)).astype(float) for begin in at)
    return (0.5 * on * np.sin(2 * np.pi * 1000 * time)).astype(np.float32)


def write_sound(
    path: Path, parts: list[tuple[np.ndarray, int, float]], codec: str, lost: range = range(0), slip: float = 0.0
) -> Path:
    """Sound alone. parts: (samples [channels, n], rate, start in s); lost: packets left out; slip: random shift (s) of
    the timestamps."""
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream: Any = None
        number = 0
        for samples, rate, start in parts:
            layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(samples)]
            encoder: Any = av.CodecContext.create(codec, "w")
            encoder.sample_rate, encoder.layout, encoder.time_base = rate, layout, Fraction(1, rate)
            encoder.format = encoder.codec.audio_formats[0] if codec != "pcm_s16le" else "s16"
            if stream is None:
                stream = container.add_stream(codec, rate=rate, layout=layout)
                stream.codec_context.format = encoder.format
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples, np.float32), "fltp", layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            resampler = av.AudioResampler(encoder.format, layout, rate, frame_size=encoder.frame_size or 1024)
            packets = [packet for part in resampler.resample(frame) for packet in encoder.encode(part)]
            for packet in [*packets, *[one for part in resampler.resample(None) for one in encoder.encode(part)],
                           *encoder.encode(None)]:  # fmt: skip
                packet.stream, packet.time_base = stream, Fraction(1, rate)
                move = round((start + random.uniform(-slip, slip)) * rate)
                packet.pts, packet.dts = packet.pts + move, packet.pts + move
                number += 1
                if number - 1 not in lost:
                    container.mux(packet)
    return path


def onsets(path: Path) -> list[float]:
    """Times at which it begins to beep."""
    with open_media(path) as media:
        assert media.sound_span is not None
        sound = media.sound(0.0, round(media.sound_span[1] * SAMPLE_RATE)).numpy()
    loud = np.nonzero(np.abs(sound) > 0.1)[0] / SAMPLE_RATE
    return [float(loud[0]), *[float(b) for a, b in zip(loud, loud[1:], strict=False) if b - a > 0.2]]


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts", "mov"])
@pytest.mark.parametrize("lost", [range(40, 41), range(40, 42), range(30, 60)], ids=len)
def test_a_hole_moves_nothing(tmp_path: Path, container: str, lost: range) -> None:
    path = write_sound(tmp_path / f"a.{container}", [(beeps(4.0, 48000)[None], 48000, 0.0)], "aac", lost)
    with open_media(path) as media:
        assert media.treatment["sound_filled_seconds"] == pytest.approx(len(lost) * 1024 / 48000, abs=0.002)
    found = onsets(path)
    wanted = [one for one in BEEPS if not lost[0] * 1024 / 48000 - 0.1 < one < (lost[-1] + 2) * 1024 / 48000]
    origin = found[0] - BEEPS[0]  # ts has no word for the encoder's delay
    near = [min(abs(one - other - origin) for other in wanted) for one in found if one > 1.6]
    assert len(near) >= 2 and max(near) < 0.006, found


@pytest.mark.parametrize("slip", [0.0, 0.0004])
def test_rounded_timestamps_insert_nothing(tmp_path: Path, slip: float) -> None:
    wave = (0.4 * np.sin(2 * np.pi * 440 * np.arange(4 * 44100) / 44100)).astype(np.float32)
    path = write_sound(tmp_path / "a.mkv", [(wave[None], 44100, 0.0)], "pcm_s16le", slip=slip)
    with open_media(path) as media:
        assert media.sound_span is not None and "sound_filled_seconds" not in media.treatment
        sound = media.sound(media.sound_span[0], 4 * SAMPLE_RATE)
    whole = torchaudio.functional.resample(torch.from_numpy(wave), 44100, SAMPLE_RATE)
    assert float((sound - whole[: len(sound)]).abs().max()) < 2e-4  # 16 bits


def test_a_slow_clock_is_followed_without_clicks() -> None:
    """48 kHz by name, 47,952 by the timestamps: 3.6 s an hour."""
    timeline, end = SoundTimeline(0.001), 0.0
    pieces = []
    for number in range(6000):
        time = round(number * 1024 / 47952, 3)
        pieces += list(timeline.add(DecodedSound(time, np.ones((1, 1024), np.float32), 48000, "mono")))
        end = time
    assert all(piece.joined for piece in pieces[1:]) and timeline.filled == timeline.dropped == 0
    assert abs(pieces[-1].start + pieces[-1].samples.shape[1] / 48000 - end) < 0.002
    assert timeline.stretched == pytest.approx(end * 0.001, rel=0.05)


def test_sound_that_is_there_twice_counts_once() -> None:
    timeline = SoundTimeline(1 / 48000)
    times = [0.0, 0.02, 0.04, 0.04, 0.06, 0.05, 0.07, 0.09]  # a frame again, then all 10 ms early
    found = [piece for time in times
             for piece in timeline.add(DecodedSound(time, np.ones((1, 960), np.float32), 48000, "mono"))]  # fmt: skip
    found += list(timeline.add(None))
    edges = [(round(one.start, 4), round(one.start + one.samples.shape[1] / 48000, 4)) for one in found]
    assert all(a[1] == b[0] for a, b in zip(edges, edges[1:], strict=False)) and edges[-1][1] == 0.11


@pytest.mark.parametrize("second", [(1, 22050), (2, 32000), (1, 48000)])
def test_a_rate_or_layout_that_changes_stays_on_the_clock(tmp_path: Path, second: tuple[int, int]) -> None:
    channels, rate = second
    parts = [
        (np.stack([beeps(2.0, 44100, (0.5, 1.5))] * 2), 44100, 0.0),
        (np.stack([beeps(2.0, rate, (0.5, 1.5))] * channels), rate, 2.0 + 0.05),
    ]
    path = write_sound(tmp_path / "a.mkv", parts, "libmp3lame")
    found = onsets(path)
    assert len(found) == 4 and np.abs(np.array(found) - found[0] + 0.5 - [0.5, 1.5, 2.55, 3.55]).max() < 0.03, found
    with open_media(path) as media:
        assert len(media.treatment["sound_formats"]) >= 2


@pytest.mark.parametrize(
    ("gains", "taken"),
    [((1.0, -1.0), "FL"), ((-0.8, 1.0), "FR"), ((1.0, 1.0), None), ((1.0, 0.0), None), ((1.0, 0.3), None)],
)
def test_a_mix_that_cancels_takes_the_louder_channel(
    tmp_path: Path, gains: tuple[float, float], taken: str | None
) -> None:
    wave = beeps(2.0, 48000)
    path = write_sound(tmp_path / "a.mkv", [(np.stack([gain * wave for gain in gains]), 48000, 0.0)], "pcm_s16le")
    with open_media(path) as media:
        assert media.treatment.get("sound_channels", {}).get("stereo") == taken
        loud = float(media.sound(0.0, 2 * SAMPLE_RATE).abs().max())
    assert loud == pytest.approx(0.5 if taken else 0.5 * sum(gains) * 0.7071, rel=0.06)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000, 16000, 47998])
def test_resampling_in_parts_is_that_of_the_whole(rate: int) -> None:
    random = np.random.default_rng(0)
    wave = random.standard_normal(3 * rate + 17).astype(np.float32)
    resampler, parts, add = Resampler(rate), [], 0
    while add < len(wave):
        step = int(random.integers(1, 4000))
        parts += list(resampler.push(wave[add : add + step]))
        add += step
    found = torch.cat([*parts, *resampler.flush()])
    if rate == 47998:  # shares little with 16 kHz: the ratio is met to a millionth
        assert abs(len(found) - len(wave) * SAMPLE_RATE / rate) < 2
        return
    whole = torchaudio.functional.resample(torch.from_numpy(wave), rate, SAMPLE_RATE)
    assert len(found) == len(whole) and float((found - whole).abs().max()) < 1e-4  # of a signal whose peak is 4


def test_windows_in_any_order_hold_the_same_sound(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    wave = (0.1 * random.standard_normal(100 * 48000)).astype(np.float32)
    path = write_sound(tmp_path / "a.mp4", [(wave[None], 48000, 0.0)], "aac")
    with open_media(path) as media:
        assert media.sound_span is not None
        whole = torch.cat([*media.sound_blocks(7.0)])
        for start in (90.0, 3.0, 50.0, 51.0, 5.0, -1.0, 98.9):
            first = round((start - media.sound_span[0]) * SAMPLE_RATE)
            expected = torch.zeros(16000)
            inside = whole[max(0, first) : max(0, first + 16000)]
            expected[max(0, -first) : max(0, -first) + len(inside)] = inside
            assert torch.equal(media.sound(start, 16000), expected)


def test_one_pass_of_decoding_gives_every_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tone of 18 kHz is there at 48 kHz alone; a hole stays where it is at every rate."""
    times = np.arange(4 * 44100) / 44100
    wave = (0.2 * np.sin(2 * np.pi * 18000 * times) + 0.3 * np.sin(2 * np.pi * 440 * times)).astype(np.float32)
    path = write_sound(
        tmp_path / "a.mkv", [(wave[None, :88200], 44100, 0.0), (wave[None, 88200:], 44100, 3.0)], "pcm_s16le"
    )
    passes = []
    pieces = SoundFile.pieces
    monkeypatch.setattr(SoundFile, "pieces", lambda self: (passes.append(1), pieces(self))[1])
    with open_media(path, [48000]) as media:
        passes.clear()
        found = {rate: media.sound(0.0, 5 * rate, rate) for rate in (16000, 48000)}
        assert len(passes) == 1
        for rate, sound in found.items():
            alone = open_media(path, [rate])
            assert torch.equal(alone.sound(0.0, 5 * rate, rate), sound)
            alone.close()
            whole = torchaudio.functional.resample(torch.from_numpy(wave[:88200]), 44100, rate)
            assert float((sound[: 2 * rate - 99] - whole[: 2 * rate - 99]).abs().max()) < 2e-4
            assert float(sound[round(2.01 * rate) : round(2.99 * rate)].abs().max()) == 0
            spectrum = torch.fft.rfft(sound[:rate]).abs() / rate
            assert bool(spectrum[18000] > 0.05) if rate == 48000 else len(spectrum) == 8001


def test_nan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "n.mkv"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("pcm_f32le", rate=16000, layout="mono")
        wave = np.zeros((1, 16000), np.float32)
        wave[0, 9000] = np.nan
        frame = av.AudioFrame.from_ndarray(wave, "flt", "mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux([*stream.encode(frame), *stream.encode(None)])
    with pytest.raises(DataError, match="NaN or inf in the sound"):
        open_media(path)
