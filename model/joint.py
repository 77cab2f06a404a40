"""The joint video-audio transformer: two video experts, one audio tower, one Bridge.

model = JointTransformer(config)
out = model(video=noisy, audio=noisy_a, condition=y, text=text, t_video=t, t_audio=ta, expert="high")
out.video, out.audio                                    # velocities, shaped like the inputs
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from core.ranges import bounded
from model.attention import Attention, DenseCore
from model.backends.interface import Backend
from model.bridge import Bridge, BridgeConfig, DenseFrameCore, ProbeAttention
from model.rope import bridge_rotary
from model.tower import Tower, TowerConfig, patchify, unpatchify, velocity_patches

EXPERTS = ("high", "low")
PREDICTIONS = ("velocity", "sample")
LEAST_NOISE = 0.05  # a noise level below it is taken as this one where a velocity is made from a clean sample


@dataclass
class JointConfig:
    """Sizes and switches of the network.

    two_experts: a second video expert, for low noise, beside the one for high noise
    text_length: rows that a caption is zero-padded to; all of them are attended, as in the reference
    prediction: what the heads predict: "velocity", as in the reference, or "sample": the clean latents, which a narrow
        network can hold where it could not hold all of the noise (arXiv 2511.13720); the outputs are velocities either
    way

    ValueError when audio is deeper than video (the reference silently skips the blocks in excess) or video is not.
    """

    video: TowerConfig
    audio: TowerConfig
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    two_experts: bool = True
    text_length: int = bounded(512, "[1, inf)")
    prediction: str = "velocity"

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"model.prediction {self.prediction!r} is not one of {', '.join(PREDICTIONS)}")
        if self.video.rope != "video" or self.audio.rope == "video":
            raise ValueError(
                f"rope is {self.video.rope!r} for video and {self.audio.rope!r} for audio; see TowerConfig"
            )
        if self.audio.num_layers > self.video.num_layers:
            raise ValueError(
                f"audio has {self.audio.num_layers} blocks, video only {self.video.num_layers}: "
                "the blocks in excess would have no partner; make video at least as deep"
            )
        if self.video.text_dim != self.audio.text_dim:
            raise ValueError(f"text_dim differs: video {self.video.text_dim}, audio {self.audio.text_dim}")

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the video experts that exist."""
        return EXPERTS if self.two_experts else EXPERTS[:1]


@dataclass
class Velocities:
    """The network's output: video [B, 16, T, H, W] and audio [B, C, La] velocities (noise minus clean), or None.

    With `as_patches` video is [B, L, prod(patch)·16] instead, for this rank's L tokens (see `tower.velocity_patches`).
    """

    video: Tensor | None
    audio: Tensor | None


