"""Latents and text embeddings computed by other software -> samples, or the reason why not.

What is asked of them: video and condition [16, T, H, W] (T, H, W of MOVA's codec: 1 + 4 (T - 1) frames of 8H x 8W
pixels), audio [La, 128], text [L, D]; axes in another order, and a leading axis of one, are brought into this one.
They become bfloat16.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from core.ranges import bounded
from data.clip import AUDIO_CHANNELS, VIDEO_CHANNELS, Bucket, EncodedClip, encode_json
from data.codec.builtin import BuiltinText, BuiltinVideo
from data.dataset.record import PLAIN_NAME
from data.errors import DataError
from data.sources.captions import captions_of

FRAMES_STRIDE, PIXELS_STRIDE = 4, 8  # pixel frames of a latent frame, pixels of a latent row or column
PATCH = 2  # rows and columns of latents that are one token of the model
AXES = {"video": "CTHW", "condition": "CTHW", "audio": "LC", "text": "LD"}
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
STEPS_OFF = 2.0  # latent steps by which sound may be longer or shorter than its picture
SOUND_FPS = 24.0  # of samples without picture, where nothing else is stated


@dataclass
class Encoders:
    """Fingerprints of the encoders: any words that name weights, settings and scaling, the same in all datasets of a
    mixture.

    video: of the video latents
    audio: of the audio latents
    text: of the encoded captions; null: captions are encoded by the built-in codec
    """

    video: str | None = None
    audio: str | None = None
    text: str | None = None


@dataclass
class Names:
    """Names of the tensors in their files; null leaves one out.

    video: [C, T, H, W] in the order of layouts.video
    audio: [L, C] in the order of layouts.audio
    condition: the encoded first frame
    text: the encoded caption
    """

    video: str | None = "video"
    audio: str | None = "audio"
    condition: str | None = "condition"
    text: str | None = "text"


@dataclass
class Layouts:
    """Axes in the order in which they are stored: C channel, T frame, H row, W column, L step of sound.

    video: of the video latents
    condition: of the condition
    audio: of the audio latents
    """

    video: str = "CTHW"
    condition: str = "CTHW"
    audio: str = "LC"


@dataclass
class Fields:
    """Names of fields in the json beside a sample.

    fps: frames per second; without it the program's fps holds
    frames: frames of pixels
    caption: the caption
    """

    fps: str = "fps"
    frames: str = "frames"
    caption: str = "caption"


@dataclass
class LatentsConfig:
    """Settings of the tensors.

    fps: pixel frames per second, where the json has none
    audio_rate: latent steps of sound per second
    text_dim: width of the built-in text codec
    """

    encoders: Encoders = field(default_factory=Encoders)
    tensors: Names = field(default_factory=Names)
    layouts: Layouts = field(default_factory=Layouts)
    fields: Fields = field(default_factory=Fields)
    fps: float | None = bounded(None, "(0, inf)")
    audio_rate: float = bounded(50.0, "(0, inf)")
    text_dim: int = bounded(256, "[1, inf)")


class WrongSettings(DataError):
    """A sample is wrong because of the settings: continuing would reject all of them."""


@dataclass
class Latents:
    """A sample that can be stored. text: [L, D] bfloat16; converted: types other than bfloat16 that tensors had."""

    clip: EncodedClip
    bucket: Bucket
    caption: str
    text: Tensor
    converted: set[str]


def check(config: LatentsConfig, empty_text: Tensor | None) -> None:
    """DataError that names the first setting that can't be met. empty_text: the encoded empty prompt that was given."""
    for name in ("video", "condition", "audio"):
        layout = getattr(config.layouts, name)
        if sorted(layout) != sorted(AXES[name]):
            raise DataError(f"layouts.{name}={layout} must have the letters of {AXES[name]}, each once")
    for name, value in (("fps", config.fps), ("audio_rate", config.audio_rate)):
        if value is not None and not 0 < value < math.inf:
            raise DataError(f"{name}={value} must be above 0")
    if not config.encoders.video and not config.encoders.audio:
        raise DataError(
            "no encoder is named: state which encoder made the latents, as in encoders.video=wan2.1-vae-bf16"
        )
    if config.encoders.text and empty_text is None:
        raise DataError("encoders.text needs empty_text=FILE.safetensors: the empty prompt as that encoder gives it")
    if not config.encoders.text:
        if empty_text is not None:
            raise DataError("empty_text is given, but encoders.text isn't: state whose embeddings they are")
        BuiltinText(config.text_dim)


