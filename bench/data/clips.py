"""Small files for testing decoders: frames show their own number, and the sound beeps.

A frame's number is encoded in 12 vertical bars, the lowest bit left; below it noise moves, so that frames depend on
each other.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

BARS, HEIGHT, WIDTH = 12, 64, 192


@dataclass(frozen=True)
class Case:
    """One file to be. times: "constant", or "variable" for frames at irregular times; gop: words for the table."""

    codec: str
    container: str
    rate: str
    gop: str
    options: dict[str, str] = field(default_factory=dict)
    pixels: str = "yuv420p"
    muxer: dict[str, str] = field(default_factory=dict)
    variable: bool = False
    size: tuple[int, int] = (HEIGHT, WIDTH)

    @property
    def name(self) -> str:
        """Of the file."""
        words = f"{self.codec} {self.rate} {self.gop}{' fragmented' if self.muxer else ''}"
        return words.replace(" ", "_").replace("/", "-").replace(",", "") + f".{self.container}"

    def times(self, frames: int) -> np.ndarray:
        """[frames] seconds at which the frames were meant to appear, from 0 on."""
        steps = np.ones(frames)
        if self.variable:
            steps = np.random.default_rng(3).choice([1, 1, 1, 2, 3, 7], frames)
        return np.concatenate([[0], np.cumsum(steps)[:-1]]) / float(Fraction(self.rate))


def x264(gop: str, **options: str) -> tuple[str, dict[str, str]]:
    """Words and options of a GOP structure."""
    return gop, {"preset": "veryfast", "crf": "20", "threads": "1", **options}


def x265(gop: str, parameters: str) -> tuple[str, dict[str, str]]:
    """Words and options of a GOP structure."""
    return gop, {"preset": "ultrafast", "x265-params": f"log-level=error:pools=1:frame-threads=1:{parameters}"}


H264 = {
    "closed 250": x264("closed 250", g="250"),
    "closed 48, 2 B": x264("closed 48, 2 B", g="48", bf="2"),
    "closed 12, no B": x264("closed 12, no B", g="12", bf="0"),
    "open 24, pyramid": x264(
        "open 24, pyramid", g="24", bf="3", **{"x264-params": "open-gop=1:b-pyramid=normal:scenecut=0"}
    ),
    "intra refresh": x264("intra refresh", g="24", bf="0", **{"x264-params": "intra-refresh=1"}),
}
HEVC = {
    "open 24, pyramid": x265("open 24, pyramid", "keyint=24:min-keyint=24:bframes=4:b-pyramid=1:open-gop=1"),
    "closed 30": x265("closed 30", "keyint=30:min-keyint=30:bframes=3:open-gop=0"),
    "defaults": x265("defaults", "bframes=4"),
}
FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
I_AND_P = {"g": "12", "bf": "0", "q:v": "3", "qscale": "3"}
WITH_B = {"g": "12", "bf": "2", "qmin": "1", "qmax": "4"}


def cases() -> list[Case]:
    """All files of the table."""
    found = [Case("libx264", "mp4", rate, *H264["closed 48, 2 B"]) for rate in ("12", "24000/1001", "30", "60")]
    found += [Case("libx264", "mp4", "25", *H264[gop]) for gop in H264]
    found += [
        Case("libx264", one, "24", *H264["open 24, pyramid"])
        for one in ("mkv", "mov", "ts", "flv", "avi", "mpg", "wmv")
    ]
    found += [Case("libx264", one, "24", *H264["closed 12, no B"]) for one in ("ts", "flv", "avi", "mkv", "asf")]
    found += [Case("libx264", one, "30", *H264["intra refresh"]) for one in ("mkv", "ts")]
    found += [
        Case("libx264", "mp4", "24", *H264[gop], muxer=FRAGMENTED) for gop in ("closed 48, 2 B", "open 24, pyramid")
    ]
    found += [Case("libx264", one, "60", *H264["closed 12, no B"], variable=True) for one in ("mp4", "mkv")]
    found += [Case("libx264", "mp4", "60", *x264("closed 48, 2 B VFR", g="48", bf="2"), variable=True)]
    found += [Case("libx265", one, "24", *HEVC["open 24, pyramid"]) for one in ("mp4", "mkv", "ts")]
    found += [Case("libx265", "mp4", "30000/1001", *HEVC[gop]) for gop in ("closed 30", "defaults")]
    found += [Case("libx265", "mp4", "24", *HEVC["open 24, pyramid"], muxer=FRAGMENTED)]
    fast = {"deadline": "realtime", "cpu-used": "8", "b:v": "1M", "g": "24"}
    found += [Case("libvpx", one, "30", "closed 24", fast) for one in ("webm", "mkv")]
    found += [Case("libvpx", "webm", "24", "closed 24, altref", fast | {"auto-alt-ref": "1", "lag-in-frames": "12",
                                                                         "deadline": "good"})]  # fmt: skip
    found += [Case("libvpx-vp9", one, "24", "closed 24, altref", fast | {"auto-alt-ref": "1", "lag-in-frames": "12",
                                            "deadline": "good"}) for one in ("webm", "mp4")]  # fmt: skip
    found += [Case("libsvtav1", one, "24", "closed 24", {"preset": "8", "g": "24", "svtav1-params": "lp=1",
                                                             "crf": "20"})
              for one in ("mp4", "mkv", "webm")]  # fmt: skip
    found += [Case("mpeg2video", one, rate, "open 12, 2 B", WITH_B)
              for one, rate in (("mkv", "24"), ("ts", "25"), ("mpg", "30000/1001"), ("mp4", "50"),
                            ("avi", "25"))]  # fmt: skip
    found += [
        Case("mpeg2video", "mkv", "24", "closed 12, 2 B", WITH_B | {"flags": "+cgop", "sc_threshold": "1000000000"})
    ]
    found += [Case("mpeg1video", "mpg", "25", "open 12, 2 B", WITH_B)]
    found += [Case("mpeg4", one, "24", "open 12, 2 B", WITH_B) for one in ("mp4", "mkv", "avi", "ts", "asf")]
    found += [Case("mpeg4", "avi", "25", "12, no B", I_AND_P)]
    found += [Case("msmpeg4", one, "24", "12, no B", I_AND_P) for one in ("mkv", "avi", "asf")]
    found += [Case("wmv2", one, "30", "12, no B", I_AND_P) for one in ("wmv", "avi")]
    found += [Case("wmv1", "asf", "25", "12, no B", I_AND_P)]
    found += [Case("flv", "flv", "30", "12, no B", I_AND_P), Case("h263p", "avi", "25", "12, no B", I_AND_P)]
    found += [Case("prores_ks", "mov", "24", "intra", pixels="yuv422p10le")]
    found += [
        Case("mjpeg", one, "25", "intra", {"qmin": "2", "qmax": "3"}, "yuvj420p") for one in ("avi", "mov", "mkv")
    ]
    found += [Case("ffv1", one, "24", "12", {"g": "12"}) for one in ("mkv", "avi")]
    found += [Case("dnxhd", "mov", "25", "intra", {"profile": "dnxhr_sq"}, "yuv422p", size=(128, 384))]
    found += [Case("huffyuv", "avi", "24", "intra", pixels="yuv422p"), Case("utvideo", "avi", "24", "intra")]
    return found


def picture(number: int, texture: np.ndarray) -> Any:
    """A yuv420p frame that shows its number in its upper half; `texture` moves through the lower one."""
    height, width = 2 * texture.shape[0], texture.shape[1]
    bits = np.arange(width) // (width // BARS)
    luma = np.broadcast_to((16 + 219 * (number >> bits & 1)).astype(np.uint8), (height, width)).copy()
    luma[height // 2 :] = np.roll(texture, number, axis=1)
    grey = np.full((height // 2, width), 128, np.uint8)
    return av.VideoFrame.from_ndarray(np.concatenate([luma, grey]), format="yuv420p")


def read_number(grey: np.ndarray) -> int:
    """The number that a picture [H, W] of 0 to 255 shows."""
    height, width = grey.shape
    upper = grey[height // 8 : height * 3 // 8].reshape(-1, BARS, width // BARS)
    levels = upper[:, :, width // BARS // 4 : -(width // BARS // 4)].mean(axis=(0, 2))
    return int(sum(1 << bit for bit, level in enumerate(levels) if level > 126))


def usual_scheduling() -> None:
    """Undo what the encoder of libsvtav1 does as root: it takes this process to real-time priority, and all threads and
    processes that come from it, whose waiting loops then keep each other from running."""
    for thread in os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else ():
        with contextlib.suppress(OSError):  # it has ended
            os.sched_setscheduler(int(thread), os.SCHED_OTHER, os.sched_param(0))


def write_clip(
    path: Path,
    case: Case,
    frames: int,
    sound: np.ndarray | None = None,
    numbers: Sequence[int] | None = None,
    sound_start: float = 0.0,
) -> Path:
    """The file of a case. sound: [samples] at 48 kHz, by the codec that fits the container, from `sound_start` seconds
    on; numbers: what is shown."""
    rate = Fraction(case.rate)
    texture = np.random.default_rng(0).integers(16, 235, (case.size[0] // 2, case.size[1]), dtype=np.uint8)
    with av.open(
        str(path), "w", options=case.muxer, format={"mpg": "vob", "wmv": "asf"}.get(case.container)
    ) as container:
        video: Any = container.add_stream(case.codec, rate=rate)
        video.height, video.width, video.pix_fmt = *case.size, case.pixels
        video.options, video.codec_context.thread_count = dict(case.options), 1
        base = 1 / rate
        audio: Any = None if sound is None else _add_sound(container, case.container)
        places = np.rint(case.times(frames) * float(rate)).astype(int)
        for number, place in enumerate(places):
            frame = picture(number if numbers is None else numbers[number], texture)
            if case.pixels != "yuv420p":
                frame = frame.reformat(format=case.pixels)
            frame.pts, frame.time_base = int(place), base
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None and sound is not None:
            write_sound(container, audio, sound, sound_start)
    if case.codec == "libsvtav1":
        usual_scheduling()
    return path


def _add_sound(container: Any, kind: str) -> Any:
    codecs = {"webm": "libopus", "avi": "pcm_s16le", "flv": "aac", "wmv": "wmav2", "asf": "wmav2", "mpg": "mp2"}
    rate = 44100 if kind == "flv" else 48000
    stream = container.add_stream(codecs.get(kind, "aac"), rate=rate, layout="stereo")
    stream.bit_rate = 128000
    return stream


def write_sound(container: Any, audio: Any, sound: np.ndarray, start: float = 0.0) -> None:
    """Encode [samples] at 48 kHz, the same on both channels, from `start` seconds on, and close the stream."""
    rate = audio.codec_context.sample_rate
    resampler = av.AudioResampler(format=audio.codec_context.format, layout="stereo", rate=rate,
                                  frame_size=audio.codec_context.frame_size or 1024)  # fmt: skip
    block = av.AudioFrame.from_ndarray(np.ascontiguousarray(np.stack([sound] * 2), np.float32), "fltp", "stereo")
    block.sample_rate, block.pts, block.time_base = 48000, round(start * 48000), Fraction(1, 48000)
    for part in [*resampler.resample(block), *resampler.resample(None)]:
        container.mux(audio.encode(part))
    container.mux(audio.encode(None))


def write_film(path: Path, seconds: int) -> Path:
    """A long film: one minute of small pictures with a beep a second, its packets repeated."""
    minute = path.with_name("minute.mp4")
    length = min(60, seconds)
    if not minute.exists() or length < 60:
        clock = np.arange(length * 48000) / 48000
        case = Case("libx264", "mp4", "24", *H264["closed 48, 2 B"])
        write_clip(minute, case, length * 24, 0.3 * np.sin(6000 * clock) * (clock % 1 < 0.05))
    with av.open(str(path), "w") as new:
        with av.open(str(minute)) as old:
            streams = {one.index: new.add_stream_from_template(one) for one in old.streams}
            packets = [(packet, packet.stream.index) for packet in old.demux() if packet.size]
        for turn in range(seconds // length):
            for packet, index in packets:
                copy = av.Packet(bytes(packet))
                base = packet.time_base
                assert base is not None and packet.pts is not None and packet.dts is not None
                if index == 1 and not 0 <= packet.pts * base < length:
                    continue  # of the sound's last frame a part is past the minute
                copy.pts, copy.dts = (int(one + turn * length / base) for one in (packet.pts, packet.dts))
                copy.time_base, copy.is_keyframe, copy.duration = base, packet.is_keyframe, packet.duration
                copy.stream = streams[index]
                new.mux(copy)
    minute.unlink()
    return path
