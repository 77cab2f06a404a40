"""Generate clips with a trained model.

    mova sample checkpoint=runs/first prompt="A red ball bounces." out=sample.mp4
    mova sample checkpoint=runs/first/checkpoints/step-00002000 image=first.png out=sample.mp4
    mova sample model=exported prompt="A red ball bounces." out=sample.mp4      # of mova export, or MOVA's
    mova sample checkpoint=runs/first sound_of=clip.mp4 out=sample.mp4      # audio to video
    mova sample checkpoint=runs/first sound=false prompt="A red ball." out=sample.mp4     # no sound at all
    torchrun --nproc-per-node 2 -m tools.sample parallel.ulysses=2 ...                 # shares the tokens of a clip

`checkpoint`: a checkpoint, or a run directory (its newest); `weights`: its "raw" ones, or "ema", their average over
training (null: ema if there is one). `model`: a folder of weights instead; its training.json replaces the
run, and without that file frames, fps, height and width must be given. `image`: the first frame; without one
`image_mode`: none, as training drops it, or white, as MOVA's own pipeline takes. `picture_of`, `sound_of`: media files
whose picture or sound is given, the other is generated. `picture`, `sound`: whether the clip has one (null: if the
run's data has it); a single modality comes from its tower alone, without the Bridge. Geometry (`frames`, `height`,
`width`, `fps`) is that of the run's data unless it is given; so are the sampler's shifts and boundary those of the
run's objective. `encoder.folder`: weights of the codecs that the run was trained with, if they are not built in
(docs/encoders.md); null: those in the folder `model` (video_vae, ...), if there are any. `count` clips come from seeds
seed, seed + 1, ... The same seed gives the same clip under every layout.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import MISSING
from rich.progress import track
from torch import Tensor

from core.compose import Schema
from core.errors import RunError
from core.program import Call, Program
from core.ranges import bounded, seed_field
from data.batch import MASK_CHANNELS, pad_text
from data.clip import AUDIO_CHANNELS, VIDEO_CHANNELS, Bucket
from data.codec import KINDS, Codecs, EncoderConfig, check_codec, codecs_of
from data.dataset.index import DatasetIndex
from data.errors import DataError
from data.media import Media, open_media, read_still
from data.synthesize import encode_mp4
from data.windows.window import Geometry
from model.joint import JointTransformer
from model.sampler import SamplerConfig, sample
from train.checkpoint.checkpoint import read_state
from train.generate import WholeField, as_trained, find_checkpoint, folder_config, load_folder, load_model
from train.objective.noise import generator
from train.parallel.mesh import Layout, ParallelConfig, make_layout, start_process_group

IMAGE_MODES = ("none", "white")


@dataclass(frozen=True)
class Clip:
    """pixels [3, F, H, W] in -1..1, `fps` frames a second, and sound [samples] at `rate` Hz; None for what it lacks.
    encoders: fingerprints of the codecs that decoded it."""

    pixels: Tensor | None
    sound: Tensor | None
    fps: float
    rate: int
    encoders: dict[str, str] = field(default_factory=dict)


@dataclass
class SampleConfig:
    """The clips to generate, and the weights.

    checkpoint: a run's folder (its newest checkpoint) or one checkpoint
    model: a folder of weights instead: of mova export, or MOVA's
    weights: raw, or ema for the average; null: the average if the run keeps one
    out: file of the clip, .mp4; several clips get a number each
    prompt: the caption
    image: the first frame: a picture (PNG, JPEG, WebP, BMP, TIFF), or a clip that begins with it
    image_mode: replacement for the image if none is given: none, as training drops it, or white, as MOVA's own
        pipeline does
    picture_of: a clip whose picture is given: its sound is generated
    sound_of: a clip whose sound is given: its picture is generated
    picture: false: sound alone
    sound: false: picture alone
    count: number of clips, with successive seeds
    seed: of the noise
    frames: of the clip, 1 + 4k; null: as in the run's data
    height: pixels; null: as in the run's data
    width: pixels; null: as in the run's data
    fps: frames per second; null: as in the run's data
    """

    checkpoint: str | None = None
    model: str | None = None
    weights: str | None = None
    out: str = MISSING
    prompt: str = ""
    image: str | None = None
    image_mode: str = "none"
    picture_of: str | None = None
    sound_of: str | None = None
    picture: bool | None = None
    sound: bool | None = None
    count: int = bounded(1, "[1, inf)")
    seed: int = seed_field()
    frames: int | None = bounded(None, "[1, inf)")
    height: int | None = bounded(None, "[1, inf)")
    width: int | None = bounded(None, "[1, inf)")
    fps: float | None = bounded(None, "(0, inf)")
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if self.image_mode not in IMAGE_MODES:
            raise ValueError(f"image_mode={self.image_mode}: choose from {', '.join(IMAGE_MODES)}")
        if self.model is not None and (self.checkpoint is not None or self.weights is not None):
            raise ValueError("model=FOLDER has one set of weights: checkpoint and weights are of a run")
        if self.picture_of is not None and self.sound_of is not None:
            raise ValueError("picture_of and sound_of are both given: nothing is left to generate")
        if self.picture is False and (self.image is not None or self.picture_of is not None):
            raise ValueError("picture=false, but image or picture_of gives one: leave one of them out")
        if self.sound is False and self.sound_of is not None:
            raise ValueError("sound=false, but sound_of gives one: leave one of them out")


def parts_of(config: SampleConfig, run: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the clips have picture and sound: as requested, as given, else as in the run's data (both, if that cannot
    be read). RunError if nothing is left to generate."""
    found = []
    for asked, given, modality in (
        (config.picture, config.picture_of is not None or config.image is not None, "picture"),
        (config.sound, config.sound_of is not None, "sound"),
    ):
        found.append(given or (in_data(run, modality) if asked is None else asked))
    picture, sound = found
    if picture <= (config.picture_of is not None) and sound <= (config.sound_of is not None):
        raise RunError(
            f"picture={str(picture).lower()} sound={str(sound).lower()}: nothing is left to generate; if neither key "
            "is given, the run's data decides"
        )
    return picture, sound


