"""The clips that a watcher generates from each checkpoint, and the held-out clips that they are given."""

from __future__ import annotations

import json
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from core.errors import RunError
from core.ranges import bounded, seed_field
from core.run_dir import RunDir
from data.codec import Codecs, EncoderConfig, check_codec
from data.dataset.index import DatasetIndex
from data.windows.window import Geometry
from model.sampler import SamplerConfig
from tools.sample import Clip, comment_of, decode_clips, write_mp4
from train.monitor.samples import held_out_file
from train.parallel.mesh import ParallelConfig

KINDS = ("text", "image", "picture", "sound")


@dataclass
class WatchConfig:
    """The clips to generate from each checkpoint. Clips already in samples/ are not repeated.

    run: a run directory; `run=` may be omitted for the first argument
    every: steps between checkpoints that are sampled (0: each one; the last one always)
    kinds: inputs (text, image, picture, sound), for each of the first `clips` samples of the held-out set
    clips: number of samples of the held-out set
    prompts: further clips, from text alone
    seed: of the noise
    impacts: also measure impacts in picture and sound (tools/measures.py)
    sync_weights: also measure synchronization by this scorer
    poll: seconds between checks for new checkpoints
    patience: minutes without any activity of an unfinished run after which watching ends (a queued run shows none)
    """

    run: str = MISSING
    every: int = bounded(0, "[0, inf)")
    kinds: list[str] = field(default_factory=lambda: ["image"])
    clips: int = bounded(2, "[0, inf)")
    prompts: list[str] = field(default_factory=list)
    seed: int = seed_field()
    impacts: bool = False
    sync_weights: str | None = None
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    poll: float = bounded(10.0, "(0, inf)")
    patience: float = bounded(120.0, "(0, inf)")
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"kinds: {kind!r} is not one of {', '.join(KINDS)}")
        if not self.prompts and not (self.kinds and self.clips):
            raise ValueError("nothing to generate: give kinds and clips, or prompts")


@dataclass(frozen=True)
class ClipRequest:
    """One clip to generate from each checkpoint: `name` of its file, and its inputs."""

    name: str
    kind: str
    prompt: str
    source: str = ""
    given: str | None = None  # path of the held-out clip
    geometry: tuple[int, int, int, float] | None = None  # frames, height, width, fps; None: those of the run's data
    picture: bool | None = None  # whether it has one; None: as the run's data
    sound: bool | None = None


def geometry_keys(order: ClipRequest) -> dict[str, Any]:
    """Keys of SampleConfig."""
    if order.geometry is None:
        return {}
    return dict(zip(("frames", "height", "width", "fps"), order.geometry, strict=True))


def orders_of(config: WatchConfig, run: RunDir, codecs: Codecs) -> list[ClipRequest]:
    """The clips to generate from each checkpoint; writes the held-out clips that are given. RunError if there are
    none."""
    orders = [ClipRequest(f"prompt-{number}", "text", prompt) for number, prompt in enumerate(config.prompts)]
    if not config.kinds or not config.clips:
        return orders
    path = run.read_config()["data"].get("valid_path")
    if path is None:
        raise RunError(f"run {run.root.name!r} has no held-out set (data.valid_path): give kinds=[] and prompts=[...]")
    index = DatasetIndex.open(path)
    try:
        for codec in (codecs.video, codecs.audio, codecs.text):
            check_codec(codec, index.encoders, f"held-out set {index.storage}", config.encoder)
        buckets = [index.bucket_of(row) for row in range(len(index))]
        modalities = [(bucket.has_video, bucket.has_audio) for bucket in buckets]
        followed = max(
            (one for one in modalities if _kinds(config.kinds, *one)), key=lambda one: (sum(one), one), default=None
        )
        if followed is None:
            raise RunError(
                f"held-out set {path} has no clip for kinds=[{','.join(config.kinds)}]: image needs a picture, "
                "picture and sound need both; give other kinds, or kinds=[] and prompts=[...]"
            )
        for row in [row for row, one in enumerate(modalities) if one == followed][: config.clips]:
            key, caption, bucket = index.key(row), caption_of(index, row), buckets[row]
            given = str(_write_given(index, row, held_out_file(run.root, key), codecs))
            geometry = (1 + 4 * (bucket.frames - 1), 8 * bucket.height, 8 * bucket.width, bucket.fps)
            orders += [
                ClipRequest(f"{kind}-{key}", kind, caption, key, given, geometry, *followed)
                for kind in _kinds(config.kinds, *followed)
            ]
    finally:
        index.close()
    return orders


def _kinds(kinds: list[str], picture: bool, sound: bool) -> list[str]:
    """The `kinds` that a held-out clip supports; a modality that it lacks is not generated."""
    needs = {"text": True, "image": picture, "picture": picture and sound, "sound": picture and sound}
    return [kind for kind in kinds if needs[kind]]


def caption_of(index: DatasetIndex, row: int) -> str:
    """A sample's caption, "" if it is not available (a remote dataset, no captioner)."""
    if index.storage.remote or not index.captioners:
        return ""
    shard = index.shards[index.shard_of(row)]
    try:
        with tarfile.open(Path(index.root) / shard["text"][index.captioners[0]]) as file:
            member = file.extractfile(f"{index.key(row)}.json")
            return str(json.loads(member.read()).get("caption", "")) if member is not None else ""
    except (OSError, KeyError, ValueError, tarfile.TarError):
        return ""


def _write_given(index: DatasetIndex, row: int, path: Path, codecs: Codecs) -> Path:
    """Write a held-out clip as decoded from its latents: the model's input, and the reference for its clips."""
    if not path.exists():
        clip, bucket = index.read_clip(row), index.bucket_of(row)
        geometry = Geometry(1 + 4 * (bucket.frames - 1), bucket.fps, 8 * bucket.height, 8 * bucket.width)
        video = clip.video[None] if clip.video is not None else None
        audio = clip.audio.T[None] if clip.audio is not None else None
        write_whole(path, *decode_clips(video, audio, geometry, codecs))
    return path


def write_whole(path: Path, clip: Clip) -> None:
    partial = path.with_name(f".partial-{path.name}")
    try:
        write_mp4(partial, clip.pixels, clip.sound, clip.fps, clip.rate, comment_of(clip))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
