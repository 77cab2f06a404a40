"""The network of the continuous DAC VAE (Kumar et al., High-Fidelity Audio Compression with Improved RVQGAN, 2023,
with a normal posterior instead of its quantizers), under the names of the published weights.

Weight norm is folded into the weights when they are read: `fused` takes both published forms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.ranges import bounded

DILATIONS = (1, 3, 9)


@dataclass(frozen=True)
class DacConfig:
    """The released sizes. The rates are strides: their product is the samples of a latent."""

    encoder_dim: int = bounded(128, "[1, inf)")
    encoder_rates: list[int] = bounded([2, 3, 4, 5, 8], "[1, inf)")
    latent_dim: int = bounded(128, "[1, inf)")
    decoder_dim: int = bounded(2048, "[1, inf)")
    decoder_rates: list[int] = bounded([8, 5, 4, 3, 2], "[1, inf)")
    sample_rate: int = bounded(48000, "[1, inf)")

    @property
    def hop(self) -> int:
        return math.prod(self.encoder_rates)


class Snake(nn.Module):
    """x + sin(alpha x)^2 / alpha, for [B, C, T]; alpha for each channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.alpha + 1e-9).reciprocal() * torch.sin(self.alpha * x).pow(2)


class Residual(nn.Module):
    """[B, C, T] -> [B, C, T]."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.block = nn.Sequential(
            Snake(channels),
            nn.Conv1d(channels, channels, 7, dilation=dilation, padding=3 * dilation),
            Snake(channels),
            nn.Conv1d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.block(x)
        return x + inner


class Down(nn.Module):
    """[B, C, T] -> [B, 2C, T / rate]."""

    def __init__(self, channels: int, rate: int):
        super().__init__()
        self.block = nn.Sequential(
            *(Residual(channels, dilation) for dilation in DILATIONS),
            Snake(channels),
            nn.Conv1d(channels, 2 * channels, 2 * rate, stride=rate, padding=math.ceil(rate / 2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out


class Up(nn.Module):
    """[B, C, T] -> [B, C / 2, T * rate]; output_padding makes that exact for odd rates."""

    def __init__(self, channels: int, rate: int):
        super().__init__()
        half = channels // 2
        self.block = nn.Sequential(
            Snake(channels),
            nn.ConvTranspose1d(
                channels, half, 2 * rate, stride=rate, padding=math.ceil(rate / 2), output_padding=rate % 2
            ),
            *(Residual(half, dilation) for dilation in DILATIONS),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out


class Encoder(nn.Module):
    """[B, 1, samples] -> [B, latent_dim, steps]."""

    def __init__(self, config: DacConfig):
        super().__init__()
        width = config.encoder_dim
        layers: list[nn.Module] = [nn.Conv1d(1, width, 7, padding=3)]
        for rate in config.encoder_rates:
            layers.append(Down(width, rate))
            width *= 2
        self.block = nn.Sequential(*layers, Snake(width), nn.Conv1d(width, config.latent_dim, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out


class Decoder(nn.Module):
    """[B, latent_dim, steps] -> [B, 1, samples] in [-1, 1]."""

    def __init__(self, config: DacConfig):
        super().__init__()
        width = config.decoder_dim
        layers: list[nn.Module] = [nn.Conv1d(config.latent_dim, width, 7, padding=3)]
        for rate in config.decoder_rates:
            layers.append(Up(width, rate))
            width //= 2
        self.model = nn.Sequential(*layers, Snake(width), nn.Conv1d(width, 1, 7, padding=3), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out


class Dac(nn.Module):
    """The autoencoder. Latents are the mean of the posterior."""

    def __init__(self, config: DacConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv1d(config.latent_dim, 2 * config.latent_dim, 1)
        self.post_quant_conv = nn.Conv1d(config.latent_dim, config.latent_dim, 1)

    def encode(self, waveforms: Tensor) -> Tensor:
        """[B, samples] -> means [B, latent_dim, steps]; zeros fill the last step."""
        missing = -waveforms.shape[-1] % self.config.hop
        padded = nn.functional.pad(waveforms, (0, missing))
        moments: Tensor = self.quant_conv(self.encoder(padded[:, None]))
        return moments.chunk(2, dim=1)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """[B, latent_dim, steps] -> [B, steps * hop]."""
        sound: Tensor = self.decoder(self.post_quant_conv(latents))
        return sound[:, 0]


def fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with plain weights: weight norm (weight_g and weight_v, or torch's parametrizations of them) is
    multiplied out, v g / |v| over all but the first axis. Half a pair is left as it is, under its name."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.replace("parametrizations.weight.original0", "weight_g")
        found[name.replace("parametrizations.weight.original1", "weight_v")] = tensor
    plain = dict(found)
    for name in [name for name in found if name.endswith(".weight_v") and f"{name[:-1]}g" in found]:
        v, g = plain.pop(name), plain.pop(f"{name[:-1]}g")
        plain[name.removesuffix("_v")] = torch._weight_norm(v.float(), g.float(), 0)
    return plain
