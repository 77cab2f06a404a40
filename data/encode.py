"""Source files -> encoded windows, in many processes, in one order.

What a file gives depends only on its content and the geometry: not on the number of workers, nor on the other files.
"""

import hashlib
import math
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from data.clip import Bucket, EncodedClip
from data.codec import audio, text, video
from data.decode import SAMPLE_RATE, Media, open_media
from data.errors import DataError


@dataclass
class Source:
    """One source file. name: its path below the source folder; reason: why it is refused before it is opened, or ""."""

    path: Path
    name: str
    sha256: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Geometry:
    """A window: frames (1 + 4k), frames per second, height and width in pixels."""

    frames: int
    fps: float
    height: int
    width: int

    @property
    def seconds(self) -> float:
        """Length of a window."""
        return self.frames / self.fps

    @property
    def samples(self) -> int:
        """Length of a window in sound samples."""
        return round(self.seconds * SAMPLE_RATE)

    def bucket(self, has_video: bool, has_audio: bool) -> Bucket:
        """The latent geometry of a window."""
        return Bucket(
            frames=1 + (self.frames - 1) // 4,
            height=self.height // 8,
            width=self.width // 8,
            audio_steps=audio.steps(self.samples),
            fps=float(self.fps),
            has_video=has_video,
            has_audio=has_audio,
        )


@dataclass
class Encoded:
    """What one file gave.

    samples: (key, safetensors, json, bucket); rejected: (window start, or None for the whole file; reason);
    rest_seconds: the end that is shorter than a window.
    """

    samples: list[tuple[str, bytes, bytes, Bucket]] = field(default_factory=list)
    rejected: list[tuple[float | None, str]] = field(default_factory=list)
    rest_seconds: float = 0.0


def hash_all(files: list[tuple[Path, str]]) -> list[Source]:
    """Read all files once for their SHA-256, in the order in which they will be stored.

    Unreadable files and copies of another file (whose samples would have the same keys) get a reason.
    """
    ordered = sorted(files, key=lambda file: hashlib.sha256(file[1].encode()).digest())  # mixes folders in each shard
    sources = [Source(path, name) for path, name in ordered]
    with _progress() as progress, ThreadPoolExecutor(4) as pool:
        for _ in progress.track(pool.map(_hash, sources), total=len(sources), description="hashing"):
            pass
    first: dict[str, str] = {}
    for source in sources:
        if not source.reason and first.setdefault(source.sha256, source.name) != source.name:
            source.reason = f"has the same content as {first[source.sha256]}"
    return sources


def encode_all(sources: list[Source], geometry: Geometry, workers: int) -> Iterator[tuple[Source, Encoded]]:
    """Each source with what it gave, in the order of `sources`. DataError when a worker dies."""
    workers = min(workers, len(sources))
    with _progress() as progress:
        task = progress.add_task("encoding", total=len(sources))
        if workers == 1:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # as in the workers: sums in another order would give other bits
            try:
                for source in sources:
                    yield source, encode_file(source, geometry)
                    progress.advance(task)
            finally:
                torch.set_num_threads(threads)
            return
        # torch's threads don't survive a fork, but importing it for every worker takes long: one clean process imports
        # it and is forked from
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["data.encode"])
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
        try:
            waiting: deque[tuple[Source, Future[Encoded]]] = deque()
            remaining = iter(sources)  # few are in flight: results are big
            while True:
                while len(waiting) < 2 * workers and (following := next(remaining, None)) is not None:
                    waiting.append((following, pool.submit(encode_file, following, geometry)))
                if not waiting:
                    return
                source, job = waiting.popleft()
                try:
                    result = job.result()
                except BrokenProcessPool as error:
                    names = ", ".join(str(entry.path) for entry, _ in [(source, job), *waiting])
                    raise DataError(
                        f"a worker died (out of memory, or a decoder crashed) at one of: {names}. Use fewer workers "
                        "(workers=1), or move the file away; then run the same command again"
                    ) from error
                yield source, result
                progress.advance(task)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def encode_file(source: Source, geometry: Geometry) -> Encoded:
    """All windows of one file. What can't be used is in `rejected`; nothing is raised for a bad file."""
    result = Encoded()
    if source.reason:
        result.rejected.append((None, source.reason))
        return result
    try:
        with open_media(source.path) as media:
            start, end = media.span
            # half a frame of tolerance: a last frame without declared duration is that much uncertain
            count = math.floor(((end - start) * geometry.fps + 0.5) / geometry.frames)
            result.rest_seconds = max(0.0, end - start - count * geometry.seconds)
            if count == 0:
                result.rejected.append((None, "is shorter than a window"))
            for number in range(count):
                window_start = start + number * geometry.seconds
                try:
                    result.samples.append(_encode_window(source, media, window_start, geometry))
                except DataError as error:
                    result.rejected.append((window_start, str(error)))
    except DataError as error:
        result.rejected.append((None, str(error)))
        result.samples.clear()
    return result