def data_paths(run: dict[str, Any]) -> list[str]:
    """All datasets of a run, past and future ones included."""
    data = run["data"]
    stages = [data.get("datasets") or [], *(segment["datasets"] for segment in data.get("segments") or [])]
    paths = [data.get("path"), *(dataset["path"] for stage in stages for dataset in stage)]
    return [path for path in paths if path is not None]


def in_data(run: dict[str, Any], modality: str) -> bool:
    """Whether any clip of the run's data has a "picture", or a "sound"; True if the data cannot be read."""
    if buckets := run["data"].get("buckets"):
        return any(bucket["has_video" if modality == "picture" else "has_audio"] for bucket in buckets)
    named = data_paths(run)
    try:
        for path in named:
            with closing(DatasetIndex.open(Path(path))) as index:
                if any(bucket.has_video if modality == "picture" else bucket.has_audio for bucket in index.buckets):
                    return True
    except DataError:
        return True
    return not named


def geometry_of(config: SampleConfig, run: dict[str, Any], picture: bool = True) -> Geometry:
    """Frames, size and rate of the clips: as asked, else as the run's data has them (its first clip, with a `picture`
    where one is made)."""
    asked = (config.frames, config.fps, config.height, config.width)
    frames, fps, height, width = asked
    if frames is None or fps is None or height is None or width is None:
        bucket = bucket_of(run["data"], picture)
        frames, fps = frames or 1 + 4 * (bucket.frames - 1), fps or bucket.fps
        height, width = height or 8 * bucket.height, width or 8 * bucket.width
    if frames % 4 != 1 or height % 16 or width % 16:
        raise RunError(f"frames={frames} height={height} width={width}: frames are 1 + 4k, sizes multiples of 16")
    return Geometry(frames, fps, height, width)