class Maker:
    """Makes samples of what one set of files holds."""

    def __init__(self, config: LatentsConfig, empty_text: Tensor | None):
        check(config, empty_text)
        self.config = config
        self._video, self._words = BuiltinVideo(), BuiltinText(config.text_dim)
        self.empty_text = self._words.encode([""])[0] if empty_text is None else empty_text
        stated = {"video": config.encoders.video, "audio": config.encoders.audio}
        stated["text"] = config.encoders.text or self._words.fingerprint
        self.encoders = {name: value for name, value in stated.items() if value}

    def __call__(
        self, key: str, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], caption: str | None
    ) -> Latents:
        """A sample of these tensors (by kind: video, audio, condition, text), or DataError with the reason.

        name: for its record; meta: its json; caption: None takes that of the json. WrongSettings for a tensor whose
        encoder isn't stated.
        """
        for kind in tensors:
            encoder = "video" if kind == "condition" else kind
            if encoder not in self.encoders or (kind == "text" and not self.config.encoders.text):
                raise WrongSettings(
                    f"{name} holds {kind}, but encoders.{encoder} is not given: state whose it is, or leave it out "
                    f"with tensors.{kind}=null"
                )
        arranged = {kind: self._arrange(kind, tensor) for kind, tensor in tensors.items()}
        video, audio, condition = (arranged.get(kind) for kind in ("video", "audio", "condition"))
        if video is None and audio is None:
            raise DataError(f"holds neither video nor audio (tensors looked for: {self._looked_for()})")
        bucket, frames = self._bucket(video, audio, meta)
        if video is None and condition is not None:
            raise DataError("holds a condition without video")
        if video is not None:
            condition = self._condition(video, condition)
        words = next(iter(captions_of(meta.get(self.config.fields.caption))), "") if caption is None else caption
        clip = EncodedClip(key, video, audio, condition, self._meta(name, bucket, frames, meta))
        if wrong := clip.not_finite():
            raise DataError(f"NaN or inf in {wrong}")
        converted = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()} - {"bfloat16"}
        return Latents(clip, bucket, words, self._text(arranged.get("text"), words), converted)

    def _arrange(self, kind: str, tensor: Tensor) -> Tensor:
        stored = getattr(self.config.layouts, kind, AXES[kind])
        if tensor.dtype not in FLOATS:
            raise DataError(f"{kind} is {str(tensor.dtype).removeprefix('torch.')}; latents are floating-point numbers")
        if tensor.ndim == len(stored) + 1 and len(tensor) == 1:
            tensor = tensor[0]  # a batch of one
        shape = "x".join(map(str, tensor.shape))
        if tensor.ndim != len(stored) or 0 in tensor.shape:
            raise DataError(f"{kind} has shape {shape}, expected the axes {stored}")
        tensor = tensor.permute([stored.index(axis) for axis in AXES[kind]])
        channels, wanted = {
            "video": (tensor.shape[0], VIDEO_CHANNELS), "condition": (tensor.shape[0], VIDEO_CHANNELS),
            "audio": (tensor.shape[-1], AUDIO_CHANNELS), "text": (tensor.shape[-1], self.empty_text.shape[-1]),
        }[kind]  # fmt: skip
        if channels != wanted:
            remedy = f"; the axes are read as {stored}: see layouts.{kind}" if wanted in tensor.shape else ""
            raise DataError(f"{kind} has shape {shape}, which is {channels} channels, expected {wanted}{remedy}")
        return tensor.to(torch.bfloat16).contiguous()

    def _bucket(self, video: Tensor | None, audio: Tensor | None, meta: Mapping[str, Any]) -> tuple[Bucket, int]:
        """Geometry, and pixel frames. A modality that is absent takes the smallest geometry of the other's length."""
        rate = self.config.audio_rate
        fps = self._number(meta, self.config.fields.fps) or self.config.fps
        if video is None:
            assert audio is not None
            fps = fps or SOUND_FPS
            latent_frames = 1 + max(0, math.ceil((len(audio) / rate * fps - 1) / FRAMES_STRIDE))
            frames = 1 + FRAMES_STRIDE * (latent_frames - 1)
            return Bucket(latent_frames, PATCH, PATCH, len(audio), fps, has_video=False, has_audio=True), frames
        if not fps:
            raise DataError(f"its json has no {self.config.fields.fps}; give fps=N")
        _, latent_frames, height, width = video.shape
        if height % PATCH or width % PATCH:
            raise DataError(f"video is {height}x{width} latents; both must be even, since the model takes 2x2 as one")
        frames = 1 + FRAMES_STRIDE * (latent_frames - 1)
        stated = self._number(meta, self.config.fields.frames)
        if stated and stated != frames:
            raise DataError(f"its json states {stated:g} frames, {latent_frames} latent frames stand for {frames}")
        steps = frames / fps * rate
        if audio is not None and abs(len(audio) - steps) > STEPS_OFF:
            raise DataError(
                f"sound has {len(audio)} steps ({len(audio) / rate:.3f} s at audio_rate={rate:g}), its picture "
                f"{frames} frames ({frames / fps:.3f} s at {fps:g} fps)"
            )
        length = math.ceil(steps) if audio is None else len(audio)
        return Bucket(latent_frames, height, width, length, fps, True, has_audio=audio is not None), frames

    def _condition(self, video: Tensor, condition: Tensor | None) -> Tensor:
        if condition is not None:
            if condition.shape != video.shape:
                shapes = ("x".join(map(str, tensor.shape)) for tensor in (condition, video))
                raise DataError("condition has shape {}, video {}; both must be equal".format(*shapes))
            return condition
        if self.encoders["video"] != self._video.fingerprint:
            raise DataError(
                "has no condition: encode its first frame followed by zero frames, which video latents alone don't give"
            )
        # The built-in codec takes the first frame by itself, and zero frames are the same after any.
        frames = video.shape[1]
        pixels = torch.zeros(3, min(frames, 2) * FRAMES_STRIDE - 3, *(PIXELS_STRIDE * size for size in video.shape[2:]))
        tail = self._video.encode(pixels[None])[0].to(torch.bfloat16)[:, -1:].expand(-1, frames - 1, -1, -1)
        return torch.cat([video[:, :1], tail], dim=1)

    def _text(self, text: Tensor | None, words: str) -> Tensor:
        if not self.config.encoders.text:
            return self._words.encode([words])[0].to(torch.bfloat16)
        if text is None:
            raise DataError(f"has no text (tensor {self.config.tensors.text})")
        if not bool(torch.isfinite(text).all()):
            raise DataError("NaN or inf in text")
        rows = text.ne(0).any(dim=1).nonzero()  # zero rows at the end are padding, which isn't stored
        return text[: int(rows[-1]) + 1 if len(rows) else 1].contiguous()

    def _meta(self, name: str, bucket: Bucket, frames: int, meta: Mapping[str, Any]) -> dict[str, Any]:
        given = meta.get("scores")
        scores = {
            column: float(value)
            for column, value in (given.items() if isinstance(given, dict) else ())
            if PLAIN_NAME.fullmatch(column) and _is_number(value)
        }
        try:
            encode_json(dict(meta))
        except (ValueError, RecursionError) as error:
            raise DataError(f"its json can't be stored ({type(error).__name__}: {error})") from error
        return {
            "fps": bucket.fps,
            "frames": frames,
            "height": bucket.height * PIXELS_STRIDE,
            "width": bucket.width * PIXELS_STRIDE,
            "seconds": frames / bucket.fps,
            "source": name,
            "start": 0.0,
            "scores": scores,
            "encoders": self.encoders,
            "imported": dict(meta),
        }

    def _number(self, meta: Mapping[str, Any], name: str) -> float | None:
        value = meta.get(name)
        if value is None:
            return None
        if not _is_number(value) or not 0 < value < 1e9:
            raise DataError(f"its json has {name}={value!r}; expected a number above 0")
        return float(value)

    def _looked_for(self) -> str:
        return ", ".join(f"{kind} as {name}" for kind, name in vars(self.config.tensors).items() if name)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300  # NaN is not
