"""Score a trained model's synchronization: it generates clips, and impacts are detected in decoded pixels and sound.

    mova sync-score checkpoint=learn-sync/easy/runs/seed-0 dataset=learn-sync/easy/test out=scores.json

Three tasks on held-out synthetic clips: sound for a given picture, a picture for a given sound (without its first
frame, which would tell more), and both from the first frame. `bridge=false` cuts the Bridge; then only chance
remains. `voices`: an impact counts only with the right pitch (clips of kind "juggle"). `samples`: a folder for some of
the clips as mp4.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import MISSING
from rich.progress import Progress
from torch import Tensor
from torchaudio.functional import resample

from core.compose import Schema
from core.errors import RunError
from core.program import Call, Program
from core.ranges import bounded, seed_field
from data.batch import MASK_CHANNELS, pad_text
from data.codec import EncoderConfig, check_codec
from data.dataset.index import DatasetIndex
from data.media import SAMPLE_RATE
from data.sync.impacts import Agreement, Impact, agreement, impacts_heard, impacts_seen
from model.joint import Velocities
from model.sampler import SamplerConfig, sample
from tools.sample import codecs_of_run, write_mp4
from train.checkpoint.checkpoint import read_state
from train.generate import WholeField, as_trained, find_checkpoint, load_model
from train.objective.noise import generator
from train.parallel.mesh import Layout, ParallelConfig, make_layout, start_process_group

TASKS = ("video to audio", "audio to video", "joint")


@dataclass
class SyncScoreConfig:
    """The clips to generate and score.

    checkpoint: a run's folder (its newest checkpoint) or one checkpoint
    dataset: of synthesized clips
    out: file of the scores, .json
    tasks: which of them are generated and scored
    clips: number of clips, the first ones of the dataset; 0: all
    batch: number of clips at a time
    seed: of the noise
    voices: an impact counts only with the right pitch
    bridge: false: the Bridge is cut
    weights: raw, or ema for the average; null: the average if the run keeps one
    samples: folder for some of the generated clips, .mp4
    """

    checkpoint: str = MISSING
    dataset: str = MISSING
    out: str = MISSING
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    clips: int = bounded(0, "[0, inf)")
    batch: int = bounded(16, "[1, inf)")
    seed: int = seed_field()
    voices: bool = False
    bridge: bool = True
    weights: str | None = None
    samples: str | None = None
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(steps=25, text_scale=1.0))
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.tasks) - set(TASKS))
        if unknown:
            raise ValueError(f"tasks={self.tasks}: choose from {', '.join(TASKS)}")


def without_bridge(model: Callable[..., Velocities]) -> Callable[..., Velocities]:
    """The same field with the Bridge cut."""

    def field(**inputs: Any) -> Velocities:
        return model(**{**inputs, "bridge_scale": torch.zeros_like(inputs["bridge_scale"])})

    return field


def score(config: SyncScoreConfig, layout: Layout) -> dict[str, Agreement]:
    """Each task's agreement of picture and sound. The same on every rank. RunError, DataError."""
    path = find_checkpoint(Path(config.checkpoint))
    state = read_state(path)
    index = DatasetIndex.open(Path(config.dataset))
    codecs = codecs_of_run(state["config"], config.encoder, layout.device, state.get("encoders"))
    for codec in (codecs.video, codecs.audio, codecs.text):
        check_codec(codec, index.encoders, f"dataset {index.storage}", config.encoder)
    model, run = load_model(path, config.parallel, layout, config.weights)
    config = replace(config, sampler=as_trained(config.sampler, run))
    velocities: Callable[..., Velocities] = WholeField(model, layout)
    if not config.bridge:
        velocities = without_bridge(velocities)
    count = min(config.clips or len(index), len(index))
    empty = pad_text(index.empty_text().float(), model.config.text_length)
    found: dict[str, Agreement] = {}
    with Progress(disable=not layout.first) as progress:
        bar = progress.add_task("sampling", total=len(config.tasks) * count)
        for task in config.tasks:
            seen: list[list[Impact]] = []
            heard: list[list[Impact]] = []
            for first in range(0, count, config.batch):
                rows = range(first, min(first + config.batch, count))
                video, audio, fps = _generate(
                    velocities, model.config.experts, config, index, rows, task, empty, layout
                )
                for row, latents, sound in zip(rows, video, audio, strict=True):
                    pixels = codecs.video.decode(latents[None])[0]
                    rate = codecs.audio.sample_rate
                    waveform = codecs.audio.decode(sound.T[None], round(pixels.shape[1] / fps * rate))[0]
                    seen.append(impacts_seen(pixels, fps, config.voices))
                    heard.append(impacts_heard(resample(waveform, rate, SAMPLE_RATE), config.voices))
                    if config.samples is not None and row < 4 and layout.first:
                        name = f"{task.replace(' ', '-')}-{row}.mp4"
                        write_mp4(Path(config.samples) / name, pixels, waveform, fps, rate)
                progress.advance(bar, len(rows))
            found[task] = agreement(seen, heard)
    index.close()
    return found


