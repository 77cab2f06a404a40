"""A synchronization scorer that learns from one's own clips (mova train-sync).

Two small encoders turn picture and sound into evidence vectors, 24 a second: the picture from grey frames and their
changes, the sound from log-mel energies. The evidence for a lag is the sum, over the time that both cover at that lag,
of the dot products of what is seen and what is heard; a softmax over all lags within 1.25 s and "these do not belong
together" makes it a probability. Time that only one side covers adds no evidence, so that a shift leaves no trace at
the ends of a window to be learned instead of the events. Colours are not seen: pitch can't be guessed from them.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, pad
from torchaudio.functional import melscale_fbanks

from data.errors import DataError
from data.sync.inputs import SAMPLE_RATE, check_window, is_silent, luma, need_file, retime

FORMAT = "mova-sync-1"  # raised when the same weights would give other scores
RATE = 24  # evidence vectors a second
STEPS = 4  # spectra an evidence vector
REACH = 30  # evidence steps of lag that are told apart, to either side
NEAR = 2  # steps of lag that count as in step: 0.083 s
SPECTRUM = 512  # samples of a spectrum (32 ms)
LEAST = 24  # evidence steps that a window needs
CHUNK = 64  # frames that are resized at a time


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the network; they are stored with the weights."""

    size: int = 48  # pixels a side of the grey pictures, a multiple of 8
    mels: int = 32
    channels: int = 16  # of the first picture convolution; the next have twice and three times as many
    width: int = 64  # of an evidence vector


class ResidualConvolution(nn.Module):
    """Residual convolution over time: [B, C, T] -> [B, C, T]."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.conv_in = nn.Conv1d(width, width, 5, padding=2)
        self.conv_out = nn.Conv1d(width, width, 1)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = x + self.conv_out(gelu(self.conv_in(self.norm(x))))
        return out


class SyncNetwork(nn.Module):
    """The two encoders and the evidence between them."""

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.config = config
        c, side = config.channels, config.size // 8
        self.picture = nn.Sequential(
            nn.Conv2d(2, c, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv2d(c, 2 * c, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(2 * c, 3 * c, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(3 * c * side * side, config.width),
        )
        self.picture_time = nn.Sequential(*(ResidualConvolution(config.width) for _ in range(3)))
        self.sound = nn.Sequential(
            nn.Conv1d(config.mels, config.width, 5, padding=2),
            nn.GELU(),
            nn.Conv1d(config.width, config.width, 4, stride=2, padding=1),
            nn.GELU(),
            nn.Conv1d(config.width, config.width, 4, stride=2, padding=1),
        )
        self.sound_time = nn.Sequential(*(ResidualConvolution(config.width) for _ in range(3)))
        self.scale = nn.Parameter(torch.tensor(math.log(0.1 / math.sqrt(config.width))))
        self.apart = nn.Parameter(torch.zeros(()))  # evidence for "do not belong together"

    def see(self, pictures: Tensor) -> Tensor:
        """[B, T, size, size] of prepare_pictures -> [B, T, width]."""
        change = pad(pictures[:, 1:] - pictures[:, :-1], (0, 0, 0, 0, 1, 0))
        both = torch.stack([0.3 * pictures, 2 * change], 2).flatten(0, 1)
        features = self.picture(both.contiguous(memory_format=torch.channels_last)).unflatten(0, pictures.shape[:2])
        out: Tensor = self.picture_time(features.transpose(1, 2)).transpose(1, 2)
        return out

    def hear(self, spectra: Tensor) -> Tensor:
        """[B, mels, T·STEPS] of prepare_sound -> [B, T, width]."""
        out: Tensor = self.sound_time(self.sound(spectra)).transpose(1, 2)
        return out

    def evidence(self, seen: Tensor, heard: Tensor) -> Tensor:
        """[I, T, width], [J, T, width] -> [I, J, 2·REACH + 1]: for every pair and lag -REACH..REACH."""
        length = seen.shape[1]
        products = torch.einsum("itd,jsd->ijts", seen.flip(1), heard) * self.scale.exp()
        # skewed: appending `length` zeros to each row and cutting rows of 2·length - 1 puts equal lags into one column
        skewed = pad(products, (0, length)).flatten(-2)[..., :-length].unflatten(-1, (length, 2 * length - 1))
        return pad(skewed.sum(-2), (REACH - length + 1, REACH - length + 1))  # cuts where negative

    def logits(self, seen: Tensor, heard: Tensor) -> Tensor:
        """[I, J, 2·REACH + 2]: all lags, then "do not belong together"."""
        evidence = self.evidence(seen, heard)
        return torch.cat([evidence, self.apart.expand(*evidence.shape[:2], 1)], -1)


def small_pictures(frames: Tensor, fps: float, size: int) -> Tensor:
    """[F, 3 or 1, H, W] in [-1, 1] at fps -> [T, size, size] grey in [-1, 1] at RATE, the whole picture squeezed."""
    frames = retime(frames, fps, RATE)
    parts = [
        interpolate(luma(part)[:, None], (size, size), mode="bilinear", antialias=True, align_corners=False)[:, 0]
        for part in frames.split(CHUNK)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, size, size)


def prepare_pictures(pictures: Tensor) -> Tensor:
    """[..., T, size, size] grey -> the same, mean 0 and about deviation 1 over a window: exposure doesn't matter."""
    centred = pictures - pictures.mean((-3, -2, -1), keepdim=True)
    return centred / (centred.square().mean((-3, -2, -1), keepdim=True).sqrt() + 0.05)


