"""Sound, mono at 48 kHz, <-> latents [La, 128] at 50 a second, by the continuous DAC VAE (dac.py), in float32."""

from __future__ import annotations

from dataclasses import fields
from functools import cached_property
from pathlib import Path

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from core.ranges import OutOfRange, to_object
from data.codec import AUDIO_CHANNELS, STEPS, AudioCodec, CodecError, EncoderConfig
from data.codec.mova import PREFIXES
from data.codec.mova.dac import Dac, DacConfig, fused
from data.codec.mova.device import computing
from data.codec.mova.weights import find_part, fingerprint, hash_state, load_into, read_config, read_state

REVISION = 1  # raised whenever the same weights and sound would give other latents


class MovaAudio(AudioCodec):
    """The mean of the posterior, unscaled, as MOVA takes it."""

    on_device = True
    packages = ("torch",)

    def __init__(self, path: Path, device: str):
        self.path, self.device = path, torch.device(device)
        self.config = dac_config(path)
        self.sample_rate = self.config.sample_rate

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(PREFIXES["audio"], REVISION, vars(self.config), hash_state(fused(read_state(self.path))))

    @cached_property
    def _model(self) -> Dac:
        with torch.device("meta"):
            model = Dac(self.config)
        load_into(model, {name: tensor.float() for name, tensor in fused(read_state(self.path)).items()}, self.path)
        return model.eval().requires_grad_(False)

    @property
    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self._model.parameters())

    def release(self) -> None:
        if "_model" in self.__dict__:
            self._model.to("cpu")

    def encode(self, waveforms: Tensor) -> Tensor:
        if waveforms.ndim != 2 or waveforms.shape[1] == 0:
            raise ValueError(f"waveforms are {tuple(waveforms.shape)}; expected [B, samples], at least one")
        with computing(self.device, "float32"):
            model = self._model.to(self.device)
            return torch.cat([model.encode(one[None].float().to(self.device)).mT.cpu() for one in waveforms])

    def decode(self, latents: Tensor, samples: int | None = None) -> Tensor:
        if latents.ndim != 3 or latents.shape[2] != AUDIO_CHANNELS:
            raise ValueError(f"latents are {tuple(latents.shape)}; expected [B, La, {AUDIO_CHANNELS}]")
        with computing(self.device, "float32"):
            model = self._model.to(self.device)
            parts = [model.decode(one[None].float().mT.to(self.device)).cpu() for one in latents]
        return torch.cat(parts)[:, :samples]


def dac_config(path: Path) -> DacConfig:
    """Of config.json beside the weights; without one, the released sizes. CodecError for another network."""
    values = read_config(path) if path.is_dir() else {}
    given = {field.name: values[field.name] for field in fields(DacConfig) if field.name in values}
    try:
        config: DacConfig = to_object(OmegaConf.structured(DacConfig(**given)))
    except OutOfRange as error:
        raise CodecError(f"{path}/config.json: {error}") from None
    except OmegaConfBaseException as error:
        raise CodecError(f"{path}/config.json: {error.full_key}: {str(error).splitlines()[0]}") from None
    if not values.get("continuous", True):
        raise CodecError(f"{path} is a DAC with quantizers (continuous is false); MOVA's is continuous")
    if config.latent_dim != AUDIO_CHANNELS or config.sample_rate != STEPS * config.hop:
        raise CodecError(
            f"{path}: {config.latent_dim} channels, {config.sample_rate} Hz and {config.hop} samples a latent; "
            f"expected {AUDIO_CHANNELS} channels and {STEPS} latents a second"
        )
    return config


def make(place: str, config: EncoderConfig, device: str, text_dim: int | None) -> MovaAudio:
    """From a folder with config.json and safetensors, or a file of pickled weights."""
    return MovaAudio(find_part(place, ("audio_vae",), ("vae_128d_48k.pth",), "encoder.audio_folder"), device)