def _generate(
    velocities: Callable[..., Velocities],
    experts: tuple[str, ...],
    config: SyncScoreConfig,
    index: DatasetIndex,
    rows: range,
    task: str,
    empty: Tensor,
    layout: Layout,
) -> tuple[Tensor, Tensor, float]:
    """Latents (video [B, 16, T, H, W], audio [B, 128, La]) for some clips, on the CPU, and frames a second."""
    clips = [index.read_clip(row) for row in rows]
    if any(clip.video is None or clip.audio is None for clip in clips):
        raise RunError(f"dataset {config.dataset}: every clip must have picture and sound")
    device = layout.device
    video = torch.stack([clip.video.float() for clip in clips if clip.video is not None]).to(device)
    audio = torch.stack([clip.audio.T.float() for clip in clips if clip.audio is not None]).to(device)
    frames = torch.stack([clip.condition.float() for clip in clips if clip.condition is not None]).to(device)
    mask = torch.zeros(len(clips), MASK_CHANNELS, *video.shape[2:], device=device)
    mask[:, :, 0] = 1
    condition = torch.cat((mask, frames), dim=1)
    if task == "audio to video":
        condition = torch.zeros_like(condition)
    noises = [
        torch.stack([
            torch.from_numpy(generator(config.seed, f"{task}/{name}", row).standard_normal(like.shape[1:], "float32"))
            for row in rows
        ]).to(device)
        for name, like in (("video", video), ("audio", audio))
    ]  # fmt: skip
    text = empty.to(device).expand(len(clips), *empty.shape)
    fps = index.bucket_of(rows[0]).fps
    made_video, made_audio = sample(
        velocities,
        config.sampler,
        noises[0],
        noises[1],
        condition,
        text,
        empty.to(device),
        experts,
        fps,
        video if task == "video to audio" else None,
        audio if task == "audio to video" else None,
    )
    assert made_video is not None and made_audio is not None
    return made_video.float().cpu(), made_audio.float().cpu(), fps


def _begin() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))


def _run(call: Call[SyncScoreConfig]) -> None:
    config = call.config
    device = start_process_group()
    try:
        layout = make_layout(config.parallel, device)
        found, first = score(config, layout), layout.first
    finally:
        dist.destroy_process_group()
    if first:
        content = {task: {**asdict(result), "f1": result.f1} for task, result in found.items()}
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        Path(config.out).write_text(json.dumps(content, indent=2) + "\n")
        for task, result in found.items():
            print(
                f"{task:<15} F1 {result.f1:.3f} (chance {result.chance:.3f}): {result.matched} matched of "
                f"{result.seen} seen and {result.heard} heard; sound {1000 * result.offset:+.0f} ms"
            )


PROGRAM = Program(
    "sync-score", __doc__, _run, schema=Schema("sync_score", SyncScoreConfig, (("encoder", None),)), before=_begin
)

if __name__ == "__main__":
    PROGRAM.start()
