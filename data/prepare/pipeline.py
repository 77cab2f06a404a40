"""One file through all stages: probe, window, decode, score, filter, encode. Writing is the parent's
(data.prepare.unit).

What a file gives depends only on its content and the settings: not on the number of workers, nor on the other files.
Whatever a stage raises is the verdict on its window, or on its file, and the work goes on with the next.
"""

import errno
import hashlib
import io
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from data.clip import Bucket, EncodedClip
from data.codec import CodecError, Codecs, EncoderConfig
from data.errors import DataError
from data.prepare.encode_server import Client, serve
from data.prepare.spool import EncodedWindow, FileResult, OutputError, Spool, Thumbnail, WindowResult
from data.prepare.stages import Decode, Encode, EncodeJob, Measure, Probe
from data.scores import ScoreConfig, make_scores, rates_of
from data.scores.decoded import DecodedWindow
from data.sources import SourceFile, SourceSegment
from data.sources.content import fetched, hash_file
from data.sources.verdict import reason_of
from data.windows.filter import Filter, FilterConfig
from data.windows.table import External
from data.windows.window import Geometry, Window, WindowConfig, WindowStage

THUMBNAIL = 160  # columns of the report's pictures
PEAKS = 160  # bars of the report's waveforms
SHOWN = 2  # windows of a file that the report may show
WAITED = "wait for {} (wall)"  # of `FileResult.cpu`: no processor time; what was waited for
FULL = (errno.ENOSPC, errno.EDQUOT)
MOST_WINDOWS = 100_000  # of a file: 55 hours of windows of 2 s; what declares more has lost its clock


@dataclass
class PipelineConfig:
    """All that decides what a file gives. manifest_columns: scores that its rows bring; external: a table; device:
    where the encoders compute; server: the address of the process that has it (data/prepare/encode_server.py), one of
    `servers`; fingerprints: of the codecs (empty: they are asked, which reads their weights)."""

    buckets: list[Geometry]
    window: WindowConfig = field(default_factory=WindowConfig)
    scores: list[str] = field(default_factory=list)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    manifest_columns: list[str] = field(default_factory=list)
    external: str = ""
    loudness: float | None = None
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    device: str = "cpu"
    fingerprints: dict[str, str] = field(default_factory=dict)
    servers: list[str] = field(default_factory=list)
    server: str = ""


