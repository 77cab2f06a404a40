"""A folder of every kind of bad media file: made by PyAV from a seed, nothing is downloaded.

Used by the bench of verdicts (bench.data.bad_files) and by the tests. Each file's name begins with its kind.
"""

from __future__ import annotations

import ctypes
import io
import os
import shutil
import signal
import socket
import struct
import tempfile
import time
import wave
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from data.prepare.pipeline import Pipeline
from data.prepare.spool import FileResult
from data.sources import SourceFile

FPS, FRAMES = 24, 40  # of the films that are damaged: 1.7 s, two windows of 17 frames
HEIGHT, WIDTH = 48, 64


def film(
    format: str = "mp4",
    codec: str | None = "libx264",
    sound: str | None = "aac",
    *,
    frames: int = FRAMES,
    rate: int = FPS,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    options: dict[str, str] | None = None,
    start: int = 0,
    seed: int = 0,
) -> bytes:
    """A small film as bytes; codec or sound None leaves that stream out."""
    generator = np.random.default_rng(seed)
    with (
        tempfile.NamedTemporaryFile() as file,
        av.open(file.name, "w", format=format, options=options or {}) as container,
    ):
        video: Any = container.add_stream(codec, rate=rate) if codec else None
        if video is not None:
            video.height, video.width, video.pix_fmt = *size, "yuv420p"
            video.gop_size = 12
        audio: Any = container.add_stream(sound, rate=48000, layout="mono") if sound else None
        for number in range(frames if video is not None else 0):
            picture = generator.integers(0, 255, (*size, 3), np.uint8) // 4 + np.uint8(number * 4 % 180)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = start + number, Fraction(1, rate)
            container.mux(video.encode(frame))
        if video is not None:
            container.mux(video.encode(None))
        if audio is not None:
            samples = round(frames / rate * 48000)
            tone = (0.3 * np.sin(np.arange(samples) / 17 + seed)).astype(np.float32)
            for at in range(0, samples, 1024):
                part = av.AudioFrame.from_ndarray(np.ascontiguousarray(tone[None, at : at + 1024]), "fltp", "mono")
                part.sample_rate, part.pts, part.time_base = 48000, at, Fraction(1, 48000)
                container.mux(audio.encode(part))
            container.mux(audio.encode(None))
        container.close()
        return Path(file.name).read_bytes()


def damaged(content: bytes, count: int, seed: int, begin: float = 0.5) -> bytes:
    """`count` random bytes from `begin` (share of the length) on."""
    place = int(len(content) * begin)
    noise = np.random.default_rng(seed).bytes(min(count, len(content) - place))
    return content[:place] + noise + content[place + len(noise) :]


def flipped(content: bytes, seed: int, within: slice, flips: int = 12) -> bytes:
    """Single bits flipped within a part."""
    out, generator = bytearray(content), np.random.default_rng(seed)
    for place in generator.integers(*within.indices(len(out))[:2], flips):
        out[place] ^= 1 << int(generator.integers(8))
    return bytes(out)


def sized(content: bytes, box: bytes, size: int) -> bytes:
    """An mp4 whose box of this name claims another size."""
    place = content.index(box) - 4
    return content[:place] + struct.pack(">I", size) + content[place + 4 :]


def counted(content: bytes, box: bytes, offset: int, count: int) -> bytes:
    """An mp4 in which a 32-bit number `offset` bytes behind the name of a box is another one."""
    place = content.index(box) + 4 + offset
    return content[:place] + struct.pack(">I", count) + content[place + 4 :]


def wav(kind: str, samples: np.ndarray, rate: int = 16000) -> bytes:
    """A wave file; kind: pcm (16 bit) or float."""
    if kind == "pcm":
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setparams((1, 2, rate, 0, "NONE", ""))
            file.writeframes((samples * 32767).astype("<i2").tobytes())
        return buffer.getvalue()
    data = samples.astype("<f4").tobytes()
    head = struct.pack("<HHIIHH", 3, 1, rate, 4 * rate, 4, 32)
    return b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + struct.pack("<I", 16) + head + (
        b"data" + struct.pack("<I", len(data)) + data
    )  # fmt: skip


def picture(format: str, frames: int = 1) -> bytes:
    """An image file."""
    images = [Image.fromarray(np.full((48, 64, 3), 40 * n % 255, np.uint8)) for n in range(frames)]
    buffer = io.BytesIO()
    images[0].save(buffer, format, **({"save_all": True, "append_images": images[1:]} if frames > 1 else {}))
    return buffer.getvalue()


