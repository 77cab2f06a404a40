"""SyncNet (Chung and Zisserman, "Out of time: automated lip sync in the wild", 2016) for talking faces.

The network of the published weights `syncnet_v2.model` and their way of scoring: pictures of a face, 224 x 224 at
25 fps, five at a time, against 0.2 s of sound as 13 x 20 MFCCs; distances of 1024-dimensional embeddings over shifts of
up to 15 frames. LSE-D is the smallest mean distance, LSE-C the median minus the smallest: small LSE-D and large LSE-C
mean lips in step. The weights come from a local file; nothing is downloaded.

The windows must show one face that fills the picture, as the published crops do: there is no face detector here. On
anything else the numbers mean nothing.
"""

import hashlib
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, pairwise_distance
from torchaudio.functional import create_dct

from data.errors import DataError
from data.sync.inputs import SAMPLE_RATE, check_window, is_silent, need_file, retime

VERSION = 1  # raised when the same weights would give other scores
FPS = 25
SIDE = 224  # pixels
FRAMES = 5  # an embedding sees
SPECTRA = 20  # of 10 ms, an embedding hears; they begin with its first frame
HOP = SAMPLE_RATE // FPS // 4  # samples between MFCCs
SHIFT = 15  # frames to either side
BATCH = 16  # embeddings at a time
WEIGHTS = "syncnet_v2.model"

# (channels, kernel, stride, padding, pool: kernel, stride, padding) of each convolution; published sizes
SOUND = (
    (64, (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1), (0, 0))),
    (192, (3, 3), (1, 1), (1, 1), ((3, 3), (1, 2), (0, 0))),
    (384, (3, 3), (1, 1), (1, 1), None),
    (256, (3, 3), (1, 1), (1, 1), None),
    (256, (3, 3), (1, 1), (1, 1), ((3, 3), (2, 2), (0, 0))),
    (512, (5, 4), (1, 1), (0, 0), None),
)
PICTURE = (
    (96, (5, 7, 7), (1, 2, 2), (0, 0, 0), ((1, 3, 3), (1, 2, 2), (0, 0, 0))),
    (256, (1, 5, 5), (1, 2, 2), (0, 1, 1), ((1, 3, 3), (1, 2, 2), (0, 1, 1))),
    (256, (1, 3, 3), (1, 1, 1), (0, 1, 1), None),
    (256, (1, 3, 3), (1, 1, 1), (0, 1, 1), None),
    (256, (1, 3, 3), (1, 1, 1), (0, 1, 1), ((1, 3, 3), (1, 2, 2), (0, 0, 0))),
    (512, (1, 6, 6), (1, 1, 1), (0, 0, 0), None),
)


class SyncNet(nn.Module):
    """The two streams; parameter names are those of the published weights."""

    def __init__(self) -> None:
        super().__init__()
        self.netcnnaud = _convolutions(1, SOUND, nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d)
        self.netfcaud = _head()
        self.netcnnlip = _convolutions(3, PICTURE, nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d)
        self.netfclip = _head()

    def hear(self, spectra: Tensor) -> Tensor:
        """[N, 1, 13, 20] MFCCs -> [N, 1024]."""
        out: Tensor = self.netfcaud(self.netcnnaud(spectra).flatten(1))
        return out

    def see(self, pictures: Tensor) -> Tensor:
        """[3, F, 224, 224] BGR in 0..255 -> [F - 4, 1024]: all windows of five frames in one pass.

        Only the first convolution reaches over time, so this equals the network on each window alone.
        """
        out: Tensor = self.netfclip(self.netcnnlip(pictures[None])[0, :, :, 0, 0].T)
        return out


