"""How well a trained model synchronizes: it generates, and impacts are found in the decoded pixels and sound alone.

    python -m tools.sync_score checkpoint=learn-sync/easy/runs/seed-0 dataset=learn-sync/easy/test out=scores.json

Three tasks on held-out synthetic clips: sound for a given picture, a picture for a given sound (without its first
frame, which would tell more), and both from the first frame. `bridge=false` cuts the Bridge; then nothing but chance
is left. `voices`: an impact counts only with the right pitch (clips of kind "juggle"). `samples`: a folder for some of
the clips as mp4.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.distributed as dist
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from rich.progress import Progress
from torch import Tensor

from data.batch import MASK_CHANNELS, pad_text
from data.codec import audio as audio_codec
from data.codec import video as video_codec
from data.index import DatasetIndex
from data.sync.impacts import Agreement, Impact, agreement, impacts_heard, impacts_seen
from model.joint import Velocities
from model.sampler import SamplerConfig, sample
from tools.command import said_in_one_line
from tools.sample import write_mp4
from train.errors import RunError
from train.generation import WholeField, find_checkpoint, load_model
from train.mesh import Layout, ParallelConfig, make_layout, start_process_group
from train.noise import generator

TASKS = ("video to audio", "audio to video", "joint")


@dataclass
class ScoreConfig:
    """conf/sync_score.yaml. The first `clips` clips of `dataset` (0: all), `batch` at a time."""

    checkpoint: str = MISSING
    dataset: str = MISSING
    out: str = MISSING
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    clips: int = 0
    batch: int = 16
    seed: int = 0
    voices: bool = False
    bridge: bool = True
    weights: str | None = None
    samples: str | None = None
    sampler: SamplerConfig = field(
        default_factory=lambda: SamplerConfig(steps=25, shift_video=2.0, shift_audio=2.0, text_scale=1.0)
    )
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


def score(config: ScoreConfig, layout: Layout) -> dict[str, Agreement]:
    """Each task's agreement of picture and sound. The same on every rank. RunError, DataError."""
    model, run = load_model(find_checkpoint(Path(config.checkpoint)), config.parallel, layout, config.weights)
    velocities: Callable[..., Velocities] = WholeField(model, layout)
    if not config.bridge:
        velocities = without_bridge(velocities)
    index = DatasetIndex.open(Path(config.dataset))
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
                    pixels = video_codec.decode(latents)
                    waveform = audio_codec.decode(sound.T)[: round(pixels.shape[1] / fps * audio_codec.SAMPLE_RATE)]
                    seen.append(impacts_seen(pixels, fps, config.voices))
                    heard.append(impacts_heard(waveform, config.voices))
                    if config.samples is not None and row < 4 and layout.first:
                        name = f"{task.replace(' ', '-')}-{row}.mp4"
                        write_mp4(Path(config.samples) / name, pixels, waveform, fps)
                progress.advance(bar, len(rows))
            found[task] = agreement(seen, heard)
    index.close()
    return found


def _generate(
    velocities: Callable[..., Velocities],
    experts: tuple[str, ...],
    config: ScoreConfig,
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
    video, audio = sample(
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
    return video.float().cpu(), audio.float().cpu(), fps


@hydra.main(version_base=None, config_path="pkg://conf", config_name="sync_score")
def main(config: DictConfig) -> None:
    """Entry point of `python -m tools.sync_score`."""
    with said_in_one_line("python -m tools.sync_score checkpoint=RUN dataset=FOLDER out=FILE"):
        typed = OmegaConf.to_object(config)
        assert isinstance(typed, ScoreConfig)
        device = start_process_group()
        try:
            layout = make_layout(typed.parallel, device)
            found, first = score(typed, layout), layout.first
        finally:
            dist.destroy_process_group()
        if first:
            content = {task: {**asdict(result), "f1": result.f1} for task, result in found.items()}
            Path(typed.out).parent.mkdir(parents=True, exist_ok=True)
            Path(typed.out).write_text(json.dumps(content, indent=2) + "\n")
            for task, result in found.items():
                print(
                    f"{task:<15} F1 {result.f1:.3f} (chance {result.chance:.3f}): {result.matched} matched of "
                    f"{result.seen} seen and {result.heard} heard; sound {1000 * result.offset:+.0f} ms"
                )


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    ConfigStore.instance().store(name="sync_score_schema", node=ScoreConfig)
    main()