class Stages:
    """Processor time by stage, and the stage that is at work: it is named when it fails."""

    def __init__(self, cpu: dict[str, float]):
        self.cpu, self.current = cpu, ""

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the processor time of a stage."""
        begin, self.current = time.process_time(), stage
        try:
            yield
        finally:
            self.cpu[stage] = self.cpu.get(stage, 0.0) + time.process_time() - begin


class Pipeline:
    """The stages with their settings. DataError for a setting that can't be met."""

    def __init__(self, config: PipelineConfig):
        self.config = config
        self.window = WindowStage(config.window, config.buckets)
        self.measure = Measure(
            make_scores(config.scores, config.score), config.score.min_speech, config.score.skip_failed
        )
        codecs, self._client = Codecs(config.encoder, config.device), None
        if config.server:
            self._client = Client(config.server)
            serve(codecs, self._client)
        self.probe = Probe(sorted({codecs.audio.sample_rate, *rates_of(self.measure.scores)}))
        self.decode = Decode()
        self.encode = Encode(config.loudness, codecs, config.fingerprints or codecs.fingerprints)
        self.external = External(config.external) if config.external else None
        own = [column for score in self.measure.scores for column in score.columns]
        brought = [*config.manifest_columns, *(self.external.columns if self.external else ())]
        if both := sorted({column for column in brought if column in own or brought.count(column) > 1}):
            raise DataError(f"the score {both[0]} has two sources; rename the column in the manifest or the table")
        self.columns = [*own, *brought]
        self.filter = Filter(config.filters, self.columns)

    def versions(self) -> dict[str, Any]:
        """Every stage and score with its version: another one gives another dataset."""
        stages = (self.probe, self.window, self.decode, self.measure, self.filter, self.encode)
        versions: dict[str, Any] = {stage.name: stage.version for stage in stages}
        return versions | {
            f"score/{score.name}": [score.version, getattr(score, "fingerprint", "")] for score in self.measure.scores
        }

    def run(self, source: SourceFile, spool: Spool, alive: Callable[[int, int], None]) -> FileResult:
        """Put all windows of one file into `spool`. alive: told (windows done, windows in all) before each step.

        Nothing is raised for a bad file: the reason is in what is returned. OutputError when the disk is full.
        """
        result = FileResult(sha256=source.sha256)
        if all(segment.reason for segment in source.segments):
            result.refused = [(one.span[0] if one.span else None, one.reason) for one in source.segments]
            return result
        stages = Stages(result.cpu)
        copy = spool.path.with_name(f"{spool.path.name}.source")
        try:
            alive(0, 0)
            with fetched(source.path, source.size, copy, lambda: alive(0, 0)) as path:
                source = replace(source, path=path)
                before = _stamp(source)
                with stages.timed("probe"):
                    source.sha256 = result.sha256 = source.sha256 or hash_file(path, source.size)[1]
                    media = self.probe(source)
                with media:
                    self._segments(source, media, spool, alive, result, stages)
                if _stamp(source) != before:
                    raise DataError("it changed while it was read; prepare it again when it is complete")
        except (OutputError, CodecError):
            raise
        except BaseException as error:  # the panics of Rust, a library's SystemExit too
            return FileResult(_reason(error, source, stages), span=result.span, cpu=result.cpu, sha256=result.sha256)
        return result

    def _segments(
        self,
        source: SourceFile,
        media: Any,
        spool: Spool,
        alive: Callable[[int, int], None],
        result: FileResult,
        stages: Stages,
    ) -> None:
        """All windows of all segments; what can't be used of one costs nothing of the others."""
        result.span = media.span[1] - media.span[0]
        shortest = min(bucket.seconds for bucket in self.config.buckets)
        if not result.span / shortest <= MOST_WINDOWS:
            raise DataError(
                f"it claims to last {result.span:.0f} s, more than {MOST_WINDOWS} windows: its timestamps are wrong"
            )
        keys: set[str] = set()
        waiting = _Waiting()
        for number, segment in enumerate(source.segments):
            alive(result.windows, 0)
            start = segment.span[0] if segment.span else None
            windows, reason = self._cut(source, media, segment, result, stages)
            if reason:
                result.refused.append((start, reason))
            for done, window in enumerate(windows):
                alive(done, len(windows))
                key = window_key(source.sha256, window)
                if key in keys:
                    result.refused.append((window.start, "the same window as of an earlier row of this file"))
                    continue
                keys.add(key)
                if waiting.filled(self.encode.batch, window.geometry):
                    self._encode(waiting, spool, stages)
                waiting.windows.append(self._window(source, media, number, window, key, stages, result.windows < SHOWN))
                result.windows += 1
            self._encode(waiting, spool, stages)

    def _cut(
        self, source: SourceFile, media: Any, segment: SourceSegment, result: FileResult, stages: Stages
    ) -> tuple[list[Window], str]:
        """The windows of a segment, or why there are none."""
        reason = segment.reason
        if segment.span and not reason and segment.span[0] >= media.span[1]:
            reason = f"the segment begins at {segment.span[0]:g} s, the file ends at {media.span[1]:.3f} s"
        if reason:
            return [], reason
        with stages.timed("window"):
            cut = self.window(media, source.sha256, segment.span)
        result.rest_seconds += cut.rest_seconds
        if cut.windows:
            return cut.windows, ""
        shortest = min(bucket.seconds for bucket in self.config.buckets)
        short = cut.span < shortest - 0.5 / self.config.buckets[0].fps
        reason = "is shorter than a window" if short else "no window fits the rule"
        return [], f"the segment {reason}" if segment.span else reason

    def _window(
        self, source: SourceFile, media: Any, number: int, window: Window, key: str, stages: Stages, shown: bool
    ) -> tuple[WindowResult, EncodeJob | None]:
        """What a window gave, and what is to be encoded of it."""
        geometry = window.geometry
        row: dict[str, Any] = {
            "key": key, "source": source.name, "source_sha256": source.sha256, "start": window.start,
            "seconds": geometry.seconds, "frames": geometry.frames, "height": geometry.height, "width": geometry.width,
            "kind": window.kind, "has_video": False, "has_audio": False, "part": "", "stored": False, "failed": "",
            "reason": "", "unmeasured": "", "scores": dict(source.segments[number].scores),
        }  # fmt: skip
        result = WindowResult(row, number)
        try:
            return result, self._judge(source, media, window, result, stages, shown)
        except (OutputError, CodecError):
            raise
        except BaseException as error:
            row["reason"] = _reason(error, source, stages)
        return result, None

    def _judge(
        self, source: SourceFile, media: Any, window: Window, result: WindowResult, stages: Stages, shown: bool
    ) -> EncodeJob | None:
        """Decode, score and filter a window; None when it is not to be stored."""
        row, key = result.row, result.row["key"]
        scores: dict[str, float] = row["scores"]
        if self.external is not None:
            scores |= self.external.lookup(key if self.external.by == "key" else source.name)
        with stages.timed("decode"):
            decoded = self.decode(media, window)
        row |= {"has_video": decoded.frames is not None, "has_audio": decoded.waveform is not None}
        dropping = self.filter if self.config.filters.drop else None
        row["unmeasured"], skipped = self.measure(decoded, scores, dropping, stages.timed)
        with stages.timed("filter"):
            failures = self.filter.failures(scores, skipped)
        row["failed"] = "; ".join(failures)
        if shown:
            result.thumbnail = _thumbnail(decoded)
        if failures and self.config.filters.drop:
            return None
        return EncodeJob(source, media, window, decoded, key, scores, dict(media.treatment))

    def _encode(self, waiting: "_Waiting", spool: Spool, stages: Stages) -> None:
        """Encode what waits, all at once, and put all waiting windows into `spool`, in their order."""
        jobs = waiting.jobs
        try:
            before = dict(self._client.waited) if self._client is not None else {}
            with stages.timed("encode"):
                clips = iter(self.encode(jobs) if jobs else [])
                for result, job in waiting.windows:
                    if job is not None:
                        _store(next(clips), job, result)
            if self._client is not None:
                for what, seconds in self._client.waited.items():
                    name = WAITED.format(what)
                    stages.cpu[name] = stages.cpu.get(name, 0.0) + seconds - before[what]
        except (OutputError, CodecError):
            raise
        except BaseException as error:
            for result, job in waiting.windows:
                if job is not None and not result.row["reason"]:
                    result.sample, result.row["stored"] = None, False
                    result.row["reason"] = _reason(error, job.source, stages)
        for result, _ in waiting.windows:
            spool.add(result)
        waiting.windows.clear()