class SyncNetScorer:
    """lse_d, lse_c: see the module; syncnet_offset: frames of 1/25 s by which the sound is early (published sign).

    weights: the published syncnet_v2.model, or another state dict of these names. DataError: missing or wrong file.
    """

    name = "syncnet"
    keys: tuple[str, ...] = ("syncnet_offset", "lse_d", "lse_c")
    colour = True

    def __init__(self, weights: str | None):
        path = Path(need_file(weights, f"get {WEIGHTS} of the SyncNet authors' syncnet_python and name its local path"))
        self.network = load_weights(path)
        self.fingerprint = f"syncnet-{VERSION}-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"

    def score(self, frames: Tensor, waveform: Tensor, fps: float) -> dict[str, float]:
        """See SyncScorer; the frames must show one face. NaN when nothing sounds or the window is too short."""
        check_window(frames, waveform, fps, colour=True)
        pictures = retime(frames, fps, FPS)
        count = min(len(pictures), len(waveform) // (SAMPLE_RATE // FPS)) - FRAMES
        if count < 1 or is_silent(waveform):
            return dict.fromkeys(self.keys, math.nan)
        with torch.inference_mode():
            seen = [
                self.network.see(face_pictures(pictures[i : min(i + BATCH, count) + FRAMES - 1]))
                for i in range(0, count, BATCH)
            ]
            windows = mfcc(waveform).float().T.unfold(1, SPECTRA, SPECTRA // FRAMES)  # [13, N, 20]
            spectra = windows[:, :count].transpose(0, 1)[:, None]
            heard = [self.network.hear(part) for part in spectra.split(BATCH)]
            offset, distance, confidence = compare(torch.cat(seen), torch.cat(heard))
        return {"syncnet_offset": float(offset), "lse_d": distance, "lse_c": confidence}


def load_weights(path: Path) -> SyncNet:
    """The network for inference. DataError when the file does not hold exactly its parameters."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
        first = str(error).splitlines()[0][:200] if str(error) else ""
        raise DataError(
            f"{path} is no file of weights ({type(error).__name__}: {first}); get {WEIGHTS} again"
        ) from error
    network = SyncNet()
    expected = network.state_dict()
    found = loaded if isinstance(loaded, dict) else {}
    wrong = [
        name
        for name, tensor in expected.items()
        # counters of training steps: old files lack them and nothing reads them
        if not name.endswith("num_batches_tracked")
        and (not isinstance(found.get(name), Tensor) or found[name].shape != tensor.shape)
    ]
    wrong += [str(name) for name in found if name not in expected]
    if wrong:
        raise DataError(f"{path} holds other weights than {WEIGHTS}: {', '.join(wrong[:4])} and {len(wrong)} in all")
    network.load_state_dict({**expected, **found})
    return network.eval().requires_grad_(False)


def face_pictures(frames: Tensor) -> Tensor:
    """[F, 3, H, W] RGB in [-1, 1] -> [3, F, 224, 224] BGR in 0..255, the centre square of each."""
    height, width = frames.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = frames[:, :, top : top + side, left : left + side].float()
    if side != SIDE:
        square = interpolate(square, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
    return ((square.flip(1) + 1) * 127.5).clamp(0, 255).transpose(0, 1)


def mfcc(waveform: Tensor) -> Tensor:
    """[n] in [-1, 1] at 16 kHz -> [frames, 13] float64: the defaults of python_speech_features 0.6 on 16-bit samples.

    25 ms every 10 ms without a window, pre-emphasis 0.97, 512-point spectra, 26 triangles from 0 to 8 kHz whose corners
    are whole bins, lifter 22, the first coefficient replaced by the log energy.
    """
    signal = (waveform.double() * 32768).round().clamp(-32768, 32767)
    signal = torch.cat([signal[:1], signal[1:] - 0.97 * signal[:-1]])
    length, tiny = SAMPLE_RATE // 40, torch.finfo(torch.float64).eps
    count = 1 + max(0, -(-(len(signal) - length) // HOP))
    pieces = pad(signal, (0, max(0, (count - 1) * HOP + length - len(signal)))).unfold(0, length, HOP)[:count]
    power = torch.fft.rfft(pieces, 512).abs().square() / 512
    energy = power.sum(1)
    bands = power @ _triangles(26, 512).T
    bands = torch.where(bands == 0, tiny, bands).log()
    out = bands @ create_dct(13, 26, norm="ortho").double()
    out = out * (1 + 11 * torch.sin(math.pi * torch.arange(13, dtype=torch.float64) / 22))
    out[:, 0] = torch.where(energy == 0, tiny, energy).log()
    result: Tensor = out
    return result


def compare(seen: Tensor, heard: Tensor) -> tuple[int, float, float]:
    """Embeddings [N, D] each -> (offset in frames, LSE-D, LSE-C). Zeros stand where nothing was heard, as published."""
    around = pad(heard, (0, 0, SHIFT, SHIFT))
    shifts = range(2 * SHIFT + 1)
    mean = torch.stack([pairwise_distance(seen, around[k : k + len(seen)]).mean() for k in shifts])
    best = int(mean.argmin())
    return SHIFT - best, float(mean[best]), float(mean.median() - mean[best])


def _convolutions(channels: int, layers: tuple[Any, ...], convolution: type, norm: type, pool: type) -> nn.Sequential:
    """Each layer: convolution, batch norm, ReLU and, where the table has one, a pool; numbered through."""
    modules: list[nn.Module] = []
    for out, kernel, stride, padding, pooling in layers:
        modules += [convolution(channels, out, kernel, stride, padding), norm(out), nn.ReLU()]
        if pooling:
            modules.append(pool(*pooling))
        channels = out
    return nn.Sequential(*modules)


def _head() -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 1024))


def _triangles(count: int, points: int) -> Tensor:
    """[count, points / 2 + 1] mel bands; corners are rounded down to bins, unlike torchaudio's."""
    mel = torch.linspace(0, 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700), count + 2, dtype=torch.float64)
    corners = ((points + 1) * 700 * (10 ** (mel / 2595) - 1) / SAMPLE_RATE).floor()
    low, middle, high = (corners[i : i + count, None] for i in range(3))
    bins = torch.arange(points // 2 + 1, dtype=torch.float64)
    rise = torch.where((bins >= low) & (bins < middle), (bins - low) / (middle - low), 0.0)
    return torch.where((bins >= middle) & (bins < high), (high - bins) / (high - middle), rise)
