"""Flow matching over two modalities: timesteps, experts, dropouts and the loss.

x_t = (1 - sigma) x0 + sigma n, the network predicts v = n - x0, t = 1000 sigma. Video and audio have timesteps of
their own, drawn independently for every sample and mapped through the shift of their modality
(model/shift.py), u uniform and continuous in (0, 1); the released scheduler's table of 1,000 steps is a sampling grid.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from core.ranges import bounded
from data.batch import Batch
from data.clip import Bucket
from model.joint import EXPERTS, JointTransformer
from model.shift import shift_sigma, unshift_sigma
from model.tower import velocity_patches


@dataclass
class ObjectiveConfig:
    """What is learned. conf/objective/phase{1,2,3}.yaml have the paper's values (its Table 7).

    shift_video: shift of the noise schedule of video
    shift_audio: shift of the noise schedule of audio
    video_weight: weight of the video loss
    audio_weight: weight of the audio loss
    text_dropout: share of samples without their caption
    image_dropout: share of samples without their first frame
    bridge_dropout: share of samples without the Bridge
    boundary: video timesteps from this one on are high noise
    expert_cycle: the expert of step k is entry k mod length; a longer list changes the ratio; the paper starts with
        high
    clean_video_prob: share of samples whose picture is given at zero noise, so that the sound is learned from it alone
        (only in steps of the expert for low noise)
    clean_audio_prob: share of samples whose sound is given at zero noise, so that the picture is learned from it alone
    paired_prob: share of samples with both modalities at the same position of their schedules, as in sampling; the
        others draw independently, as all do in the paper; nothing is given if a sample lacks the other modality
    noise_floor: squared errors of samples with a noise level below it count (level / floor)² times (0: all count
        alike), for networks that predict the clean latents
    balance: whether the errors of each modality are divided by their running mean; weights are then shares of the loss
    balance_decay: decay of that mean at each loss
    """

    shift_video: float = bounded(5.0, "(0, inf)")
    shift_audio: float = bounded(1.0, "(0, inf)")
    video_weight: float = bounded(1.0, "[0, inf)")
    audio_weight: float = bounded(0.2, "[0, inf)")
    text_dropout: float = bounded(0.5, "[0, 1]")
    image_dropout: float = bounded(0.1, "[0, 1]")
    bridge_dropout: float = bounded(0.1, "[0, 1]")
    boundary: float = bounded(900.0, "(0, 1000)")
    expert_cycle: list[str] = field(default_factory=lambda: ["high", "low"])
    clean_video_prob: float = bounded(0.0, "[0, 1]")
    clean_audio_prob: float = bounded(0.0, "[0, 1]")
    paired_prob: float = bounded(0.0, "[0, 1]")
    noise_floor: float = bounded(0.0, "[0, 1)")
    balance: bool = False
    balance_decay: float = bounded(0.99, "[0, 1)")

    def __post_init__(self) -> None:
        shares = (self.clean_video_prob, self.clean_audio_prob, self.paired_prob)
        if sum(shares) > 1:
            raise ValueError(
                f"objective.clean_video_prob, clean_audio_prob and paired_prob are {shares}; their sum may be at most 1"
            )
        if self.video_weight == self.audio_weight == 0:
            raise ValueError("objective.video_weight and audio_weight are both 0: nothing would be learned")
        if not self.expert_cycle or set(self.expert_cycle) - set(EXPERTS):
            raise ValueError(f"objective.expert_cycle is {self.expert_cycle}; its entries are {', '.join(EXPERTS)}")


class Objective:
    """The objective of a phase for a model with these experts."""

    def __init__(self, config: ObjectiveConfig, experts: tuple[str, ...]) -> None:
        self.config = config
        self.experts = experts

    def expert(self, step: int) -> str:
        """The expert that step `step` (from 0, counting attempted batches) trains."""
        if len(self.experts) == 1:
            return self.experts[0]
        cycle = self.config.expert_cycle
        return cycle[step % len(cycle)]

    def expert_at(self, t_video: float) -> str:
        """The expert that serves this video timestep (0..1000)."""
        return self.experts[0] if len(self.experts) == 1 or t_video >= self.config.boundary else self.experts[1]

    def alone(self, batch: Batch) -> Batch:
        """The batch without a modality that is worth nothing (weight 0) and that nothing else reads
        (`bridge_dropout` 1): its tower and the Bridge then do not run, as if no clip of the bucket had it."""
        config, bucket = self.config, batch.bucket
        if config.bridge_dropout < 1 or not (bucket.has_video and bucket.has_audio):
            return batch
        if config.audio_weight == 0:
            silent = replace(bucket, has_audio=False)
            return replace(batch, bucket=silent, audio_weight=torch.zeros_like(batch.audio_weight))
        if config.video_weight == 0:
            one = batch.video[:, :, :1, :1, :1], batch.condition[:, :, :1, :1, :1]  # no noise for what is not there
            blind, none = replace(bucket, has_video=False), torch.zeros_like(batch.video_weight)
            return replace(batch, bucket=blind, video=one[0], condition=one[1], video_weight=none)
        return batch

    def video_timestep(self, u: Tensor, expert: str) -> Tensor:
        """Uniform u [B] -> video timesteps [B] float32 within the expert's part of the shifted schedule."""
        boundary = unshift_sigma(self.config.boundary / 1000, self.config.shift_video)
        if len(self.experts) == 1:
            low, high = 0.0, 1.0
        else:
            low, high = (boundary, 1.0) if expert == "high" else (0.0, boundary)
        t = (1000 * shift_sigma(low + (high - low) * u.double(), self.config.shift_video)).float()
        if len(self.experts) == 1:
            return t
        # Rounding must not carry a sample over the boundary, where the other expert is responsible.
        edge = torch.tensor(self.config.boundary, dtype=torch.float32)
        return t.clamp(min=edge) if expert == "high" else t.clamp(max=torch.nextafter(edge, edge - 1))

    def audio_timestep(self, u: Tensor) -> Tensor:
        """Uniform u [B] -> audio timesteps [B] float32."""
        return (1000 * shift_sigma(u.double(), self.config.shift_audio)).float()

    def timesteps(self, u_video: Tensor, u_audio: Tensor, u_kind: Tensor, expert: str) -> tuple[Tensor, Tensor]:
        """Uniforms [B] float64 -> (t_video, t_audio) [B] float32. A modality that is given has timestep 0."""
        config = self.config
        bounds = [config.clean_video_prob, config.clean_video_prob + config.clean_audio_prob]
        bounds.append(bounds[-1] + config.paired_prob)
        video_given = (u_kind < bounds[0]) & (self.expert_at(0.0) == expert)
        audio_given = (u_kind >= bounds[0]) & (u_kind < bounds[1])
        paired = (u_kind >= bounds[1]) & (u_kind < bounds[2])
        t_video = self.video_timestep(u_video, expert)
        position = unshift_sigma(t_video.double() / 1000, config.shift_video)
        t_audio = self.audio_timestep(torch.where(paired, position, u_audio))
        return t_video.masked_fill(video_given, 0.0), t_audio.masked_fill(audio_given, 0.0)


