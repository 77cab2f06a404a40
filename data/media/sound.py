"""Sound by time: decoded from the start on (a seek breaks what a codec carries over), mono, at the rates asked for.

The position of a frame of sound is given by its timestamp; the samples since the last correction are counted, and the
count is compared with every timestamp. As long as they differ by at most TOLERANCE of the coarser of the container's
tick and a millisecond, which is the rounding of timestamps, nothing is done, and since the count is compared with the
timestamp itself, no error accumulates. A single timestamp with which the next one disagrees is passed over (some
containers misplace a frame where the codec changes its block size). Another difference that appears at once is a hole
(filled with silence, to the tick) or sound that is there twice (the first counts). One that has grown slowly is a clock
that runs differently: the frame is stretched by a few samples, which is not heard.

Each run of sound without a hole and at one rate and layout is resampled by itself and placed by its own start, so
nothing that happens in a file moves what follows. One pass of decoding feeds the resamplers of all rates.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torchaudio
from torch import Tensor

from data.errors import DataError
from data.media.open import open_container

SAMPLE_RATE = 16000  # Hz of sound where nobody asks for another rate: what speech and synchronization are judged by
TOLERANCE = 1.5  # of the larger of the container's tick and MILLISECOND
MILLISECOND = 0.001  # s: many files carry the timestamps of a container that counts in these
STRETCH = 0.01  # share of a frame's samples by which it is stretched at most
BLOCK = 1.0  # s of sound that is resampled at a time
KEPT = 30.0  # s of sound before the last request that a reader keeps
MANY = 8  # channels from which on av can't take planes apart
UNNAMED = {"1 channels": "mono", "2 channels": "stereo", "6 channels": "5.1"}  # what containers without names mean
CANCELS = 0.4  # a mix of less power than this share of what its strongest channel alone contributes cancels


@dataclass
class SoundPiece:
    """Samples [channels, n] of one rate and layout; start: seconds; joined: follows the piece before without a hole."""

    start: float
    samples: np.ndarray
    rate: int
    layout: str
    joined: bool


@dataclass
class Mix:
    """How channels become one: a weight for each; channel: its name where one was taken instead of a mix."""

    weights: np.ndarray
    channel: str | None = None


@dataclass
class SoundFacts:
    """What one pass over all sound has found. span: (start, end) in seconds; mixes: by layout."""

    span: tuple[float, float]
    mixes: dict[str, Mix]
    filled: float = 0.0  # s of holes
    dropped: float = 0.0  # s of sound that was there twice
    stretched: float = 0.0  # s by which sound was stretched or shrunk to follow its timestamps
    formats: list[str] = field(default_factory=list)  # rates and layouts in the order of their appearance


@dataclass
class DecodedSound:
    """A frame as it comes: time in seconds, None where the file says nothing; samples [channels, n]."""

    time: float | None
    samples: np.ndarray
    rate: int
    layout: str


class SoundTimeline:
    """Gives decoded frames their places; see the module. `filled`, `dropped`, `stretched`: seconds, so far."""

    def __init__(self, tick: float):
        self.tolerance = TOLERANCE * max(tick, MILLISECOND)
        self.filled = self.dropped = self.stretched = 0.0
        self._origin, self._count, self._rate, self._layout = 0.0, 0, 0, ""
        self._off = 0.0  # s by which the timestamp of the frame before differed from the count
        self._held: DecodedSound | None = None

    def add(self, frame: DecodedSound | None) -> Iterator[SoundPiece]:
        """The next frame, None after the last one; gives the one before, which is judged by this one too."""
        held, self._held = self._held, frame
        if held is not None and (piece := self._put(held, frame)) is not None:
            yield piece

    def _put(self, frame: DecodedSound, following: DecodedSound | None) -> SoundPiece | None:
        """None when all of it was there before."""
        samples, rate = frame.samples, frame.rate
        joined = (rate, frame.layout) == (self._rate, self._layout)
        counted = self._origin + self._count / self._rate if self._rate else frame.time or 0.0
        off = 0.0 if frame.time is None else frame.time - counted
        jumped = abs(off - self._off) > self.tolerance
        after = following.time if following is not None else None
        if jumped and after is not None and abs(after - counted - samples.shape[1] / rate) <= self.tolerance:
            off = 0.0  # the next timestamp agrees with the count: this one alone is wrong
        if off < -self.tolerance and jumped:  # there twice
            cut = min(samples.shape[1], round(-off * rate))
            samples, off = samples[:, cut:], 0.0
            self.dropped += cut / rate
            if samples.shape[1] == 0:
                self._off = 0.0
                return None
        elif off > self.tolerance and jumped:
            self.filled += off
            counted, off, joined = counted + off, 0.0, False
        elif abs(off) > self.tolerance:
            samples, moved = _stretched(samples, round(off * rate))
            self.stretched += abs(moved) / rate
            off -= moved / rate
        if not joined:
            self._origin, self._count, self._rate, self._layout = counted, 0, rate, frame.layout
        start = self._origin + self._count / rate
        self._count += samples.shape[1]
        self._off = off
        return SoundPiece(start, samples, rate, frame.layout, joined)


def _stretched(samples: np.ndarray, by: int) -> tuple[np.ndarray, int]:
    """Samples [channels, n] drawn out to n + by, as far as STRETCH allows; and by how many it was."""
    count = samples.shape[1]
    most = int(STRETCH * count)
    by = max(-most, min(most, by))
    if by == 0:
        return samples, 0
    at = np.linspace(0, count - 1, count + by)
    return np.stack([np.interp(at, np.arange(count), one) for one in samples]).astype(np.float32), by


class SoundFile:
    """The sound of one file, decoded from the start as often as it is asked for. damaged: (start, end) in seconds."""

    def __init__(self, path: Path, stream: int):
        self.path, self.stream = path, stream
        self.damaged: list[tuple[float, float]] = []
        self.timeline = SoundTimeline(0.0)

    def pieces(self) -> Iterator[SoundPiece]:
        """All sound in order. A packet that can't be decoded leaves a hole, and its time in `damaged`."""
        self.damaged = []
        with open_container(self.path, only=self.stream) as container:
            stream = container.streams[self.stream]
            self.timeline = SoundTimeline(float(stream.time_base))
            convert = _Planar()
            bad: float | None = None  # where a packet could not be decoded
            end: float | None = None  # of what could be
            for packet in container.demux(stream):
                try:
                    frames = stream.codec_context.decode(packet if packet.size else None)
                except av.FFmpegError:
                    bad = end if bad is None else bad
                    continue
                for frame in frames:
                    time = float(frame.pts * frame.time_base) if frame.pts is not None else None
                    if bad is not None:
                        self.damaged.append((bad, max(bad + 0.001, time or bad)))
                        bad = None
                    end = (time if time is not None else end or 0.0) + frame.samples / frame.sample_rate
                    layout = UNNAMED.get(frame.layout.name, frame.layout.name)
                    yield from self.timeline.add(DecodedSound(time, convert(frame), frame.sample_rate, layout))
            yield from self.timeline.add(None)
            if bad is not None:
                self.damaged.append((bad, float("inf")))

    def survey(self) -> SoundFacts | None:
        """One pass over all sound; None when there is none. DataError for NaN and inf."""
        first: float | None = None
        end = 0.0
        power: dict[str, np.ndarray] = {}  # by layout: of each channel, and of the mix
        formats: list[str] = []
        for piece in self.pieces():
            first = piece.start if first is None else first
            end = piece.start + piece.samples.shape[1] / piece.rate
            if (words := f"{piece.rate} Hz {piece.layout}") not in formats[-1:]:
                formats.append(words)
            mono = mix_weights(piece.layout, len(piece.samples)) @ piece.samples
            found = np.array([*(np.einsum("ct,ct->c", piece.samples, piece.samples)), mono @ mono], np.float64)
            power[piece.layout] = power.get(piece.layout, 0.0) + found
        if first is None:
            return None
        if not all(np.isfinite(one).all() for one in power.values()):
            raise DataError(f"{self.path}: NaN or inf in the sound")
        mixes = {layout: choose_mix(layout, one) for layout, one in power.items()}
        timeline = self.timeline
        return SoundFacts((first, end), mixes, timeline.filled, timeline.dropped, timeline.stretched, formats)


