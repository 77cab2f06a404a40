"""Make clips with a trained model.

    python -m tools.sample checkpoint=runs/first prompt="A red ball bounces." out=sample.mp4
    python -m tools.sample checkpoint=runs/first/checkpoints/step-00002000 image=first.png out=sample.mp4
    python -m tools.sample checkpoint=runs/first sound_of=clip.mp4 out=sample.mp4      # audio to video
    torchrun --nproc-per-node 2 -m tools.sample parallel.ulysses=2 ...                 # shares the tokens of a clip

`checkpoint`: a checkpoint, or a run directory (its newest); `weights`: its "raw" ones, or "ema", their average over
training (null: ema where there is one). `image`: the first frame; `picture_of`, `sound_of`: media
files whose picture or sound is given, the other is made. Geometry (`frames`, `height`, `width`, `fps`) is that of the
run's data unless it is given. `count` clips come from seeds seed, seed + 1, ... The same seed gives the same clip under
every layout.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.distributed as dist
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from rich.progress import track
from torch import Tensor

from data.batch import MASK_CHANNELS, pad_text
from data.clip import AUDIO_CHANNELS, VIDEO_CHANNELS
from data.codec import audio as audio_codec
from data.codec import text as text_codec
from data.codec import video as video_codec
from data.decode import Media, open_media
from data.errors import DataError
from data.index import DatasetIndex
from data.stages import encode_condition
from data.synthesize import encode_mp4
from data.window import Geometry
from model.joint import JointTransformer
from model.sampler import SamplerConfig, sample
from tools.command import said_in_one_line
from train.errors import RunError
from train.generation import WholeField, find_checkpoint, load_model
from train.mesh import Layout, ParallelConfig, make_layout, start_process_group
from train.noise import generator


@dataclass
class SampleConfig:
    """conf/sample.yaml. Numbers of pixels and frames that are null are those of the run's data."""

    checkpoint: str = MISSING
    weights: str | None = None
    out: str = MISSING
    prompt: str = ""
    image: str | None = None
    picture_of: str | None = None
    sound_of: str | None = None
    count: int = 1
    seed: int = 0
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if self.picture_of is not None and self.sound_of is not None:
            raise ValueError("picture_of and sound_of are both given: nothing is left to make")
        if self.count < 1:
            raise ValueError(f"count is {self.count}; give the number of clips, 1 or more")


def geometry_of(config: SampleConfig, run: dict[str, Any]) -> Geometry:
    """Frames, size and rate of the clips: as asked, else as the run's data has them."""
    asked = (config.frames, config.fps, config.height, config.width)
    frames, fps, height, width = asked
    if frames is None or fps is None or height is None or width is None:
        path = run["data"].get("path")
        if path is None:
            raise RunError("the run mixes several datasets: give frames, fps, height and width")
        try:
            index = DatasetIndex.open(Path(path))
        except DataError as error:
            raise RunError(f"{error}; or give frames, fps, height and width, and no data is needed") from None
        check_codecs(index)
        bucket = index.bucket_of(0)
        frames, fps = frames or 1 + 4 * (bucket.frames - 1), fps or bucket.fps
        height, width = height or 8 * bucket.height, width or 8 * bucket.width
        index.close()
    if frames % 4 != 1 or height % 16 or width % 16:
        raise RunError(f"frames={frames} height={height} width={width}: frames are 1 + 4k, sizes multiples of 16")
    return Geometry(frames, fps, height, width)


def check_codecs(index: DatasetIndex) -> None:
    """RunError when the latents of a dataset are not those that can be decoded here."""
    known = {"video": video_codec.fingerprint, "audio": audio_codec.fingerprint, "text": text_codec.fingerprint}
    if index.encoders != known:
        raise RunError(f"dataset {index.place} was encoded by {index.encoders}; here only {known} can be decoded")


