"""One file through all stages: probe, window, decode, score, filter, encode. Writing is the parent's (data.unit).

What a file gives depends only on its content and the settings: not on the number of workers, nor on the other files.
"""

import hashlib
import io
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from data.clip import Bucket
from data.errors import DataError
from data.filter import Filter, FilterConfig
from data.scores import Decoded, ScoreConfig, make_scores
from data.source import Source
from data.stages import Decode, Encode, Measure, Probe
from data.table import External
from data.window import Geometry, Window, WindowConfig, WindowStage

THUMBNAIL = 160  # columns of the report's pictures
PEAKS = 160  # bars of the report's waveforms


@dataclass
class PipelineConfig:
    """All that decides what a file gives. manifest_columns: scores that its rows bring; external: a table."""

    buckets: list[Geometry]
    window: WindowConfig = field(default_factory=WindowConfig)
    scores: list[str] = field(default_factory=list)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    manifest_columns: list[str] = field(default_factory=list)
    external: str = ""
    loudness: float | None = None


@dataclass
class Thumbnail:
    """What the report shows of a window: a JPEG (b"" without picture), peaks of the sound (0 to 1)."""

    key: str
    jpeg: bytes
    peaks: list[float]


@dataclass
class Result:
    """What one file gave.

    samples: (key, safetensors, json, bucket); rows: all windows, as in data.table; rejected: (window start, None for
    the whole file; reason); span: seconds of the file; rest_seconds: what no window covers; cpu: seconds by stage.
    """

    samples: list[tuple[str, bytes, bytes, Bucket]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[tuple[float | None, str]] = field(default_factory=list)
    span: float = 0.0
    rest_seconds: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)
    thumbnails: list[Thumbnail] = field(default_factory=list)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the processor time of a stage."""
        begin = time.process_time()
        try:
            yield
        finally:
            self.cpu[stage] = self.cpu.get(stage, 0.0) + time.process_time() - begin


class Pipeline:
    """The stages with their settings. DataError for a setting that can't be met."""

    def __init__(self, config: PipelineConfig):
        self.config = config
        self.probe, self.decode, self.encode = Probe(), Decode(), Encode(config.loudness)
        self.window = WindowStage(config.window, config.buckets)
        self.measure = Measure(make_scores(config.scores, config.score))
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

    def run(self, source: Source) -> Result:
        """All windows of one file. What can't be used is in `rejected`; nothing is raised for a bad file."""
        result = Result()
        if source.reason:
            result.rejected.append((None, source.reason))
            return result
        try:
            with result.timed("probe"):
                media = self.probe(source)
            with media:
                result.span = media.span[1] - media.span[0]
                with result.timed("window"):
                    cut = self.window(media, source.sha256)
                result.rest_seconds = cut.rest_seconds
                if not cut.windows:
                    shortest = min(bucket.seconds for bucket in self.config.buckets)
                    short = result.span < shortest - 0.5 / self.config.buckets[0].fps
                    result.rejected.append((None, "is shorter than a window" if short else "no window fits the rule"))
                for window in cut.windows:
                    self._window(source, media, window, result)
        except DataError as error:
            return Result(rejected=[(None, str(error))], span=result.span, cpu=result.cpu)
        return result

    def _window(self, source: Source, media: Any, window: Window, result: Result) -> None:
        geometry = window.geometry
        key = window_key(source.sha256, window)
        row: dict[str, Any] = {
            "key": key, "source": source.name, "source_sha256": source.sha256, "start": window.start,
            "seconds": geometry.seconds, "frames": geometry.frames, "height": geometry.height, "width": geometry.width,
            "kind": window.kind, "has_video": False, "has_audio": False, "part": "", "stored": False, "failed": "",
            "reason": "", "scores": dict(source.scores),
        }  # fmt: skip
        result.rows.append(row)
        scores: dict[str, float] = row["scores"]
        if self.external is not None:
            scores |= self.external.lookup(key if self.external.by == "key" else source.name)
        try:
            with result.timed("decode"):
                decoded = self.decode(media, window)
            row |= {"has_video": decoded.frames is not None, "has_audio": decoded.waveform is not None}
            for score in self.measure.scores:
                with result.timed(f"score/{score.name}"):
                    scores |= self.measure.one(score, decoded)
            with result.timed("filter"):
                failures = self.filter.failures(scores)
            row["failed"] = "; ".join(failures)
            if len(result.thumbnails) < 2:
                result.thumbnails.append(_thumbnail(key, decoded))
            if failures and self.config.filters.drop:
                result.rejected.append((window.start, f"filtered: fails {row['failed']}"))
                return
            with result.timed("encode"):
                clip = self.encode(source, media, window, decoded, key, scores)
                bucket = Bucket.from_dict(clip.meta["bucket"])
                result.samples.append((key, *clip.to_members(), bucket))
            row["stored"] = True
        except DataError as error:
            row["reason"] = str(error)
            result.rejected.append((window.start, str(error)))


def window_key(sha256: str, window: Window) -> str:
    """Key of a sample: a hash of the source's content and of the window."""
    geometry = window.geometry
    identity = f"{sha256} {window.start:.6f} {geometry.frames} {geometry.fps:g} {geometry.height} {geometry.width}"
    return hashlib.sha256(identity.encode()).hexdigest()[:24]


def _thumbnail(key: str, decoded: Decoded) -> Thumbnail:
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
    return Thumbnail(key, jpeg, peaks)