def archive() -> bytes:
    """A zip file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("film.mp4", b"no film" * 500)
    return buffer.getvalue()


def _other_files(neighbour: Path) -> dict[str, bytes]:
    """What is called a film and is none. neighbour: as of `contents`."""
    return {
        "empty.mp4": b"",
        "one-byte.mp4": b"x",
        "zeros.mp4": bytes(100_000),
        "random.mp4": np.random.default_rng(1).bytes(50_000),
        "text.mp4": b"Not a film, but a few words.\n" * 99,
        "html.mp4": b"<!doctype html><html><body><h1>404 Not Found</h1></body></html>" * 20,
        "json.mp4": b'{"error": "expired"}',
        "xml.mp4": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "zip.mp4": archive(),
        "gzip.mp4": b"\x1f\x8b\x08\x00" + bytes(500),
        "elf.mp4": b"\x7fELF\x02\x01\x01" + bytes(900),
        "pdf.mp4": b"%PDF-1.4\n%" + bytes(900),
        "png.mp4": picture("PNG"),
        "jpeg.mp4": picture("JPEG"),
        "gif.mp4": picture("GIF", 12),
        "lfs-pointer.mp4": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
        "ffconcat.mp4": f"ffconcat version 1.0\nfile '{neighbour}'\n".encode(),
        "ffconcat-loop.mp4": b"ffconcat version 1.0\nfile 'ffconcat-loop.mp4'\n",
        "m3u8.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{neighbour}\n#EXT-X-ENDLIST\n".encode(),
        "m3u8-remote.mkv": b"#EXTM3U\n#EXTINF:9,\nhttp://127.0.0.1:9/film.ts\n#EXT-X-ENDLIST\n",
        "sdp.mp4": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n"
        b"a=rtpmap:96 H264/90000\n",
        "dash.mp4": b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"></MPD>',
        "subtitles.mp4": b"1\n00:00:01,000 --> 00:00:02,000\nHello.\n\n" * 20,
    }


def _sounds() -> dict[str, bytes]:
    """Sound alone, some of it with values that no sound has."""
    sound = 0.3 * np.sin(np.arange(32000) / 9)
    hole = sound.astype(np.float32)
    hole[9000:9100] = np.nan
    loud = sound.astype(np.float32) * np.float32(3e38)
    infinite = np.where(np.arange(len(sound)) == 7000, np.float32(np.inf), sound)
    return {
        "mp3.mp4": film("mp3", None, "mp3"),
        "wav.mp4": wav("pcm", sound),
        "wav-nan.mp4": wav("float", hole),
        "wav-infinite.mp4": wav("float", infinite),
        "wav-huge-values.mp4": wav("float", loud),
        "wav-size-lies.mp4": wav("pcm", sound).replace(struct.pack("<I", 64000), struct.pack("<I", 0xFFFFFFF0), 1),
        "wav-rate-zero.mp4": wav("pcm", sound, 1).replace(struct.pack("<II", 1, 2), struct.pack("<II", 0, 0), 1),
    }


def _odd_films() -> dict[str, bytes]:
    """Whole films of unusual sizes, rates and streams."""
    return {
        "sound-only.mp4": film(codec=None),
        "sound-tiny.mp4": film(codec=None, frames=1),
        "cover-only.mp4": film("mp3", None, "mp3")[:2000],
        "silent-film.mp4": film(sound=None),
        "one-frame.mp4": film(frames=1, sound=None),
        "two-frames.mkv": film("matroska", frames=2),
        "16x16.mp4": film(size=(16, 16)),
        "2x2.mkv": film("matroska", "ffv1", size=(2, 2), sound=None),
        "odd-size.mkv": film("matroska", "ffv1", size=(47, 61)),
        "wide.mp4": film(size=(16, 2000), frames=24, sound=None),
        "tall.mp4": film(size=(2000, 16), frames=24, sound=None),
        "1-hertz.mp4": film(rate=1, frames=6),
        "1000-hertz.mkv": film("matroska", rate=1000, frames=900),
        "starts-late.mkv": film("matroska", start=90_000),
    }


def contents(neighbour: Path) -> dict[str, bytes]:
    """Files by name. neighbour: a whole film that playlists try to include."""
    mp4, noisy = film(), film(frames=80, seed=3)
    fragmented = film(frames=240, options={"movflags": "frag_keyframe+empty_moov"}, size=(96, 128))
    fast = film(options={"movflags": "faststart"})
    mkv, avi = film("matroska"), film("avi", "mpeg4", "mp3")
    webm, stream = film("webm", "libvpx", "libopus"), film("mpegts", "mpeg2video", "mp2")
    files = {
        "whole.mp4": mp4,
        "whole.mkv": mkv,
        "whole.avi": avi,
        "whole.webm": webm,
        **_other_files(neighbour),
        **_sounds(),
        **_odd_films(),
        "moov-huge.mp4": sized(mp4, b"moov", 0xFFFFFFFF),
        "mdat-huge.mp4": sized(mp4, b"mdat", 0x7FFFFFFF),
        "mdat-zero.mp4": sized(mp4, b"mdat", 0),
        "moov-zero.mp4": sized(mp4, b"moov", 0),
        "moov-small.mp4": sized(mp4, b"moov", 20),
        "trak-huge.mp4": sized(mp4, b"trak", 0xFFFFFFF0),
        "bomb-stsz.mp4": counted(mp4, b"stsz", 8, 0x7FFFFFFF),
        "bomb-stts.mp4": counted(mp4, b"stts", 8, 0x7FFFFFFF),
        "bomb-ctts.mp4": counted(noisy, b"ctts", 8, 0x7FFFFFFF),
        "bomb-stco.mp4": counted(mp4, b"stco", 4, 0x1FFFFFFF),
        "bomb-stsc.mp4": counted(mp4, b"stsc", 4, 0x1FFFFFFF),
        "timescale-zero.mp4": counted(mp4, b"mdhd", 12, 0),
        "timescale-one.mp4": counted(mp4, b"mdhd", 12, 1),
        "timescale-most.mp4": counted(mp4, b"mdhd", 12, 0xFFFFFFFF),
        "duration-huge.mp4": counted(mp4, b"mdhd", 16, 0xFFFFFFF0),
        "frame-lasts-forever.mp4": counted(mp4, b"stts", 12, 0x7FFFFFFF),
        "moov-only.mp4": fast[: fast.index(b"mdat") + 4],
        "no-moov.mp4": mp4[: mp4.index(b"moov") - 4],
        "atoms-nested.mp4": mp4[:32] + struct.pack(">I4s", 4000, b"moov") * 400,
        "twice.mp4": noisy + noisy,
        "film-behind-garbage.mp4": bytes(3000) + film(seed=4),
        "garbage-behind-film.mp4": film(seed=5) + np.random.default_rng(6).bytes(9000),
        "codec-unknown.mp4": mp4.replace(b"avc1", b"xvxv"),
        "codec-other.mp4": mp4.replace(b"avc1", b"hvc1"),
        "sound-codec-other.mp4": mp4.replace(b"mp4a", b"alac"),
        "extradata-zero.mp4": _blank(mp4, b"avcC"),
        "esds-zero.mp4": _blank(mp4, b"esds"),
        "matroska-size-unknown.mkv": _blank(mkv, b"\x1f\x43\xb6\x75", 8, 0xFF),
        "avi-index-gone.avi": avi[: avi.index(b"idx1")],
        "transport-stream.mp4": stream,
        "transport-lost-sync.mp4": damaged(stream, 4000, 9, 0.3),
    }
    for share in (1, 10, 30, 50, 70, 90, 99):
        files[f"cut-{share}.mp4"] = fast[: len(fast) * share // 100]
        files[f"cut-{share}.mkv"] = mkv[: len(mkv) * share // 100]
    for seed in range(6):
        files[f"fragmented-noise-{seed}.mp4"] = damaged(fragmented, 4000, seed)
        files[f"mp4-noise-{seed}.mp4"] = damaged(noisy, 1500, seed, 0.1 + 0.15 * seed)
        files[f"header-bits-{seed}.mp4"] = flipped(fast, seed, slice(0, fast.index(b"mdat")))
        files[f"matroska-bits-{seed}.mkv"] = flipped(mkv, seed, slice(0, 600))
        files[f"avi-bits-{seed}.avi"] = flipped(avi, seed, slice(0, 900))
        files[f"webm-bits-{seed}.webm"] = flipped(webm, seed, slice(0, len(webm)), 60)
    return files


def names() -> list[bytes]:
    """Names that are awkward, each of a good film."""
    return [
        b"caf\xe9.mp4",
        "caf\N{LATIN SMALL LETTER E WITH ACUTE}.mp4".encode(),
        "\N{CLAPPER BOARD}\N{HIRAGANA LETTER A}.mp4".encode(),
        b"caf\\xe9.mp4",
        b"\xff\xfe\x80.mkv",
        b"a" * 251 + b".mp4",
        b"line\nbreak.mp4",
        b"tab\tand\x07bell\x1b[31mred.mp4",
        b"quote'\"`$(touch x);.mp4",
        b"<script>alert(1)<b>.mp4",
        b"-rf --help.mp4",
        b"[bold]markup[.mp4",
        b"%s %d {0} {name}.mp4",
        b" spaces .mp4",
        b"dots...in.name..mp4",
    ]


def make_folder(folder: Path) -> None:
    """Write all of it into an empty folder, with what is no file at all: links, folders, a FIFO, a socket."""
    (folder / "sub" / ("deep" * 40) / ("deeper" * 30)).mkdir(parents=True)
    whole = folder / "sub" / "neighbour.mp4"
    whole.write_bytes(film(seed=2))
    for name, content in contents(whole).items():
        (folder / name).write_bytes(content)
    for number, awkward in enumerate(names()):
        (folder / os.fsdecode(awkward)).write_bytes(film(seed=100 + number))
    (folder / "sub" / ("deep" * 40) / ("deeper" * 30) / "far.mp4").write_bytes(film(seed=90))
    shutil.copy(folder / "whole.mp4", folder / "copy.mp4")
    captions: dict[str, bytes] = {
        "caption-nested.json": b"[" * 200_000,
        "caption-not-utf8.txt": b"caf\xe9",
        "caption-half-letter.json": b'{"caption": "\\ud83d"}',
        "caption-number.json": b'{"caption": 3}',
        "caption-nul.txt": b"nul \x00 and bell \x07",
        "caption-broken.json": b"{",
        "caption-long.txt": b"word " * 100_000,
    }
    for number, (name, content) in enumerate(captions.items()):
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".mp4").write_bytes(film(seed=200 + number))
    (folder / "caption-folder.mp4").write_bytes(film(seed=300))
    (folder / "caption-folder.txt").mkdir()
    for number, name in enumerate(DEADLY):
        (folder / f"{name}.mp4").write_bytes(film(seed=400 + number))
    (folder / "folder.mp4").mkdir()
    (folder / "dangling.mp4").symlink_to("nowhere.mp4")
    (folder / "circle.mp4").symlink_to("circle.mp4")
    os.mkfifo(folder / "fifo.mp4")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket.mp4"))


def _blank(content: bytes, box: bytes, count: int = 16, value: int = 0) -> bytes:
    place = content.index(box) + len(box)
    return content[:place] + bytes([value]) * count + content[place + count :]


class _Panic(BaseException):
    """As a Rust library's panic: no Exception."""