class JointTransformer(nn.Module):
    """MOVA's joint diffusion transformer (arXiv 2602.08794, section 3). Children carry the reference's names."""

    def __init__(self, config: JointConfig) -> None:
        super().__init__()
        self.config = config
        self.video_dit = Tower(config.video)
        self.video_dit_2 = Tower(config.video) if config.two_experts else None
        self.audio_dit = Tower(config.audio)
        self.dual_tower_bridge = Bridge(config.bridge, config.video.dim, config.audio.dim, config.audio.num_layers)
        # The one place where video tokens are sharded: maps the number of tokens to the slice of this rank.
        self.token_range: Callable[[int], slice] = _all_tokens
        # Least precision of the hidden states from block to block (None: that of the weights), as in `keep_residual`.
        self.residual: torch.dtype | None = None

    def expert(self, name: str) -> Tower:
        """The video tower called "high" (noise) or "low". ValueError for one that this model does not have."""
        tower = {"high": self.video_dit, "low": self.video_dit_2}.get(name)
        if tower is None:
            raise ValueError(f"expert {name!r} does not exist; this model has {', '.join(self.config.experts)}")
        return tower

    def use_attention(self, backend: Backend) -> None:
        """Use this backend in every attention."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.core = DenseCore(backend)
            elif isinstance(module, ProbeAttention):
                module.core = DenseFrameCore(backend)

    def keep_residual(self, dtype: torch.dtype) -> None:
        """Keep the hidden states between blocks, what is added to them, modulation and gates in at least `dtype`, as
        Wan does in float32, whatever the linears and attention compute in."""
        self.residual = dtype

    def _stream(self, x: Tensor) -> Tensor:
        return x if self.residual is None else x.to(torch.promote_types(x.dtype, self.residual))

    def forward(
        self,
        *,
        video: Tensor | None,
        audio: Tensor | None,
        condition: Tensor | None,
        text: Tensor,
        t_video: Tensor | None,
        t_audio: Tensor | None,
        fps: float = 24.0,
        expert: str = "high",
        text_audio: Tensor | None = None,
        bridge_scale: Tensor | None = None,
        as_patches: bool = False,
    ) -> Velocities:
        """Velocities of noisy latents; a timestep per sample and modality.

        video [B, 16, T, H, W] with condition [B, 20, T, H, W] (4 mask channels, 16 of the first frame's latents) and
        t_video [B] in 0..1000; audio [B, C, La] with t_audio [B]; text [B, Lt, D] for both towers unless text_audio
        is given; bridge_scale [B] multiplies what the Bridge adds. `video` or `audio` may be None: its tower and the
        Bridge then do not run. Outputs: float32 at least. `as_patches`: the video's as patches of this rank's tokens.
        """
        _check_given(video, audio, condition, t_video, t_audio)
        tower, sound = self.expert(expert), self.audio_dit

        if video is not None:
            assert condition is not None and t_video is not None
            grid = tower.token_grid(video)  # (frames, rows, columns) in tokens
            mine = self.token_range(math.prod(grid))
            if not as_patches and mine != _all_tokens(math.prod(grid)):
                raise RuntimeError(f"this rank has the tokens {mine.start} to {mine.stop} only; ask for as_patches")
            stacked = torch.cat((video, condition.to(video.dtype)), dim=1)  # [B, 36, T, H, W]
            x = self._stream(tower.embed(patchify(stacked, tower.config.patch_size)[:, mine]))  # [B, Lv, dv]
            vector, time = tower.embed_time(t_video)  # [B, dv], [B, 6, dv]
            context = tower.embed_text(text)
            rotary = tower.rotary(grid, video.device).rows(mine)
        if audio is not None:
            assert t_audio is not None
            grid_a = sound.token_grid(audio)
            a = self._stream(sound.embed(patchify(audio, sound.config.patch_size)))  # [B, La, da]
            vector_a, time_a = sound.embed_time(t_audio)
            context_a = sound.embed_text(text if text_audio is None else text_audio)
            rotary_a = sound.rotary(grid_a, audio.device)

        bridge, bridge_v, bridge_a = self.dual_tower_bridge, None, None
        bridged = set(bridge.layers) if video is not None and audio is not None else set()
        if bridged and bridge.config.cross_rope:
            bridge_v, bridge_a = bridge_rotary(
                grid, grid_a[0], bridge.config.head_dim, fps, bridge.config.audio_fps,
                bridge.config.first_frame_bias, x.device,
                (self.config.video.patch_size[0], self.config.audio.patch_size[0]),
            )  # fmt: skip
            bridge_v = bridge_v.rows(mine)

        for i in range(self.config.video.num_layers):
            if i in bridged:
                x, a = bridge(i, x, a, bridge_v, bridge_a, grid[0], bridge_scale)
            if audio is not None and i < self.config.audio.num_layers:  # beside the Bridge: one gather fetches both
                a = sound.blocks[i](a, context_a, time_a, rotary_a)
            if video is not None:
                x = tower.blocks[i](x, context, time, rotary)

        out = Velocities(None, None)
        if video is not None:
            out.video = tower.project(x, vector)
            if self.config.prediction == "sample":
                assert t_video is not None
                noisy = velocity_patches(video, tower.config.patch_size)[:, mine]
                out.video = _velocity(noisy, out.video, t_video)
            if not as_patches:
                out.video = unpatchify(out.video, grid, tower.config.patch_size)
        if audio is not None:
            out.audio = unpatchify(sound.project(a, vector_a), grid_a, sound.config.patch_size)
            if self.config.prediction == "sample":
                assert t_audio is not None
                out.audio = _velocity(audio, out.audio, t_audio)
        return out


def _check_given(
    video: Tensor | None,
    audio: Tensor | None,
    condition: Tensor | None,
    t_video: Tensor | None,
    t_audio: Tensor | None,
) -> None:
    """ValueError where a forward lacks something that it needs."""
    if video is None and audio is None:
        raise ValueError("both video and audio are None: there is nothing to do")
    if video is not None and (condition is None or t_video is None):
        raise ValueError("video needs condition and t_video")
    if audio is not None and t_audio is None:
        raise ValueError("audio needs t_audio")


def _velocity(noisy: Tensor, clean: Tensor, t: Tensor) -> Tensor:
    """(x_t - x_0) / sigma of latents [B, ...] at timesteps t [B] in 0..1000."""
    sigma = (t.to(clean.dtype) / 1000).clamp(min=LEAST_NOISE).view(-1, 1, 1)
    return (noisy - clean) / sigma


def _all_tokens(count: int) -> slice:
    return slice(0, count)
