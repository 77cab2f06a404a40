"""MOVA's encoders: Wan 2.1's video VAE, the continuous 48 kHz DAC VAE, UMT5 (docs/encoders.md).

Weights come from local folders or files alone. `encoder.folder` may be a MOVA folder (video_vae, audio_vae,
text_encoder, tokenizer), a diffusers folder of Wan (vae, text_encoder, tokenizer), or one of Wan's original files
(Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl).
"""

from importlib import import_module
from importlib.util import find_spec

from data.codec import Codec, CodecError, EncoderConfig

PREFIXES = {"video": "wan-vae-", "audio": "dac-vae-", "text": "umt5-"}
NEEDED = {"video": ("diffusers", "accelerate"), "audio": (), "text": ("transformers", "ftfy", "sentencepiece")}


def open_codec(kind: str, config: EncoderConfig, device: str, text_dim: int | None) -> Codec:
    """The codec of a kind; its weights are read when they are first needed. CodecError: see `data.codec.open_codec`."""
    place = config.place(kind)
    if place is None:
        raise CodecError(
            f"encoder.{kind}=mova needs its weights: encoder.folder=FOLDER or encoder.{kind}_folder=FOLDER"
        )
    if missing := [name for name in NEEDED[kind] if find_spec(name) is None]:
        raise CodecError(f"encoder.{kind}=mova needs {', '.join(missing)}: pip install 'mova-pretrain[encoders]'")
    codec: Codec = import_module(f"{__name__}.{kind}").make(place, config, device, text_dim)
    return codec
