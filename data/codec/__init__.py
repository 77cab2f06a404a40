"""Codecs: pixels, sound and words -> latents and embeddings, and back.

A codec is a class of this file, made by `open_codec`: for `encoder.video=NAME` by the function `open_codec(kind,
config, device, text_dim)` of the module `data/codec/NAME`. So another codec is one file. `builtin` needs no weights
and runs everywhere; `mova` is what MOVA was trained with. `PREFIXES` of
a module are the beginnings of its codecs' fingerprints.

The geometry is the same for all, as the model's is: video 16 channels, 4 frames and 8 x 8 pixels a latent, the first
frame alone; sound 128 channels, 50 latents a second. What differs is the codec's own sample rate, how far the encoding
of a first frame reaches, the width of text, and the fingerprint.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version

import torch
from torch import Tensor

from core.ranges import bounded
from data.errors import DataError

KINDS = ("video", "audio", "text")
BUILTIN = "builtin"
CHANNELS, AUDIO_CHANNELS = 16, 128
FRAMES, PIXELS = 4, 8  # pixel frames of a latent frame (after the first), pixels of a latent row or column
STEPS = 50  # latents of sound in a second

logger = logging.getLogger(__name__)


class CodecError(DataError):
    """A codec cannot run, because of its weights or its device, not because of a clip. It ends the program."""


@dataclass
class EncoderConfig:
    """The codecs and their weights: local folders or files, nothing is downloaded.

    video: name of the video codec; null: builtin when a dataset is made, otherwise that of the data in use
    audio: name of the audio codec; null: as video
    text: name of the text codec; null: as video
    folder: folder of the weights of all three
    video_folder: folder of the video codec's weights, if different
    audio_folder: folder of the audio codec's weights, if different
    text_folder: folder of the text codec's weights, if different
    video_dtype: float32, tf32 (products rounded on a GPU) or bfloat16 (2 % error); part of the fingerprint
    text_dtype: the same for the text codec
    batch: windows of one file that are encoded at once; part of the fingerprint
    ignore_fingerprints: allow codecs other than those that made the latents
    tiled_decoding: decode a picture in tiles: less memory, slightly different picture
    """

    video: str | None = None
    audio: str | None = None
    text: str | None = None
    folder: str | None = None
    video_folder: str | None = None
    audio_folder: str | None = None
    text_folder: str | None = None
    video_dtype: str = "float32"
    text_dtype: str = "float32"
    batch: int = bounded(1, "[1, inf)")
    ignore_fingerprints: bool = False
    tiled_decoding: bool = False

    def place(self, kind: str) -> str | None:
        """The folder or file of a part's weights, None where none is given."""
        return getattr(self, f"{kind}_folder") or self.folder


class Codec(ABC):
    """What all codecs have. kind: one of KINDS; device: where it computes."""

    kind: str
    device: torch.device = torch.device("cpu")
    on_device = False  # whether it computes on `device`, and gains from a process that has it to itself
    packages: tuple[str, ...] = ()  # whose versions might change its last bits: recorded, and a difference is told

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Changes whenever the same input would give other latents; latents of two fingerprints must not be mixed."""

    @property
    def name(self) -> str:
        """The `encoder.KIND` that gives it: the module it comes from."""
        return type(self).__module__.removeprefix(f"{__name__}.").split(".")[0]

    @property
    def libraries(self) -> dict[str, str]:
        """{package: version} of `packages` here."""
        return {name: version(name) for name in sorted(self.packages)}

    @property
    def weight_bytes(self) -> int:
        """Memory that its weights take on the device while it is at work; 0 without weights."""
        return 0

    def release(self) -> None:  # noqa: B027  without weights there is nothing to do
        """Free the device; the next call loads again."""


class VideoCodec(Codec):
    """Pictures. memory: the encoding of a first frame and zero frames is constant from this latent frame on.

    batch: clips that are to be encoded at once; it belongs to the fingerprint where it changes bits.
    """

    kind = "video"
    memory: int
    batch: int = 1

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, F, H, W] in [-1, 1] -> float32 latents [B, 16, 1 + (F - 1) / 4, H / 8, W / 8] on the CPU.

        ValueError when F is not 1 + 4k or when H or W is no multiple of 8.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """[B, 16, 1 + k, h, w] -> pixels [B, 3, 1 + 4k, 8h, 8w] in [-1, 1] on the CPU.

        ValueError for another number of channels.
        """

    def encode_condition(self, first: Tensor, frames: int) -> Tensor:
        """Latents [B, 16, 1 + (frames - 1) / 4, h, w] of first frames [B, 3, H, W], each followed by zero frames.

        Only so many frames are encoded as the codec's memory is long; the rest repeats the last latent, bit for bit
        what encoding all of them gives.
        """
        pixels = torch.zeros(*first.shape[:2], min(frames, 1 + FRAMES * self.memory), *first.shape[2:])
        pixels[:, :, 0] = first
        latents = self.encode(pixels)
        missing = 1 + (frames - 1) // FRAMES - latents.shape[2]
        return torch.cat([latents, latents[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)


class AudioCodec(Codec):
    """Sound, mono. sample_rate: Hz, a multiple of STEPS."""

    kind = "audio"
    sample_rate: int

    @property
    def hop(self) -> int:
        """Samples of one latent."""
        return self.sample_rate // STEPS

    def steps(self, samples: int) -> int:
        """Latents La of so many samples: a part of a step counts as one."""
        return -(-samples // self.hop)

    @abstractmethod
    def encode(self, waveforms: Tensor) -> Tensor:
        """[B, samples] in [-1, 1] -> float32 latents [B, La, 128] on the CPU; the last step is filled with silence."""

    @abstractmethod
    def decode(self, latents: Tensor, samples: int | None = None) -> Tensor:
        """[B, La, 128] -> waveforms [B, La * hop] on the CPU, cut to `samples` where given."""


class TextCodec(Codec):
    """Captions. dim: width of a row."""

    kind = "text"

    @property
    @abstractmethod
    def dim(self) -> int: ...

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Of each caption float32 [L, dim] on the CPU, as many rows as it has tokens; the empty one has one row."""


