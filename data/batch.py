"""The input of a training step: one micro-batch of one rank, in the model's layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from data.clip import AUDIO_CHANNELS, VIDEO_CHANNELS, Bucket, EncodedClip

MASK_CHANNELS = 4  # of the condition, before its latents: 1 where the picture is given


@dataclass(frozen=True)
class Sample:
    """One slot of a batch. A damaged sample has no clip and no text, and weight 0."""

    key: str
    number: int  # global sample number
    weight: float
    clip: EncodedClip | None
    text: Tensor | None  # [L, D] bfloat16, unpadded


@dataclass
class Batch:
    """One micro-batch of one rank; B samples of one bucket (T, H, W latent, La latent audio steps).

    The bucket is that of the whole global batch, and determines for every rank which modalities run; the weights tell
    which of them a sample has.
    """

    step: int
    bucket: Bucket
    keys: list[str]
    sample_numbers: np.ndarray  # [B] int64, global: noise and timesteps are keyed by them
    video: Tensor  # [B, 16, T, H, W] bfloat16, zeros where there is no video
    audio: Tensor  # [B, 128, La] bfloat16, zeros where there is no audio
    condition: Tensor  # [B, 20, T, H, W] bfloat16: 4 mask channels (1 on latent frame 0), 16 latent channels
    text: Tensor  # [B, text_length, D] bfloat16, zero-padded
    empty_text: Tensor  # [text_length, D] bfloat16, the encoded empty prompt, zero-padded; batches may share it
    weight: Tensor  # [B] float32, 0 for left-over slots and damaged samples
    video_weight: Tensor  # [B] float32, 0 where the sample has no video
    audio_weight: Tensor  # [B] float32, 0 where the sample has no audio
    total_weight: float  # samples of the global batch, damaged ones included: known on every rank without a reduction

    def to(self, device: torch.device) -> Batch:
        """The same with every tensor on a device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})

    def slot(self, slot: int) -> dict[str, Tensor]:
        """The tensors of one slot: views of video, audio, condition (its latents alone) and text."""
        return {
            "video": self.video[slot],
            "audio": self.audio[slot],
            "condition": self.condition[slot, MASK_CHANNELS:],
            "text": self.text[slot],
        }

    def blanked(self, slots: Sequence[int]) -> Batch:
        """A copy with these slots as those of damaged samples: zeros and weight 0 (NaN times 0 would stay NaN)."""
        names = ("video", "audio", "condition", "text", "weight")
        copy = replace(self, **{name: getattr(self, name).clone() for name in names})
        for slot in slots:
            copy.weight[slot] = 0
            for tensor in copy.slot(slot).values():
                tensor.zero_()
        return copy


def unfilled(step: int, bucket: Bucket, count: int, empty_text: Tensor, text_length: int, total_weight: float) -> Batch:
    """A Batch of `count` slots of weight 1 that are still to be filled: latents and text hold anything."""
    grid = (bucket.frames, bucket.height, bucket.width)
    condition = torch.empty(count, MASK_CHANNELS + VIDEO_CHANNELS, *grid, dtype=torch.bfloat16)
    condition[:, :MASK_CHANNELS] = 0
    condition[:, :MASK_CHANNELS, 0] = 1
    return Batch(
        step=step,
        bucket=bucket,
        keys=[""] * count,
        sample_numbers=np.zeros(count, dtype=np.int64),
        video=torch.empty(count, VIDEO_CHANNELS, *grid, dtype=torch.bfloat16),
        audio=torch.empty(count, AUDIO_CHANNELS, bucket.audio_steps, dtype=torch.bfloat16),
        condition=condition,
        text=torch.empty(count, text_length, empty_text.shape[-1], dtype=torch.bfloat16),
        empty_text=pad_text(empty_text, text_length),
        weight=torch.ones(count),
        video_weight=torch.full((count,), float(bucket.has_video)),
        audio_weight=torch.full((count,), float(bucket.has_audio)),
        total_weight=total_weight,
    )


def assemble(
    step: int, bucket: Bucket, samples: Sequence[Sample], empty_text: Tensor, text_length: int, total_weight: float
) -> Batch:
    """Copy samples of one bucket into a Batch. `empty_text` [L0, D]; text beyond `text_length` is cut off.

    A clip may lack what its bucket has: that modality has weight 0 for it then.
    """
    batch = unfilled(step, bucket, len(samples), empty_text, text_length, total_weight)
    for slot, sample in enumerate(samples):
        clip = sample.clip
        slots = batch.slot(slot)
        if clip is not None:
            batch.video_weight[slot] *= clip.video is not None
            batch.audio_weight[slot] *= clip.audio is not None
        _put(slots["video"], None if clip is None else clip.video)
        _put(slots["audio"], None if clip is None or clip.audio is None else clip.audio.T)
        _put(slots["condition"], None if clip is None else clip.condition)
        _put(slots["text"], None if sample.text is None else pad_text(sample.text, text_length))
        batch.keys[slot], batch.sample_numbers[slot], batch.weight[slot] = sample.key, sample.number, sample.weight
    return batch


def _put(target: Tensor, values: Tensor | None) -> None:
    """Write every byte once: zeroing a whole batch first would cost as much as the copies."""
    if values is None:
        target.zero_()
    else:
        target.copy_(values)


def pad_text(text: Tensor, length: int) -> Tensor:
    """[L, D] -> [length, D]: zero rows are added, or what is beyond `length` is cut off; itself where it fits."""
    if len(text) == length:
        return text
    padded = text.new_zeros(length, text.shape[-1])
    padded[: len(text)] = text[:length]
    return padded
