"""Pixels <-> normalised latents of Wan 2.1's VAE, by AutoencoderKLWan of diffusers.

Encoding is the mode of the posterior, (z - mean) / deviation in float32 with the config's numbers. The VAE itself goes
through a clip by one and then four frames with a cache: that is its definition, and it is causal. Encoding is never
tiled: tiles see neither each other nor what the middle block sees of the whole frame (6 to 16 % error).
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.codec import CHANNELS, FRAMES, PIXELS, CodecError, EncoderConfig, VideoCodec
from data.codec.mova import PREFIXES
from data.codec.mova.device import computing, dtype_of
from data.codec.mova.originals import vae_names
from data.codec.mova.weights import find_part, fingerprint, hash_state, load_into, read_config, read_state

REVISION = 1  # raised whenever the same weights and pixels would give other latents
# What the geometry and the memory of 29 latent frames rest on; other values are another VAE.
FIXED: dict[str, Any] = {
    "z_dim": CHANNELS, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True],
    "patch_size": None, "is_residual": False, "in_channels": 3, "out_channels": 3,
}  # fmt: skip


class MovaVideo(VideoCodec):
    """memory: how far a frame reaches in the encoder, derived by tests/data/test_mova_video.py."""

    memory = 29

    on_device = True
    packages = ("diffusers", "torch")

    def __init__(self, path: Path, config: EncoderConfig, device: str):
        self.path, self.device, self.batch = path, torch.device(device), config.batch
        self.precision, self.dtype = config.video_dtype, dtype_of(config.video_dtype, "encoder.video_dtype")
        self._tiled = config.tiled_decoding
        self.config = vae_config(path)

    @cached_property
    def fingerprint(self) -> str:
        state = hash_state(self._state())
        return fingerprint(PREFIXES["video"], REVISION, self.config, self.precision, self.batch, state)

    def _state(self) -> dict[str, Tensor]:
        state = read_state(self.path)
        return state if self.path.is_dir() else vae_names(state)

    @cached_property
    def _model(self) -> Any:
        from diffusers import AutoencoderKLWan

        kind: Any = AutoencoderKLWan  # untyped
        with torch.device("meta"):
            model = kind.from_config(self.config)
        state = {name: tensor.to(self.dtype) for name, tensor in self._state().items()}
        load_into(model, state, self.path)
        return model.eval().requires_grad_(False)

    @cached_property
    def _scale(self) -> tuple[Tensor, Tensor]:
        """Means and deviations [16, 1, 1, 1]."""
        numbers = (self.config["latents_mean"], self.config["latents_std"])
        mean, deviation = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1) for values in numbers)
        return mean, deviation

    @property
    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self._model.parameters())

    def release(self) -> None:
        if "_model" in self.__dict__:
            self._model.clear_cache()
            self._model.to("cpu")

    def encode(self, pixels: Tensor) -> Tensor:
        _, channels, frames, height, width = pixels.shape
        if channels != 3 or frames % FRAMES != 1 or height % PIXELS or width % PIXELS:
            raise ValueError(f"pixels are {tuple(pixels.shape)}; expected [B, 3, 1 + 4k, multiple of 8, multiple of 8]")
        mean, deviation = self._scale
        parts = []
        with computing(self.device, self.precision):
            model = self._model.to(self.device)
            for group in pixels.split(self.batch):
                mode = model.encode(group.to(self.device, self.dtype)).latent_dist.mode()
                parts.append((mode.float().cpu() - mean) / deviation)
        return torch.cat(parts)

    def decode(self, latents: Tensor) -> Tensor:
        if latents.ndim != 5 or latents.shape[1] != CHANNELS:
            raise ValueError(f"latents are {tuple(latents.shape)}; expected [B, {CHANNELS}, T, h, w]")
        mean, deviation = self._scale
        parts = []
        with computing(self.device, self.precision):
            model = self._model.to(self.device)
            if self._tiled:
                model.enable_tiling()
            try:
                for one in latents:
                    raw = (one.float().cpu() * deviation + mean)[None].to(self.device, self.dtype)
                    parts.append(model.decode(raw, return_dict=False)[0].float().clamp(-1, 1).cpu())
            finally:
                model.disable_tiling()
        return torch.cat(parts)


def vae_config(path: Path) -> dict[str, Any]:
    """Arguments of AutoencoderKLWan: of config.json, or for an original file those of Wan 2.1, which are its defaults.

    CodecError for another VAE, such as that of Wan 2.2's 5B model.
    """
    import inspect

    from diffusers import AutoencoderKLWan

    defaults = {
        name: one.default for name, one in inspect.signature(AutoencoderKLWan.__init__).parameters.items()
        if name != "self" and one.default is not one.empty
    }  # fmt: skip
    given = read_config(path) if path.is_dir() else {}
    config = {name: given.get(name, default) for name, default in defaults.items()}
    config = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    for name, value in FIXED.items():
        if name in config and config[name] != value:
            raise CodecError(f"{path}: {name} is {config[name]}, expected {value}: it is not Wan 2.1's VAE")
    for name in ("latents_mean", "latents_std"):
        numbers = config[name]
        if not isinstance(numbers, list) or len(numbers) != CHANNELS or not all(map(_is_number, numbers)):
            raise CodecError(f"{path}: {name} is {numbers}, expected {CHANNELS} numbers")
    if min(config["latents_std"]) <= 0:
        raise CodecError(f"{path}: latents_std has a number that is not above 0: latents are divided by it")
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def make(place: str, config: EncoderConfig, device: str, text_dim: int | None) -> MovaVideo:
    """From a folder with config.json and safetensors, or from Wan2.1_VAE.pth."""
    path = find_part(place, ("video_vae", "vae"), ("Wan2.1_VAE.pth",), "encoder.video_folder")
    return MovaVideo(path, config, device)