def bucket_of(data: dict[str, Any], picture: bool) -> Bucket:
    """The bucket of a run's first clip (with a picture, where one is made), as its data or an export of it says."""
    if data.get("buckets"):
        buckets = [Bucket.from_dict(values) for values in data["buckets"]]
        return next((one for one in buckets if one.has_video or not picture), buckets[0])
    path = data.get("path")
    if path is None:
        why = "the run mixes several datasets" if data.get("datasets") else "the model's training data is unknown"
        raise RunError(f"{why}: give frames, fps, height and width")
    try:
        index = DatasetIndex.open(Path(path))
    except DataError as error:
        raise RunError(f"{error}; or give frames, fps, height and width, and no data is needed") from None
    with closing(index):
        first = index.bucket_of(0)
        return next((one for one in (first, *index.buckets) if one.has_video or not picture), first)


def codecs_of_run(
    run: dict[str, Any], encoder: EncoderConfig, device: torch.device, trained: Mapping[str, str] | None = None
) -> Codecs:
    """The codecs that a run was trained with, compared by their fingerprints. DataError if they are not available.

    run: its config; trained: the fingerprints that its weights state, None or nothing: those of its data count.
    """
    stated, whose = (dict(trained), "the model") if trained else encoders_of(run)
    if not stated and trained is None and not run["data"]:
        encoder = _chosen(encoder)
    codecs = codecs_of(stated, whose, encoder, str(device), run["model"]["video"]["text_dim"])
    for codec in (codecs.video, codecs.audio, codecs.text):
        check_codec(codec, stated, whose, encoder)
    return codecs


def _chosen(encoder: EncoderConfig) -> EncoderConfig:
    """Of a folder without training.json: MOVA's codecs if their weights are given. RunError if nothing names the
    codecs."""
    names: dict[str, Any] = {
        kind: getattr(encoder, kind) or ("mova" if encoder.place(kind) else None) for kind in KINDS
    }
    if None in names.values():
        raise RunError(
            "the model does not state which encoders it was trained with: give encoder.folder=FOLDER or encoder=builtin"
        )
    return replace(encoder, **names)


def encoders_of(run: dict[str, Any]) -> tuple[dict[str, str], str]:
    """Fingerprints of the codecs of a run's data, and whose they are, as text; none if it cannot be read."""
    for path in data_paths(run):
        with suppress(DataError), closing(DatasetIndex.open(Path(path))) as index:
            return index.encoders, f"dataset {index.storage}"
    if run["data"]:
        print("neither the model nor the data of its run names encoders: the built-in ones are assumed", flush=True)
    return {}, "the run"