def encode_condition(first_frame: Tensor, frames: int) -> Tensor:
    """Latents [16, 1 + (frames - 1) / 4, h, w] of a first frame [3, H, W] followed by zero frames."""
    pixels = torch.zeros(3, frames, *first_frame.shape[1:])
    pixels[:, 0] = first_frame
    return video.encode(pixels)


def _encode_window(source: Source, media: Media, start: float, geometry: Geometry) -> tuple[str, bytes, bytes, Bucket]:
    latents = condition = sound = loudness = None
    if media.frame_times is not None:
        pixels = media.frames(start, geometry.frames, geometry.fps, geometry.height, geometry.width)
        latents = video.encode(pixels).bfloat16()
        condition = encode_condition(pixels[:, 0], geometry.frames).bfloat16()
    if media.audio is not None and _overlaps(media, start, geometry.seconds):
        waveform = media.sound(start, geometry.samples)
        sound = audio.encode(waveform).bfloat16()
        power = float(waveform.square().mean())
        loudness = round(10 * math.log10(power), 2) if power > 0 else None
    bucket = geometry.bucket(latents is not None, sound is not None)
    identity = f"{source.sha256} {start:.6f} {geometry.frames} {geometry.fps:g} {geometry.height} {geometry.width}"
    meta = {
        "fps": float(geometry.fps),
        "frames": geometry.frames,
        "height": geometry.height,
        "width": geometry.width,
        "seconds": geometry.seconds,
        "source": source.name,
        "source_sha256": source.sha256,
        "source_height": media.size[0],
        "source_width": media.size[1],
        "start": start,
        "scores": {},
        "loudness": loudness,  # root mean square of the window in dB of full scale
        "encoders": {"video": video.fingerprint, "audio": audio.fingerprint, "text": text.fingerprint},
        "bucket": bucket.to_dict(),
    }
    clip = EncodedClip(hashlib.sha256(identity.encode()).hexdigest()[:24], latents, sound, condition, meta)
    if name := clip.not_finite():
        raise DataError(f"NaN or inf in the latents of {name}")
    if latents is None and sound is None:
        raise DataError("neither picture nor sound in this window")
    return clip.key, *clip.to_members(), bucket


def _overlaps(media: Media, start: float, seconds: float) -> bool:
    """Whether the file's sound covers any of the window: silence before a late start is true, hours of it are not."""
    assert media.audio is not None
    return start < media.audio_start + len(media.audio) / SAMPLE_RATE and media.audio_start < start + seconds


def _start_worker() -> None:
    """One thread for sums (other numbers of threads give other bits), and no life after the parent's."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])  # ready when the process is gone, however it went: its workers would wait forever
    os._exit(1)


def _hash(source: Source) -> None:
    digest = hashlib.sha256()
    try:
        with open(source.path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    except OSError as error:
        source.reason = f"can't be read ({error})"
    source.sha256 = digest.hexdigest()


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("time left"),
        TimeRemainingColumn(),
    )