def prepare_sound(waveform: Tensor, steps: int, mels: int) -> Tensor:
    """[..., n] at 16 kHz -> log-mel energies [..., mels, steps·STEPS], relative to the window: volume doesn't matter.

    Spectra stand at (i + 1/2) / (RATE·STEPS) seconds; where the waveform is too short it is continued with silence.
    """
    half = SPECTRUM // 2
    centres = ((torch.arange(steps * STEPS) + 0.5) * SAMPLE_RATE / (RATE * STEPS)).round().long()
    needed = int(centres[-1]) + half if steps else 0
    padded = pad(waveform, (half, max(0, needed - waveform.shape[-1])))
    pieces = padded[..., centres[:, None] + torch.arange(SPECTRUM)] * torch.hann_window(SPECTRUM)
    energy = torch.view_as_real(torch.fft.rfft(pieces)).square().sum(-1) @ _bank(mels)
    floor = 1e-4 * energy.amax((-2, -1), keepdim=True) + 1e-12
    level = torch.log(energy + floor)
    return ((level - level.mean((-2, -1), keepdim=True)) / 3).transpose(-1, -2)


@lru_cache
def _bank(mels: int) -> Tensor:
    out: Tensor = melscale_fbanks(SPECTRUM // 2 + 1, 30.0, SAMPLE_RATE / 2, mels, SAMPLE_RATE, mel_scale="slaney")
    return out


def judge(logits: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 2·REACH + 2] -> (probability of being in step, most probable lag in seconds), each [...]."""
    share = torch.softmax(logits.double(), -1)
    in_step = share[..., REACH - NEAR : REACH + NEAR + 1].sum(-1)
    # relative to the best lag: for sounds that belong elsewhere the shares of all lags may be too small to compare
    lags = torch.softmax(logits[..., :-1].double(), -1)
    smooth = pad(lags, (1, 1)).unfold(-1, 3, 1).sum(-1)
    best = smooth.argmax(-1, keepdim=True)
    near = (best + torch.arange(-1, 2, device=best.device)).clamp(0, 2 * REACH)
    weight = lags.gather(-1, near)
    lag = ((near - REACH) * weight).sum(-1) / weight.sum(-1) / RATE
    return in_step, lag


class LearnedScorer:
    """learned_sync: probability (0..1) that the sound belongs to the picture and lags less than 0.1 s; learned_lag: its
    most probable lag in seconds (positive: the sound is late), to be believed only where the sound belongs there.

    weights: file of data.train_sync; `quality` is what was measured then. DataError for a missing or another file.
    """

    name = "learned"
    keys: tuple[str, ...] = ("learned_sync", "learned_lag")
    colour = False

    def __init__(self, weights: str | None):
        path = need_file(weights, "train one on your clips: mova train-sync source=DIR output=FILE")
        self.network, self.quality = load_network(Path(path))
        self.fingerprint = f"learned-{FORMAT}-{hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}"

    def score(self, frames: Tensor, waveform: Tensor, fps: float) -> dict[str, float]:
        """See SyncScorer. NaN when nothing sounds or the window is shorter than a second."""
        check_window(frames, waveform, fps)
        pictures = small_pictures(frames, fps, self.network.config.size)
        if len(pictures) < LEAST or is_silent(waveform):
            return dict.fromkeys(self.keys, math.nan)
        with torch.inference_mode():
            seen = self.network.see(prepare_pictures(pictures)[None])
            heard = self.network.hear(prepare_sound(waveform.float(), len(pictures), self.network.config.mels)[None])
            in_step, lag = judge(self.network.logits(seen, heard)[0, 0])
        return {"learned_sync": float(in_step), "learned_lag": float(lag)}


def pack_network(network: SyncNetwork, quality: dict[str, float]) -> bytes:
    """Weights, sizes and quality as one safetensors file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    text = {"format": FORMAT, "network": json.dumps(asdict(network.config)), "quality": json.dumps(quality)}
    return save(tensors, text)


def load_network(path: Path) -> tuple[SyncNetwork, dict[str, float]]:
    """The network (for inference) and its measured quality. DataError when the file is no scorer of this version."""
    remedy = "train it again: mova train-sync source=DIR output=FILE"
    try:
        with safe_open(str(path), "pt") as file:
            text = file.metadata() or {}
            if text.get("format") != FORMAT:
                raise DataError(f"{path} has format {text.get('format')}, this version reads {FORMAT}; {remedy}")
            network = SyncNetwork(NetworkConfig(**json.loads(text["network"])))
            network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise DataError(f"{path} is no sync scorer ({type(error).__name__}: {first}); {remedy}") from error
    return network.eval().requires_grad_(False), json.loads(text["quality"])
