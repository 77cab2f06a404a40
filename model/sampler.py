"""Generates a clip from noise: integrates the velocity field of both modalities on their paired schedules.

    config = SamplerConfig(shift_video=5.0, shift_audio=5.0, boundary=900.0)
    video, audio = sample(model, config, noise_video, noise_audio, condition, text, empty_text)
    video, audio = sample(..., given_video=latents)         # video to audio: the picture is held at zero noise
    video, _ = sample(model, config, noise_video, None, condition, text, empty_text)     # no sound at all

With dual guidance (arXiv 2602.08794, section 4.6) the field is

    v = v(0, 0) + s_B [v(0, B) - v(0, 0)] + s_T [v(T, B) - v(0, B)]

where the first argument says whether the caption is given and the second whether the Bridge is on. Only terms whose
factor is not zero are evaluated: three, two when s_B = 1 or s_B = s_T, one when both are 1. A modality without the
other has v = v(0) + s_T [v(T) - v(0)], from its own tower: the Bridge has nothing to read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from core.ranges import bounded
from model.joint import Velocities
from model.shift import shift_sigma

SOLVERS = ("euler", "ab2")
Field = Callable[..., Velocities]  # the joint model, or what has its forward


@dataclass
class SamplerConfig:
    """How a clip is generated: evaluations of the guided field from noise to data.

    steps: evaluations of the field
    solver: "euler", or "ab2": Adams-Bashforth of second order, which extrapolates from the previous step at no extra
        cost
    shift_video: shift of the video schedule (model/shift.py), whose u falls evenly from 1 to 0; null: as trained
    shift_audio: shift of the audio schedule; null: as trained
    text_scale: s_T, guidance by the caption; 1: none
    bridge_scale: s_B, guidance by the other modality; 1: none
    boundary: video timesteps from this one on belong to the expert for high noise; null: as trained

    Null stands for the values that the model was trained with; `sample` needs numbers.
    """

    steps: int = bounded(50, "[1, inf)")
    solver: str = "euler"
    shift_video: float | None = bounded(None, "(0, inf)")
    shift_audio: float | None = bounded(None, "(0, inf)")
    text_scale: float = bounded(5.0, "(-inf, inf)")
    bridge_scale: float = bounded(1.0, "(-inf, inf)")
    boundary: float | None = bounded(None, "(0, 1000)")

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"sampler.solver {self.solver!r} is not one of {', '.join(SOLVERS)}")

    @property
    def terms(self) -> dict[tuple[bool, bool], float]:
        """{(caption given, Bridge on): factor of its velocity} for the terms that count."""
        text, bridge = self.text_scale, self.bridge_scale
        return _that_count({(True, True): text, (False, True): bridge - text, (False, False): 1 - bridge})

    @property
    def terms_alone(self) -> dict[tuple[bool, bool], float]:
        """The same for a single modality."""
        return _that_count({(True, False): self.text_scale, (False, False): 1 - self.text_scale})


def _that_count(factors: dict[tuple[bool, bool], float]) -> dict[tuple[bool, bool], float]:
    return {term: factor for term, factor in factors.items() if factor != 0}


@torch.no_grad()
def sample(
    model: Field,
    config: SamplerConfig,
    noise_video: Tensor | None,
    noise_audio: Tensor | None,
    condition: Tensor | None,
    text: Tensor,
    empty_text: Tensor,
    experts: tuple[str, ...] = ("high", "low"),
    fps: float = 24.0,
    given_video: Tensor | None = None,
    given_audio: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Latents (video [B, 16, T, H, W], audio [B, C, La]) in the dtype of the noise.

    condition [B, 20, T, H, W]: mask and latents of the first frame, zeros where none is given; text [B, Lt, D],
    empty_text [Lt, D]: the encoded empty prompt. `given_video` or `given_audio` stay as they are, at zero noise.
    A modality with neither noise nor anything given does not exist: None comes out, its tower and the Bridge do not
    run. `progress` is called with the number of steps done. ValueError if nothing is left to generate, or a value is
    null.
    """
    given = _there(given_video, given_audio)
    noises = {name: noise for name, noise in _there(noise_video, noise_audio).items() if name not in given}
    if not noises:
        raise ValueError("no modality has noise without being given: nothing is left to generate")
    like = next(iter(noises.values()))
    latents = {name: x.to(like.dtype) for name, x in given.items()} | {name: x.clone() for name, x in noises.items()}
    terms = config.terms if len(latents) == 2 else config.terms_alone
    captions = {True: text, False: empty_text.expand_as(text)}
    before: dict[str, Tensor] = {}  # the velocities of the last step
    before_step, before_expert = dict[str, float](), ""
    boundary = _number(config, "boundary")
    for number, (now, then) in enumerate(_paired(schedule(config))):
        sigmas = {name: now[name] if name in noises else 0.0 for name in latents}
        late = 1000 * sigmas.get("video", 1.0) < boundary
        expert = experts[1] if late and len(experts) > 1 else experts[0]
        velocities = {name: torch.zeros_like(noise) for name, noise in noises.items()}
        for (captioned, bridged), factor in terms.items():
            scale = like.new_full((len(text),), float(bridged), dtype=torch.float32)
            out = _ask(model, latents, sigmas, condition, captions[captioned], fps, expert, scale)
            for name, velocity in velocities.items():
                velocity += factor * getattr(out, name).to(velocity.dtype)
        step = {name: then[name] - now[name] for name in noises}
        for name, velocity in velocities.items():
            slope = velocity
            if config.solver == "ab2" and before and expert == before_expert:
                # The field jumps where the expert changes: nothing is extrapolated over that.
                slope = velocity + step[name] / (2 * before_step[name]) * (velocity - before[name])
            latents[name] = latents[name] + step[name] * slope
        before, before_step, before_expert = velocities, step, expert
        if progress is not None:
            progress(number + 1)
    return latents.get("video"), latents.get("audio")


def _there(video: Tensor | None, audio: Tensor | None) -> dict[str, Tensor]:
    return {name: x for name, x in (("video", video), ("audio", audio)) if x is not None}


def _ask(
    model: Field,
    latents: dict[str, Tensor],
    sigmas: dict[str, float],
    condition: Tensor | None,
    text: Tensor,
    fps: float,
    expert: str,
    bridge_scale: Tensor,
) -> Velocities:
    """One evaluation of the modalities present."""
    times = {name: torch.full_like(bridge_scale, 1000 * sigma) for name, sigma in sigmas.items()}
    return model(
        video=latents.get("video"),
        audio=latents.get("audio"),
        condition=condition if "video" in latents else None,
        text=text,
        t_video=times.get("video"),
        t_audio=times.get("audio"),
        fps=fps,
        expert=expert,
        bridge_scale=bridge_scale,
    )


def schedule(config: SamplerConfig) -> list[tuple[float, float]]:
    """steps + 1 pairs of noise levels (video, audio), from (1, 1) to (0, 0)."""
    video, audio = _number(config, "shift_video"), _number(config, "shift_audio")
    positions = [1 - i / config.steps for i in range(config.steps + 1)]
    return [(shift_sigma(u, video), shift_sigma(u, audio)) for u in positions]


def _number(config: SamplerConfig, name: str) -> float:
    value = getattr(config, name)
    if value is None:
        raise ValueError(f"sampler.{name} is null: give the value that the model was trained with")
    number: float = value
    return number


def _paired(levels: list[tuple[float, float]]) -> Iterator[tuple[dict[str, float], dict[str, float]]]:
    """The noise levels of each step and of the next, by modality."""
    named = [{"video": video, "audio": audio} for video, audio in levels]
    return zip(named, named[1:], strict=False)