@dataclass
class _Waiting:
    """Windows of one file in their order, those to be encoded with what it takes. Which are encoded together depends
    on the file alone."""

    windows: list[tuple[WindowResult, EncodeJob | None]] = field(default_factory=list)

    @property
    def jobs(self) -> list[EncodeJob]:
        return [job for _, job in self.windows if job is not None]

    def filled(self, batch: int, geometry: Geometry) -> bool:
        """Whether what waits is to be encoded before a window of this geometry comes."""
        jobs = self.jobs
        return not jobs or len(jobs) >= batch or jobs[0].window.geometry != geometry


def _store(clip: EncodedClip, job: EncodeJob, result: WindowResult) -> None:
    """Give a window its sample, or the reason why it has none."""
    if name := clip.not_finite():
        result.row["reason"] = f"NaN or inf in the latents of {name}"
        return
    if len(captions := job.source.segments[result.segment].captions) > 1:
        clip.meta["captions"] = captions
    result.sample = EncodedWindow(*clip.to_members(), Bucket.from_dict(clip.meta["bucket"]))
    result.row["stored"] = True


def window_key(sha256: str, window: Window) -> str:
    """Key of a sample: a hash of the source's content and of the window."""
    geometry = window.geometry
    identity = f"{sha256} {window.start:.6f} {geometry.frames} {geometry.fps:g} {geometry.height} {geometry.width}"
    return hashlib.sha256(identity.encode()).hexdigest()[:24]


def _stamp(source: SourceFile) -> tuple[int, int, int]:
    """What changes when somebody writes to the file. DataError when it is no longer what was listed."""
    found = os.stat(source.path)
    if source.size not in (0, found.st_size):
        raise DataError(f"it had {source.size} bytes when it was listed and has {found.st_size} now; prepare it again")
    return found.st_ino, found.st_size, found.st_mtime_ns


def _reason(error: BaseException, source: SourceFile, stages: Stages) -> str:
    """The verdict that an exception means. OutputError when it says that a disk is full: no fault of the file."""
    if isinstance(error, OSError) and error.errno in FULL and not isinstance(error, av.FFmpegError):
        raise OutputError(f"the disk is full ({error})") from error
    return reason_of(error, Path(source.path), stages.current)


def _thumbnail(decoded: DecodedWindow) -> Thumbnail:
    from PIL import Image

    jpeg, peaks = b"", []
    if decoded.frames is not None:
        frame = decoded.frames[:, decoded.frames.shape[1] // 2]
        height = max(1, round(frame.shape[1] * THUMBNAIL / frame.shape[2]))
        pixels = ((frame + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((THUMBNAIL, height)).save(buffer, "JPEG", quality=70)
        jpeg = buffer.getvalue()
    if decoded.waveform is not None:
        step = max(1, math.ceil(len(decoded.waveform) / PEAKS))
        padded = np.pad(decoded.waveform.abs().numpy(), (0, -len(decoded.waveform) % step))
        peaks = [round(float(peak), 3) for peak in padded.reshape(-1, step).max(axis=1).clip(0, 1)]
    return Thumbnail(jpeg, peaks)
