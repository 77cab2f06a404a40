"""Flow matching over two modalities: timesteps, experts, dropouts and the loss.

x_t = (1 - sigma) x0 + sigma n, the network predicts v = n - x0, t = 1000 sigma. Video and audio have timesteps of
their own, drawn independently for every sample and mapped through the shift of their modality:
sigma = s·u / (1 + (s - 1)·u), u uniform (arXiv 2602.08794, section 4.3). u is continuous in (0, 1); the released
scheduler's table of 1,000 steps is a sampling grid.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TypeVar

import torch
from torch import Tensor

from data.batch import Batch
from model.joint import EXPERTS, JointTransformer
from model.tower import velocity_patches


@dataclass
class ObjectiveConfig:
    """What is learned. conf/objective/phase{1,2,3}.yaml have the paper's values (its Table 7).

    `expert_cycle`: the expert of step k is entry k mod length; a longer list changes the ratio. The paper starts with
    high noise. `boundary`: video timesteps from here on are high noise.

    `hold_video`, `hold_audio`: the shares of samples whose picture or sound is given at zero noise, for the other to be
    learned from it alone (the first only in steps of the expert for low noise); `pair`: the share with both at one
    place of their schedules, as sampling has them. The rest is drawn independently, in the paper all.
    `noise_floor`: the squared errors of samples with a noise level below it count (level / floor)² times (0: all count
    alike), for networks that predict the clean latents.
    """

    shift_video: float = 5.0
    shift_audio: float = 1.0
    video_weight: float = 1.0
    audio_weight: float = 0.2
    text_dropout: float = 0.5
    image_dropout: float = 0.1
    bridge_dropout: float = 0.1
    boundary: float = 900.0
    expert_cycle: list[str] = field(default_factory=lambda: ["high", "low"])
    hold_video: float = 0.0
    hold_audio: float = 0.0
    pair: float = 0.0
    noise_floor: float = 0.0

    def __post_init__(self) -> None:
        shares = (self.hold_video, self.hold_audio, self.pair)
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(
                f"objective.hold_video, hold_audio and pair are {shares}; shares are not negative and sum to 1 at most"
            )
        if not 0.0 <= self.noise_floor < 1.0:
            raise ValueError(f"objective.noise_floor is {self.noise_floor}; give a noise level from 0 to below 1")
        for name in ("text_dropout", "image_dropout", "bridge_dropout"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"objective.{name} is {getattr(self, name)}; a probability lies in 0..1")
        for name in ("shift_video", "shift_audio"):
            if getattr(self, name) <= 0:
                raise ValueError(f"objective.{name} is {getattr(self, name)}; a shift is above 0")
        if not self.expert_cycle or set(self.expert_cycle) - set(EXPERTS):
            raise ValueError(f"objective.expert_cycle is {self.expert_cycle}; its entries are {', '.join(EXPERTS)}")
        if not 0 < self.boundary < 1000:
            raise ValueError(f"objective.boundary is {self.boundary}; it lies between 0 and 1000")


def shift_sigma(u: Tensor, shift: float) -> Tensor:
    """Noise level of a uniform u in 0..1: s·u / (1 + (s - 1)·u)."""
    return shift * u / (1 + (shift - 1) * u)


N = TypeVar("N", float, Tensor)


def unshift_sigma(sigma: N, shift: float) -> N:
    """The u that `shift_sigma` maps to sigma."""
    return sigma / (shift - (shift - 1) * sigma)


class Objective:
    """The objective of a phase for a model with these experts."""

    def __init__(self, config: ObjectiveConfig, experts: tuple[str, ...]) -> None:
        self.config = config
        self.experts = experts

    def expert(self, step: int) -> str:
        """The expert that step `step` (from 0, attempted batches) trains; a model with one expert has only that."""
        if len(self.experts) == 1:
            return self.experts[0]
        cycle = self.config.expert_cycle
        return cycle[step % len(cycle)]

    def expert_at(self, t_video: float) -> str:
        """The expert that serves this video timestep (0..1000)."""
        return self.experts[0] if len(self.experts) == 1 or t_video >= self.config.boundary else self.experts[1]

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
        bounds = [config.hold_video, config.hold_video + config.hold_audio]
        bounds.append(bounds[-1] + config.pair)
        video_given = (u_kind < bounds[0]) & (self.expert_at(0.0) == expert)
        audio_given = (u_kind >= bounds[0]) & (u_kind < bounds[1])
        paired = (u_kind >= bounds[1]) & (u_kind < bounds[2])
        t_video = self.video_timestep(u_video, expert)
        place = unshift_sigma(t_video.double() / 1000, config.shift_video)
        t_audio = self.audio_timestep(torch.where(paired, place, u_audio))
        return t_video.masked_fill(video_given, 0.0), t_audio.masked_fill(audio_given, 0.0)


@dataclass
class Draws:
    """What chance decides for the B samples of a micro-batch."""

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
    video: Tensor  # [B] mean squared error over the sample's video
    audio: Tensor  # [B] mean squared error over the sample's audio
    learned: Tensor  # [2, B] float32: 0 where the sample's video, or audio, is given and nothing is to be predicted


def loss_share(
    model: JointTransformer, batch: Batch, draws: Draws, config: ObjectiveConfig, expert: str, sequence_ranks: int = 1
) -> LossParts:
    """Forward one micro-batch and weigh its samples.

    L = sum_i w_i (lambda_v m_v,i MSE_v,i + lambda_a m_a,i MSE_a,i) / sum_i w_i over the global batch. Weights are
    multiplied in, so every rank runs the same modules; the denominator is known from the index, so nothing is reduced
    before backward. `sequence_ranks` share the video's tokens; each has the whole audio and takes an equal part of its
    error. Computed in the noise's dtype (float32).
    """
    dtype = draws.noise_video.dtype
    video, audio = batch.video.to(dtype), batch.audio.to(dtype)
    sigma_v, sigma_a = draws.t_video.to(dtype) / 1000, draws.t_audio.to(dtype) / 1000  # [B]
    noisy_video = torch.lerp(video, draws.noise_video, sigma_v.view(-1, 1, 1, 1, 1))
    noisy_audio = torch.lerp(audio, draws.noise_audio, sigma_a.view(-1, 1, 1))
    text = torch.where(draws.keep_text.view(-1, 1, 1) > 0, batch.text, batch.empty_text)
    out = model(
        video=noisy_video,
        audio=noisy_audio,
        condition=batch.condition.to(dtype) * draws.keep_image.to(dtype).view(-1, 1, 1, 1, 1),
        text=text,
        t_video=draws.t_video,
        t_audio=draws.t_audio,
        fps=batch.bucket.fps,
        expert=expert,
        bridge_scale=draws.keep_bridge,
        as_patches=True,
    )
    target = velocity_patches(draws.noise_video - video, model.config.video.patch_size)  # [B, L, patch·16]
    mine = target[:, model.token_range(target.shape[1])]
    mse_video = (out.video - mine).square().flatten(1).sum(1) / target[0].numel()  # [B]
    mse_audio = (out.audio - (draws.noise_audio - audio)).square().flatten(1).mean(1) / sequence_ranks
    learned = torch.stack((draws.t_video, draws.t_audio)).gt(0).to(batch.weight.dtype)  # [2, B]
    weight_video = config.video_weight * batch.video_weight * learned[0]
    weight_audio = config.audio_weight * batch.audio_weight * learned[1]
    if config.noise_floor > 0:
        weight_video = weight_video * (sigma_v / config.noise_floor).clamp(max=1).square()
        weight_audio = weight_audio * (sigma_a / config.noise_floor).clamp(max=1).square()
    weighted = weight_video * mse_video + weight_audio * mse_audio
    share = (batch.weight * weighted).sum() / batch.total_weight
    return LossParts(share, mse_video.detach(), mse_audio.detach(), learned)
