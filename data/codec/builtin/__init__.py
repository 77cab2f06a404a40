"""Built-in codecs without weights, with the geometry of MOVA's: one clip, everywhere, with no download.

They preserve far less than the real VAEs, but enough to watch and hear, so that the whole path from mp4 to a sampled
mp4 works on any machine. Each fingerprint changes with every constant.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from data.codec import AudioCodec, Codec, EncoderConfig, TextCodec, VideoCodec
from data.codec.builtin import audio, text, video
from data.errors import DataError

TEXT_DIM = 256
PREFIXES = {"video": "dct-video-", "audio": "mdct-audio-", "text": "hash-text-"}


class BuiltinVideo(VideoCodec):
    """A truncated space-time DCT, block by block: what follows the first frame does not know of it."""

    memory = 1

    @property
    def fingerprint(self) -> str:
        return video.fingerprint

    def encode(self, pixels: Tensor) -> Tensor:
        return torch.stack([video.encode(one) for one in pixels])

    def decode(self, latents: Tensor) -> Tensor:
        return torch.stack([video.decode(one.cpu()) for one in latents])


class BuiltinAudio(AudioCodec):
    """A truncated MDCT of sound at 16 kHz."""

    sample_rate = audio.SAMPLE_RATE

    @property
    def fingerprint(self) -> str:
        return audio.fingerprint

    def encode(self, waveforms: Tensor) -> Tensor:
        return torch.stack([audio.encode(one) for one in waveforms])

    def decode(self, latents: Tensor, samples: int | None = None) -> Tensor:
        return torch.stack([audio.decode(one.cpu(), samples) for one in latents])


class BuiltinText(TextCodec):
    """A row a word, drawn from its letters."""

    def __init__(self, dim: int | None = None):
        self._dim = TEXT_DIM if dim is None else dim
        if self._dim < 8 or self._dim % 2:
            raise DataError(f"text_dim={dim} must be even and at least 8")

    @property
    def fingerprint(self) -> str:
        return text.fingerprint

    @property
    def dim(self) -> int:
        return self._dim

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        return [text.encode(caption, self._dim) for caption in captions]


def open_codec(kind: str, config: EncoderConfig, device: str, text_dim: int | None) -> Codec:
    """The built-in codec of a kind; it runs on the CPU whatever the device."""
    if kind == "text":
        return BuiltinText(text_dim)
    return BuiltinVideo() if kind == "video" else BuiltinAudio()
