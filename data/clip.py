"""One encoded sample and the geometry of a shard, as stored byte for byte.

A sample is two tar members: `<key>.safetensors` (tensors `video`, `audio`, `condition`, each present only where the
modality is) and `<key>.json` (its meta: fps, frames, pixel size, seconds, source, encoder fingerprints, bucket, ...).
"""

import dataclasses
import json
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

VIDEO_CHANNELS = 16
AUDIO_CHANNELS = 128


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Exact geometry of all samples of one shard; for an absent modality, the geometry that its zero tensors take.

    frames, height, width: latent T, H, W; audio_steps: latent steps of sound (La); fps: pixel frames per second.
    """

    frames: int
    height: int
    width: int
    audio_steps: int
    fps: float
    has_video: bool
    has_audio: bool

    def to_dict(self) -> dict[str, Any]:
        """As it stands in json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Bucket":
        """From what to_dict gave. TypeError or ValueError when a field is missing, unknown or of another kind."""
        bucket = cls(**values)
        counts = (bucket.frames, bucket.height, bucket.width, bucket.audio_steps)
        if not all(isinstance(count, int) and count > 0 for count in counts):
            raise ValueError(f"bucket {values} needs positive whole numbers")
        return dataclasses.replace(bucket, fps=float(bucket.fps))

    def __str__(self) -> str:
        parts = "+".join(["video"] * self.has_video + ["audio"] * self.has_audio)
        return f"{self.frames}x{self.height}x{self.width}, sound {self.audio_steps}, {self.fps:g} fps, {parts}"


@dataclasses.dataclass
class EncodedClip:
    """One sample in latents.

    video: [16, T, H, W] bfloat16 or None; audio: [La, 128] bfloat16 or None; condition: [16, T, H, W] bfloat16 or
    None, the latents of the first frame followed by zero frames; meta: json values that describe it.
    """

    key: str
    video: Tensor | None
    audio: Tensor | None
    condition: Tensor | None
    meta: dict[str, Any]

    def to_members(self) -> tuple[bytes, bytes]:
        """The bytes of `<key>.safetensors` and `<key>.json`. The condition's constant tail is stored once."""
        tensors: dict[str, Tensor] = {}
        if self.video is not None:
            tensors["video"] = self.video.to(torch.bfloat16).contiguous()
        if self.audio is not None:
            tensors["audio"] = self.audio.to(torch.bfloat16).contiguous()
        if self.condition is not None:
            tensors["condition"] = collapse_tail(self.condition.to(torch.bfloat16))
        return save(tensors), encode_json(self.meta)

    @classmethod
    def from_members(cls, key: str, st_bytes: bytes, json_bytes: bytes | None, bucket: Bucket) -> "EncodedClip":
        """The sample that to_members wrote; without json_bytes its meta is empty.

        ValueError when the bytes don't parse, or when the tensors are not those of `bucket`.
        """
        try:
            tensors = load(st_bytes)
            meta = json.loads(json_bytes) if json_bytes is not None else {}
        except Exception as error:  # safetensors raises its own class, json a ValueError, a bad header KeyError
            raise ValueError(f"does not parse ({type(error).__name__}: {error})") from error
        grid = (VIDEO_CHANNELS, bucket.frames, bucket.height, bucket.width)
        expected: dict[str, tuple[int, ...]] = {}
        if bucket.has_video:
            expected |= {"video": grid, "condition": grid}
            if "condition" in tensors:
                tensors["condition"] = restore_tail(tensors["condition"], bucket.frames)
        if bucket.has_audio:
            expected["audio"] = (bucket.audio_steps, AUDIO_CHANNELS)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes != expected:
            raise ValueError(f"holds tensors {shapes}, its bucket requires {expected}")
        wrong = {name: tensor.dtype for name, tensor in tensors.items() if tensor.dtype != torch.bfloat16}
        if wrong:
            raise ValueError(f"holds tensors of type {wrong}, expected bfloat16")
        return cls(key, tensors.get("video"), tensors.get("audio"), tensors.get("condition"), meta)

    def not_finite(self) -> str | None:
        """Name of the first tensor that holds NaN or inf, or None."""
        for name, tensor in (("video", self.video), ("audio", self.audio), ("condition", self.condition)):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                return name
        return None


def collapse_tail(condition: Tensor) -> Tensor:
    """[16, T, H, W] -> [16, k + 1, H, W]: k is the first frame from which on all frames are equal bit for bit."""
    bits = condition.contiguous().view(torch.int16)  # bits, not values: -0.0 == 0.0 and NaN != NaN would mislead
    k = bits.shape[1] - 1
    while k > 0 and torch.equal(bits[:, k - 1], bits[:, -1]):
        k -= 1
    return condition[:, : k + 1].contiguous()


def restore_tail(condition: Tensor, frames: int) -> Tensor:
    """Inverse of collapse_tail: repeats the last frame until there are `frames`. ValueError when there are too many."""
    if condition.ndim != 4 or not 1 <= condition.shape[1] <= frames:
        raise ValueError(f"condition has shape {tuple(condition.shape)}, expected 1 to {frames} frames")
    missing = frames - condition.shape[1]
    return torch.cat([condition, condition[:, -1:].expand(-1, missing, -1, -1)], dim=1) if missing else condition


def encode_json(values: dict[str, Any]) -> bytes:
    """One form for equal values, so that shards are reproducible. ValueError for NaN."""
    return json.dumps(values, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


def clip_seconds(bucket: Bucket) -> float:
    """Length of a bucket's clips: the first latent frame is one frame, each other one four."""
    return (1 + 4 * (bucket.frames - 1)) / bucket.fps