class _Planar:
    """Frames as float32 arrays [channels, n]."""

    def __init__(self) -> None:
        self._of: tuple[str, str, int] | None = None
        self._resampler: Any = None

    def __call__(self, frame: Any) -> np.ndarray:
        channels = frame.layout.nb_channels
        if frame.format.name == "fltp" and channels < MANY:
            values: np.ndarray = frame.to_ndarray()
            return values
        of = (frame.format.name, frame.layout.name, frame.sample_rate)
        if of != self._of:
            self._of = of
            self._resampler = av.AudioResampler(format="flt", layout=frame.layout, rate=frame.sample_rate)
        frame.pts = None
        parts = [part.to_ndarray()[0] for part in self._resampler.resample(frame)]
        return np.concatenate([*parts, np.zeros(0, np.float32)]).reshape(-1, channels).T


@lru_cache(maxsize=64)
def mix_weights(layout: str, channels: int) -> np.ndarray:
    """[channels] of libswresample's mix to mono; of two channels that are uncorrelated it keeps the power."""
    unit = np.eye(64, channels, dtype=np.float32).reshape(1, -1)
    probe = av.AudioFrame.from_ndarray(unit, format="flt", layout=layout)
    probe.sample_rate = 48000
    mixed = av.AudioResampler(format="fltp", layout="mono", rate=48000).resample(probe)
    return np.concatenate([part.to_ndarray()[0] for part in mixed])[:channels].astype(np.float32)