@dataclass
class Draws:
    """The random draws for the B samples of a micro-batch."""

    t_video: Tensor  # [B] float32, in 0..1000, within the step's expert's range
    t_audio: Tensor  # [B] float32
    noise_video: Tensor  # [B, 16, T, H, W] float32
    noise_audio: Tensor  # [B, 128, La] float32
    keep_text: Tensor  # [B] float32: 0 where the caption is replaced by the empty prompt
    keep_image: Tensor  # [B] float32: 0 where the first frame is withheld
    keep_bridge: Tensor  # [B] float32: 0 where the Bridge adds nothing

    def to(self, device: torch.device) -> Draws:
        """The same on a device."""
        return Draws(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


@dataclass
class LossParts:
    """One micro-batch on one rank: its share of the global loss (with gradient), and without it the samples' errors.

    Under sequence parallelism `video` holds this rank's part of each sample's mean and `audio` its 1/size of it: the
    sums over the group are the means.
    """

    share: Tensor  # scalar; the shares of all micro-batches of all ranks sum to the loss
    video: Tensor  # [B] mean squared error over the sample's video (0 where the bucket has none)
    audio: Tensor  # [B] mean squared error over the sample's audio (likewise)
    learned: Tensor  # [2, B] float32: 0 where the sample's video, or audio, is given and nothing is to be predicted


def loss_share(
    model: JointTransformer,
    batch: Batch,
    draws: Draws,
    config: ObjectiveConfig,
    expert: str,
    sequence_ranks: int = 1,
    scales: tuple[float, float] = (1.0, 1.0),
) -> LossParts:
    """Forward one micro-batch and weigh its samples.

    L = sum_i w_i (lambda_v m_v,i MSE_v,i + lambda_a m_a,i MSE_a,i) / sum_i w_i over the global batch; the denominator
    is known from the index, so nothing is reduced before backward.

    What the bucket lacks does not run, nor does the Bridge: the other tower has the gradient that it has alone, these
    have none, and every rank knows it, since a global batch has one bucket. What single samples lack (m = 0) is not
    read either: zeros stand for it, the Bridge adds nothing to such a sample, and its error is multiplied by 0.

    `scales` multiply the lambdas of video and audio (train/objective/balance.py).
    `sequence_ranks` share the video's tokens; each has the whole audio and takes an equal part of its error. Computed
    in the noise's dtype (float32).
    """
    dtype, bucket = draws.noise_video.dtype, batch.bucket
    seen, heard = batch.video_weight > 0, batch.audio_weight > 0  # [B]
    video, condition = (_only(seen, x.to(dtype)) for x in (batch.video, batch.condition))
    audio = _only(heard, batch.audio.to(dtype))
    sigma_v, sigma_a = draws.t_video.to(dtype) / 1000, draws.t_audio.to(dtype) / 1000  # [B]
    noisy_video = torch.lerp(video, draws.noise_video, sigma_v.view(-1, 1, 1, 1, 1))
    noisy_audio = torch.lerp(audio, draws.noise_audio, sigma_a.view(-1, 1, 1))
    text = torch.where(draws.keep_text.view(-1, 1, 1) > 0, batch.text, batch.empty_text)
    out = model(
        video=noisy_video if bucket.has_video else None,
        audio=noisy_audio if bucket.has_audio else None,
        condition=condition * draws.keep_image.to(dtype).view(-1, 1, 1, 1, 1),
        text=text,
        t_video=draws.t_video,
        t_audio=draws.t_audio,
        fps=bucket.fps,
        expert=expert,
        bridge_scale=draws.keep_bridge * (seen & heard),
        as_patches=True,
    )
    mse_video = mse_audio = torch.zeros_like(sigma_v)
    if out.video is not None:
        target = velocity_patches(draws.noise_video - video, model.config.video.patch_size)  # [B, L, patch·16]
        mine = target[:, model.token_range(target.shape[1])]
        mse_video = (out.video - mine).square().flatten(1).sum(1) / target[0].numel()  # [B]
    if out.audio is not None:
        mse_audio = (out.audio - (draws.noise_audio - audio)).square().flatten(1).mean(1) / sequence_ranks
    learned = torch.stack((draws.t_video, draws.t_audio)).gt(0).to(batch.weight.dtype)  # [2, B]
    weight_video = config.video_weight * scales[0] * batch.video_weight * learned[0]
    weight_audio = config.audio_weight * scales[1] * batch.audio_weight * learned[1]
    if config.noise_floor > 0:
        weight_video = weight_video * (sigma_v / config.noise_floor).clamp(max=1).square()
        weight_audio = weight_audio * (sigma_a / config.noise_floor).clamp(max=1).square()
    weighted = weight_video * mse_video + weight_audio * mse_audio
    share = (batch.weight * weighted).sum() / batch.total_weight
    return LossParts(share, mse_video.detach(), mse_audio.detach(), learned)


def _only(present: Tensor, latents: Tensor) -> Tensor:
    """Latents [B, ...] of the samples that have them (present [B]), zeros for the others, whatever stood there."""
    return latents.masked_fill(~present.view(-1, *[1] * (latents.dim() - 1)), 0)


NOISE_BINS = 10  # of the noise levels from 0 to 1


def noise_bins(t: Tensor, mse: Tensor, weight: Tensor) -> Tensor:
    """[NOISE_BINS, 2] float64: weighted sum of errors [B], and sum of weights, by the noise level of timesteps [B]."""
    bins = (t / (1000 / NOISE_BINS)).long().clamp(max=NOISE_BINS - 1)
    found = torch.zeros(NOISE_BINS, 2, dtype=torch.float64, device=mse.device)
    return found.index_add_(0, bins, torch.stack([weight * mse, weight], dim=1).to(torch.float64))


@dataclass
class StepLosses:
    """This rank's sums over its micro-batches, on the device; summed over ranks they describe the global batch."""

    share: Tensor  # scalar, the share of the loss
    video: Tensor  # [2]: weighted sum of per-sample MSE, sum of weights
    audio: Tensor  # [2]
    noise: Tensor  # [2, NOISE_BINS, 2]: the same by noise level, of video and of audio
    bucket: Bucket  # of the global batch
    inputs: list[tuple[list[str], Tensor]]  # keys of each micro-batch, and [B] whether the sample's latents are finite

    def damaged(self) -> list[str]:
        """Keys of samples whose latents are not finite. Waits for the device: ask only after a non-finite step."""
        return [
            key for keys, finite in self.inputs for key, good in zip(keys, finite.tolist(), strict=True) if not good
        ]