def noise_of(seed: int, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Starting noise [16, T, H, W] and [128, La] of one clip: a function of its seed alone."""
    bucket = geometry.bucket(True, True)
    shapes = {
        "video": (VIDEO_CHANNELS, bucket.frames, bucket.height, bucket.width),
        "audio": (AUDIO_CHANNELS, bucket.audio_steps),
    }
    noises = [generator(seed, f"sample/{name}", 0).standard_normal(shape, "float32") for name, shape in shapes.items()]
    return torch.from_numpy(noises[0]), torch.from_numpy(noises[1])


@dataclass
class Inputs:
    """The model's inputs: geometry, [L, D] text and empty prompt, latents of a given picture [16, T, H, W] or
    sound [128, La], and of the first frame's condition [16, T, H, W]."""

    geometry: Geometry
    picture: bool
    sound: bool
    text: Tensor
    empty: Tensor
    video: Tensor | None = None
    audio: Tensor | None = None
    condition: Tensor | None = None


def make_clips(config: SampleConfig, layout: Layout) -> list[Clip]:
    """Generate the clips, the same on every rank. Text encoder, VAEs and towers take turns on the device."""
    if config.model is not None:
        folder = Path(config.model)
        run = folder_config(folder)
        encoders = run["data"].get("encoders")
        if config.encoder.folder is None and (folder / "video_vae").is_dir():
            config = replace(config, encoder=replace(config.encoder, folder=config.model))
    else:
        path = find_checkpoint(Path(str(config.checkpoint)))
        state = read_state(path)
        run, encoders = state["config"], state.get("encoders")
    codecs = codecs_of_run(run, config.encoder, layout.device, encoders)
    inputs = prepare_inputs(config, run, codecs)
    if config.model is not None:
        model = load_folder(Path(config.model), config.parallel, layout)
    else:
        model, _ = load_model(path, config.parallel, layout, config.weights)
    video, audio = generate(model, run, config, inputs, layout)
    del model
    return decode_clips(video, audio, inputs.geometry, codecs)


def clips_of(
    model: JointTransformer, run: dict[str, Any], config: SampleConfig, layout: Layout, codecs: Codecs
) -> list[Clip]:
    """As `make_clips`, with a model and codecs that stay on the device; `run`: the config of its run."""
    inputs = prepare_inputs(config, run, codecs)
    return decode_clips(*generate(model, run, config, inputs, layout), inputs.geometry, codecs)


def prepare_inputs(config: SampleConfig, run: dict[str, Any], codecs: Codecs) -> Inputs:
    """Encode the inputs of a request, on the CPU; the codecs' weights leave the device."""
    picture, sound = parts_of(config, run)
    inputs = Inputs(geometry_of(config, run, picture), picture, sound, *codecs.text.encode([config.prompt, ""]))
    codecs.text.release()
    geometry, first = inputs.geometry, None
    if config.picture_of is not None:
        with open_media(Path(config.picture_of)) as media:
            pixels = _pixels(media, geometry, config.picture_of)
        inputs.video, first = codecs.video.encode(pixels[None])[0], pixels[:, 0]
    if config.sound_of is not None:
        rate = codecs.audio.sample_rate
        with open_media(Path(config.sound_of), [rate]) as media:
            if media.sound_span is None:
                raise RunError(f"sound_of={config.sound_of} has no sound")
            wave = media.sound(media.span[0], geometry.samples_at(rate), rate)
        inputs.audio = codecs.audio.encode(wave[None])[0].T
    if config.image is not None:
        first = read_still(Path(config.image), geometry.height, geometry.width)
        if first is None:  # a clip's first frame
            with open_media(Path(config.image)) as media:
                first = _pixels(media, Geometry(1, geometry.fps, geometry.height, geometry.width), config.image)[:, 0]
    if first is None and picture and config.image_mode == "white":
        first = torch.ones(3, geometry.height, geometry.width)
    if first is not None:
        inputs.condition = codecs.video.encode_condition(first[None], geometry.frames)[0]
    codecs.video.release()
    codecs.audio.release()
    return inputs


def _pixels(media: Media, geometry: Geometry, name: str) -> Tensor:
    if media.frame_times is None:
        raise RunError(f"{name} has no picture")
    return media.frames(media.span[0], geometry.frames, geometry.fps, geometry.height, geometry.width)


def generate(
    model: JointTransformer, run: dict[str, Any], config: SampleConfig, inputs: Inputs, layout: Layout
) -> tuple[Tensor | None, Tensor | None]:
    """Latents of `count` clips, video [B, 16, T, H, W] and audio [B, 128, La]; None for a modality not requested."""
    bucket, device = inputs.geometry.bucket(True, True), layout.device
    condition = torch.zeros(MASK_CHANNELS + VIDEO_CHANNELS, bucket.frames, bucket.height, bucket.width)
    if inputs.condition is not None:
        condition[:MASK_CHANNELS, 0] = 1
        condition[MASK_CHANNELS:] = inputs.condition
    text, empty = (pad_text(rows.float(), model.config.text_length) for rows in (inputs.text, inputs.empty))
    noises = [noise_of(config.seed + number, inputs.geometry) for number in range(config.count)]

    def batch(tensor: Tensor) -> Tensor:
        return tensor.to(device).expand(config.count, *tensor.shape)

    bar = track(range(config.sampler.steps), "sampling", disable=not layout.first)
    ticks = iter(bar)

    def advance(_: int) -> None:
        next(ticks, None)

    video, audio = sample(
        WholeField(model, layout),
        as_trained(config.sampler, run),
        torch.stack([noise for noise, _ in noises]).to(device) if inputs.picture else None,
        torch.stack([noise for _, noise in noises]).to(device) if inputs.sound else None,
        batch(condition),
        batch(text),
        empty.to(device),
        model.config.experts,
        inputs.geometry.fps,
        None if inputs.video is None else batch(inputs.video),
        None if inputs.audio is None else batch(inputs.audio),
        advance,
    )
    advance(0)  # ends the bar
    return video, audio


def decode_clips(video: Tensor | None, audio: Tensor | None, geometry: Geometry, codecs: Codecs) -> list[Clip]:
    """Clips of latents [B, 16, T, H, W] and [B, 128, La], one at a time, on the CPU; one of both may be None."""
    clips = []
    rate = codecs.audio.sample_rate
    present = video if video is not None else audio
    for number in range(0 if present is None else len(present)):
        pixels = None if video is None else codecs.video.decode(video[number : number + 1].float())[0]
        wave = None
        if audio is not None:
            wave = codecs.audio.decode(audio[number : number + 1].float().mT, geometry.samples_at(rate))[0]
        clips.append(Clip(pixels, wave, geometry.fps, rate, codecs.fingerprints))
    codecs.video.release()
    codecs.audio.release()
    return clips


def write_mp4(
    path: Path, pixels: Tensor | None, sound: Tensor | None, fps: float, rate: int, comment: str = ""
) -> None:
    """An mp4 of pixels [3, F, H, W] in -1..1 and sound [samples] at `rate` Hz, of what there is; comment: in its
    metadata."""
    frames = None
    if pixels is not None:
        levels = ((pixels.permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255)
        frames = list(levels.to(torch.uint8).contiguous().numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = sound.clamp(-1, 1).numpy() if sound is not None else None
    encode_mp4(path, frames, fps, wave, rate, comment)


def comment_of(clip: Clip) -> str:
    """A file's comment about the codecs that decoded it."""
    return "encoders: " + ", ".join(f"{kind} {one}" for kind, one in sorted(clip.encoders.items()))


def describe_clip(clip: Clip) -> str:
    """A description of a clip's content."""
    if clip.pixels is None:
        assert clip.sound is not None
        return f"{len(clip.sound) / clip.rate:.2f} s of sound, no picture"
    size = f"{clip.pixels.shape[1]} frames of {clip.pixels.shape[3]} x {clip.pixels.shape[2]}"
    return size if clip.sound is not None else f"{size}, no sound"


def _run(config: SampleConfig) -> None:
    out = Path(config.out)
    if config.checkpoint is None and config.model is None:
        raise RunError("give checkpoint=RUN (or one of its checkpoints), or model=FOLDER of weights")
    if out.suffix != ".mp4":
        raise RunError(f"out={out}: give a file that ends in .mp4")
    device = start_process_group()
    try:
        layout = make_layout(config.parallel, device)
        clips = make_clips(config, layout)
        first = layout.first
    finally:
        dist.destroy_process_group()
    for number, clip in enumerate(clips if first else []):
        path = out if config.count == 1 else out.with_name(f"{out.stem}-{number}.mp4")
        write_mp4(path, clip.pixels, clip.sound, clip.fps, clip.rate, comment_of(clip))
        print(f"{path}: {describe_clip(clip)}, seed {config.seed + number}")


def _begin() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))


def _main(call: Call[SampleConfig]) -> None:
    _run(call.config)


PROGRAM = Program("sample", __doc__, _main, schema=Schema("sample", SampleConfig, (("encoder", None),)), before=_begin)

if __name__ == "__main__":
    PROGRAM.start()
