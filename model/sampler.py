"""From noise to a clip: integrates the velocity field of both modalities on their paired schedules.

    video, audio = sample(model, SamplerConfig(), noise, condition, text, empty_text)
    video, audio = sample(..., given_video=latents)         # video to audio: the picture is held at zero noise

With dual guidance (arXiv 2602.08794, section 4.6) the field is

    v = v(0, 0) + s_B [v(0, B) - v(0, 0)] + s_T [v(T, B) - v(0, B)]

where the first argument says whether the caption is given and the second whether the Bridge is on. Only terms whose
factor is not zero are evaluated: three, two when s_B = 1 or s_B = s_T, one when both are 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.joint import Velocities

SOLVERS = ("euler", "ab2")
Field = Callable[..., Velocities]  # the joint model, or what has its forward


@dataclass
class SamplerConfig:
    """`steps` evaluations of the guided field from noise to data.

    `solver`: "euler", or "ab2": Adams-Bashforth of second order, which extrapolates from the step before at no further
    evaluation. `shift_video`, `shift_audio`: of the schedules, sigma = s·u / (1 + (s - 1)·u) with u from 1 to 0 evenly.
    `text_scale`, `bridge_scale`: s_T and s_B. `boundary`: video timesteps from here on belong to the expert for high
    noise.
    """

    steps: int = 50
    solver: str = "euler"
    shift_video: float = 5.0
    shift_audio: float = 5.0
    text_scale: float = 5.0
    bridge_scale: float = 1.0
    boundary: float = 900.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sampler.steps is {self.steps}; give 1 or more")
        if self.solver not in SOLVERS:
            raise ValueError(f"sampler.solver {self.solver!r} is not one of {', '.join(SOLVERS)}")
        for name in ("shift_video", "shift_audio"):
            if getattr(self, name) <= 0:
                raise ValueError(f"sampler.{name} is {getattr(self, name)}; a shift is above 0")

    @property
    def terms(self) -> dict[tuple[bool, bool], float]:
        """{(caption given, Bridge on): factor of its velocity} for the terms that count."""
        text, bridge = self.text_scale, self.bridge_scale
        factors = {(True, True): text, (False, True): bridge - text, (False, False): 1 - bridge}
        return {term: factor for term, factor in factors.items() if factor != 0}


@torch.no_grad()
def sample(
    model: Field,
    config: SamplerConfig,
    noise_video: Tensor,
    noise_audio: Tensor,
    condition: Tensor,
    text: Tensor,
    empty_text: Tensor,
    experts: tuple[str, ...] = ("high", "low"),
    fps: float = 24.0,
    given_video: Tensor | None = None,
    given_audio: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Latents (video [B, 16, T, H, W], audio [B, C, La]) in the dtype of the noise.

    condition [B, 20, T, H, W]: mask and latents of the first frame, zeros where none is given; text [B, Lt, D],
    empty_text [Lt, D]: the encoded empty prompt. `given_video` or `given_audio` stay as they are, at zero noise.
    `progress` hears the number of steps done. ValueError when both modalities are given.
    """
    if given_video is not None and given_audio is not None:
        raise ValueError("video and audio are both given: nothing is left to generate")
    batch = noise_video.shape[0]
    video = noise_video.clone() if given_video is None else given_video.to(noise_video.dtype)
    audio = noise_audio.clone() if given_audio is None else given_audio.to(noise_audio.dtype)
    captions = {True: text, False: empty_text.expand_as(text)}
    before: tuple[Tensor, Tensor] | None = None  # the velocities of the last step
    before_step, before_expert = (0.0, 0.0), ""
    for number, (now, then) in enumerate(_paired(schedule(config))):
        sigma_v = 0.0 if given_video is not None else now[0]
        sigma_a = 0.0 if given_audio is not None else now[1]
        expert = experts[0] if len(experts) == 1 or 1000 * sigma_v >= config.boundary else experts[1]
        velocity_v, velocity_a = torch.zeros_like(video), torch.zeros_like(audio)
        for (captioned, bridged), factor in config.terms.items():
            out = model(
                video=video,
                audio=audio,
                condition=condition,
                text=captions[captioned],
                t_video=torch.full((batch,), 1000 * sigma_v, device=video.device),
                t_audio=torch.full((batch,), 1000 * sigma_a, device=video.device),
                fps=fps,
                expert=expert,
                bridge_scale=torch.full((batch,), float(bridged), device=video.device),
            )
            assert out.video is not None and out.audio is not None
            velocity_v += factor * out.video.to(video.dtype)
            velocity_a += factor * out.audio.to(audio.dtype)
        step = (then[0] - now[0], then[1] - now[1])
        slope_v, slope_a = velocity_v, velocity_a
        if config.solver == "ab2" and before is not None and expert == before_expert:
            # The field jumps where the expert changes: nothing is extrapolated over that.
            slope_v = velocity_v + step[0] / (2 * before_step[0]) * (velocity_v - before[0])
            slope_a = velocity_a + step[1] / (2 * before_step[1]) * (velocity_a - before[1])
        if given_video is None:
            video = video + step[0] * slope_v
        if given_audio is None:
            audio = audio + step[1] * slope_a
        before, before_step, before_expert = (velocity_v, velocity_a), step, expert
        if progress is not None:
            progress(number + 1)
    return video, audio


def schedule(config: SamplerConfig) -> list[tuple[float, float]]:
    """steps + 1 pairs of noise levels (video, audio), from (1, 1) to (0, 0)."""
    places = [1 - i / config.steps for i in range(config.steps + 1)]
    return [tuple(s * u / (1 + (s - 1) * u) for s in (config.shift_video, config.shift_audio)) for u in places]  # type: ignore[misc]


def _paired(levels: list[tuple[float, float]]) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    return zip(levels, levels[1:], strict=False)