def _panic() -> None:
    raise _Panic("called `Option::unwrap()` on a `None` value\nnote: run with RUST_BACKTRACE=1")


def _recurse() -> None:
    _recurse()


def _raise(error: BaseException) -> Callable[[], None]:
    def raises() -> None:
        raise error

    return raises


# what a stage does to its process, by name of the file
DEADLY: dict[str, Callable[[], Any]] = {
    "kills-segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "kills-bad-address": lambda: ctypes.string_at(8),
    "kills-abort": os.abort,
    "kills-out-of-memory": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "kills-exit": lambda: os._exit(3),
    "loops": lambda: [None for _ in iter(int, 1)],
    "sleeps": lambda: time.sleep(10**6),
    "raises-memory": _raise(MemoryError()),
    "raises-av-memory": _raise(av.error.MemoryError(12, "Cannot allocate memory", "x")),
    "raises-assertion": _raise(AssertionError("shape\nof the matter")),
    "raises-system-exit": _raise(SystemExit(0)),
    "raises-panic": _panic,
    "raises-recursion": _recurse,
    "raises-zero-division": _raise(ZeroDivisionError()),
    "raises-unicode": _raise(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")),
    "raises-overflow": _raise(OverflowError("int too large to convert to float")),
    "raises-stop-iteration": _raise(StopIteration()),
    "raises-keyboard-interrupt": _raise(KeyboardInterrupt()),
    "raises-no-such-file": _raise(FileNotFoundError(2, "No such file or directory", "weights")),
    "raises-odd-letters": _raise(ValueError("caf\udce9 \x1b[31m\x00")),
}


class DeadlyPipeline(Pipeline):
    """A pipeline whose stages do to their process what DEADLY says."""

    def run(self, source: SourceFile, *more: Any) -> FileResult:
        """As Pipeline.run, with a decoding stage that goes by the file's name."""
        decode, deed = self.decode, DEADLY.get(Path(source.path).stem)

        class Deadly:
            name, version = decode.name, decode.version

            def __call__(self, media: Any, window: Any) -> Any:
                return deed() if deed else decode(media, window)

        self.decode = Deadly()  # type: ignore[assignment]
        try:
            return super().run(source, *more)
        finally:
            self.decode = decode