def noise_of(seed: int, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Starting noise [16, T, H, W] and [128, La] of one clip: a function of its seed alone."""
    bucket = geometry.bucket(True, True)
    shapes = {
        "video": (VIDEO_CHANNELS, bucket.frames, bucket.height, bucket.width),
        "audio": (AUDIO_CHANNELS, bucket.audio_steps),
    }
    noises = [generator(seed, f"sample/{name}", 0).standard_normal(shape, "float32") for name, shape in shapes.items()]
    return torch.from_numpy(noises[0]), torch.from_numpy(noises[1])


def make_clips(config: SampleConfig, layout: Layout) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """(pixels [3, F, H, W] in -1..1, sound [samples]) of each clip, and frames a second. The same on every rank."""
    return clips_of(
        *load_model(find_checkpoint(Path(config.checkpoint)), config.parallel, layout, config.weights), config, layout
    )


def clips_of(
    model: JointTransformer, run: dict[str, Any], config: SampleConfig, layout: Layout
) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """As `make_clips`, with a model that is loaded already; `run`: the config of its run."""
    geometry = geometry_of(config, run)
    given_video, given_audio, first_frame = _given(config, geometry)
    bucket, device = geometry.bucket(True, True), layout.device
    condition = torch.zeros(MASK_CHANNELS + VIDEO_CHANNELS, bucket.frames, bucket.height, bucket.width)
    if first_frame is not None:
        condition[:MASK_CHANNELS, 0] = 1
        condition[MASK_CHANNELS:] = encode_condition(first_frame, geometry.frames)
    dim, length = model.config.video.text_dim, model.config.text_length
    text, empty = (pad_text(text_codec.encode(words, dim).float(), length) for words in (config.prompt, ""))
    noises = [noise_of(config.seed + number, geometry) for number in range(config.count)]
    batch = lambda tensor: tensor.to(device).expand(config.count, *tensor.shape)  # noqa: E731
    bar = track(range(config.sampler.steps), "sampling", disable=not layout.first)
    ticks = iter(bar)

    def advance(_: int) -> None:
        next(ticks, None)

    video, audio = sample(
        WholeField(model, layout),
        config.sampler,
        torch.stack([noise for noise, _ in noises]).to(device),
        torch.stack([noise for _, noise in noises]).to(device),
        batch(condition),
        batch(text),
        empty.to(device),
        model.config.experts,
        geometry.fps,
        None if given_video is None else batch(given_video),
        None if given_audio is None else batch(given_audio),
        advance,
    )
    advance(0)  # ends the bar
    clips = []
    for latents, sound in zip(video.float().cpu(), audio.float().cpu(), strict=True):
        clips.append((video_codec.decode(latents), audio_codec.decode(sound.T, geometry.samples)))
    return clips, geometry.fps


def _given(config: SampleConfig, geometry: Geometry) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Latents of the given picture and sound, and pixels [3, H, W] of the first frame, where there are any."""
    video = audio = first = None
    if config.picture_of is not None:
        with open_media(Path(config.picture_of)) as media:
            pixels = _pixels(media, geometry, config.picture_of)
        video, first = video_codec.encode(pixels), pixels[:, 0]
    if config.sound_of is not None:
        with open_media(Path(config.sound_of)) as media:
            if media.audio is None:
                raise RunError(f"sound_of={config.sound_of} has no sound")
            audio = audio_codec.encode(media.sound(media.span[0], geometry.samples)).T
    if config.image is not None:
        with open_media(Path(config.image)) as media:
            first = _pixels(media, Geometry(1, geometry.fps, geometry.height, geometry.width), config.image)[:, 0]
    return video, audio, first


def _pixels(media: Media, geometry: Geometry, name: str) -> Tensor:
    if media.frame_times is None:
        raise RunError(f"{name} has no picture")
    return media.frames(media.span[0], geometry.frames, geometry.fps, geometry.height, geometry.width)


def write_mp4(path: Path, pixels: Tensor, sound: Tensor, fps: float) -> None:
    """An mp4 of pixels [3, F, H, W] in -1..1 and sound [samples] at 16 kHz."""
    frames = ((pixels.permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).contiguous().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    encode_mp4(path, list(frames), fps, sound.clamp(-1, 1).numpy(), audio_codec.SAMPLE_RATE)


def _run(config: SampleConfig) -> None:
    out = Path(config.out)
    if out.suffix != ".mp4":
        raise RunError(f"out={out}: give a file that ends in .mp4")
    device = start_process_group()
    try:
        layout = make_layout(config.parallel, device)
        clips, fps = make_clips(config, layout)
        first = layout.first
    finally:
        dist.destroy_process_group()
    for number, (pixels, sound) in enumerate(clips if first else []):
        path = out if config.count == 1 else out.with_name(f"{out.stem}-{number}.mp4")
        write_mp4(path, pixels, sound, fps)
        print(f"{path}: {pixels.shape[1]} frames of {pixels.shape[3]} x {pixels.shape[2]}, seed {config.seed + number}")


@hydra.main(version_base=None, config_path="pkg://conf", config_name="sample")
def main(config: DictConfig) -> None:
    """Entry point of `python -m tools.sample`."""
    with said_in_one_line("python -m tools.sample checkpoint=RUN out=FILE.mp4"):
        typed = OmegaConf.to_object(config)
        assert isinstance(typed, SampleConfig)
        _run(typed)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    ConfigStore.instance().store(name="sample_schema", node=SampleConfig)
    main()