def choose_mix(layout: str, power: np.ndarray) -> Mix:
    """The mix of a layout; the loudest channel alone where they cancel. power: of the channels, then of the mix."""
    channels = len(power) - 1
    weights = mix_weights(layout, channels)
    alone = weights.astype(np.float64) ** 2 * power[:-1]
    if channels == 1 or power[-1] >= CANCELS * alone.max():
        return Mix(weights)
    loudest = int(power[:-1].argmax())
    return Mix(np.eye(channels, dtype=np.float32)[loudest], av.AudioLayout(layout).channels[loudest].name)


class Resampler:
    """Mono sound in parts, from `rate` to `target` Hz; what comes out is the same as of the whole at once (windowed
    sinc)."""

    def __init__(self, rate: int, target: int = SAMPLE_RATE):
        ratio = Fraction(rate, target).limit_denominator(1000)  # exact for all usual rates, else to a millionth
        self._same, self._in, self._out = rate == target, ratio.numerator, ratio.denominator
        width = int(np.ceil(7 * self._in / min(self._in, self._out))) + 1
        self._margin = self._in * -(-width // self._in)
        self._block = self._in * max(1, round(BLOCK * rate / self._in))
        self._held: list[np.ndarray] = []
        self._count, self._before = 0, 0  # samples held; how many of them have come out

    def push(self, samples: np.ndarray) -> Iterator[Tensor]:
        """What can be given out after these samples [n]."""
        self._held.append(samples)
        self._count += len(samples)
        while self._count >= self._before + self._block + self._margin:
            held = np.concatenate(self._held)
            yield self._convert(held[: self._before + self._block + self._margin], self._block)
            keep = self._before + self._block - self._margin
            held, self._before = held[max(0, keep) :], min(self._before + self._block, self._margin)
            self._held, self._count = [held], len(held)

    def flush(self) -> Iterator[Tensor]:
        """The rest."""
        if self._count > self._before:
            yield self._convert(np.concatenate(self._held), None)
        self._held, self._count, self._before = [], 0, 0

    def _convert(self, held: np.ndarray, count: int | None) -> Tensor:
        wave = held.astype(np.float32, copy=False)
        if not self._same:  # in numpy, as one product: torch's threads cost far more than so little work
            kernel, width = _sinc(self._in, self._out)
            padded = np.pad(wave, (width, width + self._in))
            parts = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[0])[:: self._in].copy()
            wave = np.matmul(parts, kernel).ravel()[: -(-len(wave) * self._out // self._in)]
        first = self._before * self._out // self._in
        last = None if count is None else first + count * self._out // self._in
        return torch.from_numpy(np.ascontiguousarray(wave[first:last]))


@lru_cache(maxsize=16)
def _sinc(rate_in: int, rate_out: int) -> tuple[np.ndarray, int]:
    """torchaudio's windowed sinc: (kernel [taps, rate_out], samples by which it reaches back)."""
    made = torchaudio.transforms.Resample(rate_in, rate_out)
    return np.ascontiguousarray(made.kernel[:, 0].numpy().T), made.width


class SoundReader:
    """Mono sound at some rates by position, sample 0 at the start of the sound. Holds some KEPT seconds of each."""

    def __init__(self, sound: SoundFile, facts: SoundFacts, rates: Sequence[int] = (SAMPLE_RATE,)):
        self._sound, self._facts = sound, facts
        self._tracks = {rate: _Track(rate, round((facts.span[1] - facts.span[0]) * rate)) for rate in rates}
        self._blocks: Iterator[tuple[int, int, Tensor]] | None = None

    def close(self) -> None:
        """Free the decoder."""
        self._blocks = None
        for track in self._tracks.values():
            track.held.clear()

    def length(self, rate: int = SAMPLE_RATE) -> int:
        """Samples of all sound at one of the rates."""
        return self._tracks[rate].length

    def read(self, first: int, count: int, rate: int = SAMPLE_RATE) -> Tensor:
        """[count] from a position on at one of the rates, which may lie outside the sound: silence."""
        track = self._tracks[rate]
        if self._blocks is None or first < track.floor:
            self._blocks = self._decode()
            for one in self._tracks.values():
                one.begin()
        last = first + count
        while track.end < min(last, track.length) and (block := next(self._blocks, None)) is not None:
            self._tracks[block[0]].add(*block[1:])
            for one in self._tracks.values():
                one.forget(first / rate)
        return track.cut(first, last)

    def _decode(self) -> Iterator[tuple[int, int, Tensor]]:
        """(rate, position, block); the blocks of a rate rise and don't overlap."""
        tracks = list(self._tracks.values())
        for piece in self._sound.pieces():
            begins = not piece.joined or any(track.resampler is None for track in tracks)
            mono = self._facts.mixes[piece.layout].weights @ piece.samples
            for track in tracks:
                if begins:
                    yield from track.close_run()
                    track.begin_run(piece.rate, piece.start - self._facts.span[0])
                yield from track.push(mono)
        for track in tracks:
            yield from track.close_run()


class _Track:
    """The sound at one rate: what is held of it, and where the next block goes. floor: the first position that can
    still be read; end: where the last block ends; length: samples in all."""

    def __init__(self, rate: int, length: int):
        self.rate, self.length = rate, length
        self.begin()

    def begin(self) -> None:
        """Forget everything: decoding starts anew."""
        self.held: deque[tuple[int, Tensor]] = deque()
        self.floor = self.end = 0
        self.resampler: Resampler | None = None
        self._position = self._overlap = 0

    def begin_run(self, rate: int, start: float) -> None:
        """A run of sound at `rate` begins `start` seconds after the sound's start; what is there already stays."""
        free = self._position
        self.resampler = Resampler(rate, self.rate)
        self._position = round(start * self.rate)
        self._overlap = max(0, free - self._position)

    def push(self, mono: np.ndarray) -> Iterator[tuple[int, int, Tensor]]:
        """The blocks that these samples [n] of the run complete."""
        assert self.resampler is not None, "no run has begun"
        for block in self.resampler.push(mono):
            yield self.rate, self._position + self._overlap, block[self._overlap :]
            self._position += len(block)
            self._overlap = 0

    def close_run(self) -> Iterator[tuple[int, int, Tensor]]:
        """The rest of the run."""
        for block in self.resampler.flush() if self.resampler is not None else ():
            yield self.rate, self._position, block
            self._position += len(block)

    def add(self, position: int, block: Tensor) -> None:
        self.held.append((position, block))
        self.end = position + len(block)

    def forget(self, seconds: float) -> None:
        """Drop what ends KEPT seconds before this time, or before the last block."""
        wanted = min(round(seconds * self.rate), self.end) - KEPT * self.rate
        while self.held and self.held[0][0] + len(self.held[0][1]) < wanted:
            position, dropped = self.held.popleft()
            self.floor = position + len(dropped)

    def cut(self, first: int, last: int) -> Tensor:
        """[last - first] of what is held, silence where nothing is."""
        out = torch.zeros(last - first)
        for position, block in self.held:
            begin, end = max(first, position), min(last, position + len(block))
            if begin < end:
                out[begin - first : end - first] = block[begin - position : end - position]
        return out