class Codecs:
    """The three codecs of a dataset. `device`: where they compute; `text_dim`: see `open_codec`."""

    def __init__(self, config: EncoderConfig, device: str = "cpu", text_dim: int | None = None):
        self.config, self._device, self._text_dim = config, device, text_dim

    @cached_property
    def video(self) -> VideoCodec:
        """Opened when it is first asked for, as are the others; weights are read when something is to be encoded."""
        codec = open_codec("video", self.config, self._device)
        assert isinstance(codec, VideoCodec)
        return codec

    @cached_property
    def audio(self) -> AudioCodec:
        codec = open_codec("audio", self.config, self._device)
        assert isinstance(codec, AudioCodec)
        return codec

    @cached_property
    def text(self) -> TextCodec:
        codec = open_codec("text", self.config, self._device, self._text_dim)
        assert isinstance(codec, TextCodec)
        return codec

    @property
    def libraries(self) -> dict[str, str]:
        """Versions of the packages that do the computing."""
        return self.video.libraries | self.audio.libraries | self.text.libraries

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """By kind, as they stand in a dataset."""
        return {codec.kind: codec.fingerprint for codec in (self.video, self.audio, self.text)}


def open_codec(kind: str, config: EncoderConfig, device: str = "cpu", text_dim: int | None = None) -> Codec:
    """The codec of a kind that `config` names, `builtin` where it names none.

    text_dim: width of text; None: the codec's own. CodecError for a name that there is not, for weights that are
    missing or of another network, and for a width that it does not have.
    """
    name = getattr(config, kind) or BUILTIN
    if name not in (names := sorted(module.name for module in pkgutil.iter_modules(__path__))):
        raise CodecError(f"encoder.{kind}={name}: choose from {', '.join(names)}")
    codec: Codec = importlib.import_module(f"{__name__}.{name}").open_codec(kind, config, device, text_dim)
    return codec


def maker_of(kind: str, fingerprint: str) -> str | None:
    """The `encoder.KIND` whose codecs have fingerprints like this one; None when there is none (latents of others)."""
    for found in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{found.name}")
        if fingerprint.startswith(module.PREFIXES[kind]):
            return found.name
    return None


def codecs_of(
    stated: Mapping[str, str], whose: str, config: EncoderConfig, device: str = "cpu", text_dim: int | None = None
) -> Codecs:
    """The codecs of latents with these fingerprints; a part that `config` names is that one.

    whose: what states them, for messages. DataError for one that is not known, or whose weights are not there. Whether
    they are the stated ones is for `check_codec` to say, which reads their weights.
    """
    names: dict[str, str] = {}
    for kind in KINDS:
        name = getattr(config, kind) or (maker_of(kind, stated[kind]) if kind in stated else BUILTIN)
        if name is None:
            raise DataError(
                f"{whose} has {kind} of {stated[kind]}, which no codec here makes: choose one by encoder.{kind} and "
                "encoder.ignore_fingerprints=true if it is the same"
            )
        names[kind] = name
    return Codecs(replace(config, video=names["video"], audio=names["audio"], text=names["text"]), device, text_dim)


def check_codec(codec: Codec, stated: Mapping[str, str], whose: str, config: EncoderConfig) -> None:
    """DataError, naming both, when a codec is not the one that is stated for its kind; said and allowed where `config`
    ignores fingerprints. whose: what states it."""
    if codec.kind not in stated or stated[codec.kind] == codec.fingerprint:
        return
    words = f"{whose} has {codec.kind} of {stated[codec.kind]}, the codec here is {codec.fingerprint}"
    if not config.ignore_fingerprints:
        raise DataError(
            f"{words}: give the weights and settings that it was made with (encoder.folder, "
            f"encoder.{codec.kind}_dtype, encoder.batch), or encoder.ignore_fingerprints=true"
        )
    logger.warning("%s; continuing because of encoder.ignore_fingerprints", words)


def warn_of_libraries(codec: Codec, recorded: Mapping[str, Sequence[str]], whose: str) -> None:
    """Warn of a version that was not used for a dataset. recorded: {package: its versions}, as its record has them."""
    for name, here in codec.libraries.items():
        if (then := recorded.get(name, [])) and here not in then:
            words = " and ".join(then)
            logger.warning("%s was encoded with %s %s, here is %s: the last bits may differ", whose, name, words, here)
