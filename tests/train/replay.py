"""A real run again, in plain torch: what test_replay.py compares the loop with.

Nothing of train/ takes part in the replay but the model's starting weights and the captions, latents and sample numbers
that the loop was given. Noise, timesteps and dropouts come from the documented stream (Philox, keyed by the hash of
"seed/purpose", its counter topped by the sample number); loss, clipping, AdamW, learning rates, averages and validation
are written out, sample by sample, each with only the modalities that it has.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from torch import Tensor

from data.clip import Bucket
from data.dataset.index import DatasetIndex
from model.joint import JointConfig, JointTransformer
from tests.train import cases, runs
from train import loop, ready
from train.parallel.parallelize import fill_weights

STEPS, WARMUP, FINAL = 12, 3, 0.2
RATES, DECAY, BETAS, EPS, CLIP = {"tower": 3e-3, "bridge": 7e-3}, 0.05, (0.8, 0.9), 1e-4, 0.5
SHIFTS, BOUNDARY, WEIGHTS = {"video": 4.0, "audio": 2.0}, 800.0, {"video": 0.9, "audio": 0.4}
CYCLE = ("high", "low", "low")
DROPS = {"text": 0.3, "image": 0.4, "bridge": 0.2}
HOLD_VIDEO, HOLD_AUDIO, PAIR, FLOOR = 0.15, 0.2, 0.25, 0.3
AVERAGE = 0.3
EVERY, LEVELS, HELD_OUT = 5, (0.15, 0.5, 0.95), 6
SEED, VALIDATION_SEED = 17, 20_260_101
OVERRIDES = [
    f"steps={STEPS}", f"seed={SEED}", "optim.schedule=cosine", f"optim.warmup={WARMUP}", f"optim.final_ratio={FINAL}",
    f"optim.lr_tower={RATES['tower']}", f"optim.lr_bridge={RATES['bridge']}", f"optim.weight_decay={DECAY}",
    f"optim.betas=[{BETAS[0]},{BETAS[1]}]", f"optim.eps={EPS}", f"optim.clip={CLIP}",
    *(f"objective.shift_{name}={shift}" for name, shift in SHIFTS.items()),
    *(f"objective.{name}_weight={weight}" for name, weight in WEIGHTS.items()),
    *(f"objective.{name}_dropout={share}" for name, share in DROPS.items()),
    f"objective.boundary={BOUNDARY}", f"objective.expert_cycle=[{','.join(CYCLE)}]",
    f"objective.clean_video_prob={HOLD_VIDEO}", f"objective.clean_audio_prob={HOLD_AUDIO}",
    f"objective.paired_prob={PAIR}", f"objective.noise_floor={FLOOR}", f"ema.decay={AVERAGE}",
    f"validation.every={EVERY}", f"validation.samples={HELD_OUT}",
    f"validation.sigmas=[{','.join(map(str, LEVELS))}]", "data.batch_size=3", "data.micro_batch=1", "monitor.every=0",
]  # fmt: skip
# Clips with both, without sound, without picture, each at a rate of its own, and with both in another size.
BUCKETS = [
    (Bucket(frames=3, height=4, width=4, audio_steps=11, fps=30.0, has_video=True, has_audio=True), 9),
    (Bucket(frames=2, height=4, width=6, audio_steps=9, fps=16.0, has_video=True, has_audio=False), 5),
    (Bucket(frames=2, height=4, width=4, audio_steps=13, fps=12.5, has_video=False, has_audio=True), 4),
    (Bucket(frames=2, height=6, width=4, audio_steps=7, fps=12.5, has_video=True, has_audio=True), 5),
]


@dataclass
class Clip:
    """One clip of a step. Latents are None where it has none; `weight` 0: a left-over slot."""

    number: int
    weight: float
    fps: float
    video: Tensor | None  # [16, T, H, W] float32
    audio: Tensor | None  # [128, La]
    condition: Tensor  # [20, T, H, W]
    text: Tensor  # [L, D]
    empty_text: Tensor


def recorded(root: Path, name: str, data: Path, valid: Path) -> list[list[dict[str, Any]]]:
    """A run through `train.loop.run`; returns, step by step, what this rank's slots held."""
    steps: list[list[dict[str, Any]]] = []
    forward_backward, build_engine = loop.forward_backward, ready.build_engine

    def watched(model: Any, micro_batches: Any, *rest: Any) -> Any:
        slots = []
        for batch in (prepared.batch for prepared in micro_batches):
            for row, number in enumerate(batch.sample_numbers.tolist()):
                tensors = {n: getattr(batch, n)[row].clone() for n in ("video", "audio", "condition", "text")}
                slots.append(
                    tensors
                    | {"number": number, "key": batch.keys[row], "weight": batch.weight[row].item()}
                    | {"empty_text": batch.empty_text.clone()}
                )
        steps.append(slots)
        return forward_backward(model, micro_batches, *rest)

    def built(*given: Any) -> Any:
        engine = build_engine(*given)
        fill_weights(engine.model, cases.busy_value)  # those of a start from a seed hide faults behind a head of zeros
        engine.optimizer.average.restart()
        return engine

    loop.forward_backward, ready.build_engine = watched, built  # type: ignore[assignment]
    try:
        ended = runs.train(root, data, name, *OVERRIDES, f"data.valid_path={valid}")
        assert ended.get("ending") == "finished", ended
    finally:
        loop.forward_backward, ready.build_engine = forward_backward, build_engine
    return steps


def clips_of(ranks: list[list[list[dict[str, Any]]]], data: Path) -> list[list[Clip]]:
    """The clips of each step from the records of all ranks. Rates and modalities are those of the dataset."""
    index = DatasetIndex.open(data)
    buckets = {index.key(row): index.bucket_of(row) for row in range(len(index))}
    steps = []
    for slots in zip(*ranks, strict=True):
        clips = []
        for slot in (slot for mine in slots for slot in mine if slot["weight"]):
            bucket = buckets[slot["key"]]
            clips.append(
                Clip(
                    slot["number"], slot["weight"], bucket.fps,
                    slot["video"].float() if bucket.has_video else None,
                    slot["audio"].float() if bucket.has_audio else None,
                    slot["condition"].float(), slot["text"].float(), slot["empty_text"].float(),
                )
            )  # fmt: skip
        steps.append(clips)
    index.close()
    return steps


def stream(seed: int, purpose: str, number: int) -> np.random.Generator:
    """The documented stream of one purpose of one sample."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:16], "little")
    counter = np.array([0, 0, 0, number], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(seed: int, purpose: str, number: int, like: Tensor) -> Tensor:
    """Noise of a sample's latents."""
    return torch.from_numpy(stream(seed, purpose, number).standard_normal(tuple(like.shape), dtype=np.float32))


def level(u: float, shift: float) -> float:
    """Noise level at a place of a schedule."""
    return shift * u / (1 + (shift - 1) * u)


def place(sigma: float, shift: float) -> float:
    """The place of a noise level."""
    return sigma / (shift - (shift - 1) * sigma)


def times(u_video: float, u_audio: float, kind: float, expert: str, both: bool) -> tuple[float, float]:
    """Noise levels of a sample's video and audio; `both`: whether it has both."""
    edge = place(BOUNDARY / 1000, SHIFTS["video"])
    low, high = (edge, 1.0) if expert == "high" else (0.0, edge)
    video = level(low + (high - low) * u_video, SHIFTS["video"])
    audio = level(u_audio, SHIFTS["audio"])
    held = HOLD_VIDEO + HOLD_AUDIO
    if held <= kind < held + PAIR:
        audio = level(place(video, SHIFTS["video"]), SHIFTS["audio"])
    if both and kind < HOLD_VIDEO and expert == "low":
        video = 0.0
    if both and HOLD_VIDEO <= kind < held:
        audio = 0.0
    return video, audio


def errors(
    model: JointTransformer,
    clip: Clip,
    expert: str,
    sigmas: dict[str, float],
    noises: dict[str, Tensor],
    keep: dict[str, bool],
) -> dict[str, Tensor]:
    """Mean squared error of each modality that a clip has."""  # fmt: skip
    clean = {name: x for name, x in (("video", clip.video), ("audio", clip.audio)) if x is not None}
    noisy = {name: ((1 - sigmas[name]) * x + sigmas[name] * noises[name])[None] for name, x in clean.items()}
    out = model(
        video=noisy.get("video"), audio=noisy.get("audio"), condition=(clip.condition * keep["image"])[None],
        text=(clip.text if keep["text"] else clip.empty_text)[None], t_video=torch.tensor([1000 * sigmas["video"]]),
        t_audio=torch.tensor([1000 * sigmas["audio"]]), fps=clip.fps, expert=expert,
        bridge_scale=torch.tensor([float(keep["bridge"])]),
    )  # fmt: skip
    return {name: (getattr(out, name)[0] - (noises[name] - x)).square().mean() for name, x in clean.items()}


@dataclass
class Told:
    """What the replay finds: rows as in metrics.jsonl, and the state at the end under a checkpoint's names."""

    steps: list[dict[str, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)
    end: dict[str, Tensor] = field(default_factory=dict)
    clipped: int = 0  # steps whose gradient was


def replay(run: Path, steps: list[list[Clip]], valid: Path) -> Told:
    """The run whose steps had these clips."""
    stated = json.loads(json.dumps(OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))))["model"]
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(JointConfig), stated))
    model = JointTransformer(config)
    fill_weights(model, cases.busy_value)
    names = dict(model.named_parameters())
    bridge = {name for name in names if name.startswith("dual_tower_bridge.")}
    groups = [[p for n, p in names.items() if n not in bridge], [p for n, p in names.items() if n in bridge]]
    adamw = torch.optim.AdamW(
        [{"params": group} for group in groups], lr=1.0, betas=BETAS, eps=EPS, weight_decay=DECAY, foreach=False
    )
    averages, counts = {name: p.detach().clone() for name, p in names.items()}, dict.fromkeys(names, 0)
    held_out, told = read_held_out(valid, config.text_length), Told()
    for step in range(len(steps) + 1):
        if step in (0, len(steps)) or step % EVERY == 0:
            told.validations.append({"step": step, **validated(model, averages, held_out)})
        if step == len(steps):
            break
        row = gradient(model, steps[step], CYCLE[step % len(CYCLE)])
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in names.values() if p.grad is not None))
        told.clipped += norm > CLIP
        for p in names.values():
            if p.grad is not None:
                p.grad *= min(1.0, CLIP / norm)
        factor = (step + 1) / WARMUP
        if step >= WARMUP:
            progress = (step - WARMUP) / (STEPS - WARMUP)
            factor = FINAL + (1 - FINAL) * (1 + math.cos(math.pi * progress)) / 2
        for group, rate in zip(adamw.param_groups, RATES.values(), strict=True):
            group["lr"] = factor * rate
        adamw.step()
        for name, p in names.items():
            if p.grad is not None:
                kept = min(AVERAGE, (1 + counts[name]) / (10 + counts[name]))
                averages[name] = kept * averages[name] + (1 - kept) * p.detach()
                counts[name] += 1
        adamw.zero_grad()
        rates = {f"lr_{name}": factor * rate for name, rate in RATES.items()}
        told.steps.append({"step": step, "grad_norm": norm, **rates, **row})
    for name, p in names.items():
        told.end |= {f"model.{name}": p.detach(), f"ema.{name}": averages[name]}
        told.end |= {f"optim.{name}.{key}": adamw.state[p][key] for key in ("exp_avg", "exp_avg_sq") if adamw.state[p]}
    return told


def gradient(model: JointTransformer, clips: list[Clip], expert: str) -> dict[str, float]:
    """Leaves the gradient of a step in the model; the losses that its row of metrics has."""
    loss, sums = torch.zeros(()), {"video": [0.0, 0.0], "audio": [0.0, 0.0]}
    for clip in clips:
        u = stream(SEED, "scalars", clip.number).random(6).tolist()  # video, audio, text, image, Bridge, kind
        both = clip.video is not None and clip.audio is not None
        sigmas = dict(zip(("video", "audio"), times(u[0], u[1], u[5], expert, both), strict=True))
        noises = {
            name: normal(SEED, f"noise_{name}", clip.number, x)
            for name, x in (("video", clip.video), ("audio", clip.audio))
            if x is not None
        }
        keep = {name: u[2 + i] >= share for i, (name, share) in enumerate(DROPS.items())}
        for name, error in errors(model, clip, expert, sigmas, noises, keep).items():
            learned = float(sigmas[name] > 0)
            factor = WEIGHTS[name] * learned * min(1.0, sigmas[name] / FLOOR) ** 2
            loss = loss + factor * error / len(clips)
            sums[name] = [sums[name][0] + learned * error.item(), sums[name][1] + learned]
    loss.backward()
    return {"loss": loss.item(), **{f"loss_{name}": a / b if b else math.nan for name, (a, b) in sums.items()}}


def read_held_out(path: Path, length: int) -> list[tuple[int, Clip]]:
    """The held-out clips by row, captions padded with zeros."""
    index, found = DatasetIndex.open(path), []
    for row in range(min(HELD_OUT, len(index))):
        clip, bucket = index.read_clip(row), index.bucket_of(row)
        text = index.read_text(row, index.captioners[0]).float()[:length]
        condition = torch.zeros(20, bucket.frames, bucket.height, bucket.width)
        condition[:4, 0] = 1
        if clip.condition is not None:
            condition[4:] = clip.condition.float()
        found.append(
            (
                row,
                Clip(
                    row, 1.0, bucket.fps, None if clip.video is None else clip.video.float(),
                    None if clip.audio is None else clip.audio.float().T, condition,
                    torch.cat((text, torch.zeros(length - len(text), text.shape[1]))), text,
                ),
            )
        )  # fmt: skip
    index.close()
    return found


@torch.no_grad()
def validated(model: JointTransformer, averages: dict[str, Tensor], held_out: list[tuple[int, Clip]]) -> dict[str, Any]:
    """Losses of the held-out clips, from the weights and from their averages."""
    found = losses_of(model, held_out)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.copy_(averages[name])
    found |= {f"ema/{name}": loss for name, loss in losses_of(model, held_out).items()}
    for name, p in model.named_parameters():
        p.copy_(weights[name])
    return found


def losses_of(model: JointTransformer, held_out: list[tuple[int, Clip]]) -> dict[str, float]:
    """Means over clips and noise levels, of all and of each expert's."""
    seen: dict[str, list[float]] = {}
    for row, clip in held_out:
        given = {"video": clip.video, "audio": clip.audio}
        noises = {
            n: normal(VALIDATION_SEED, f"validation/{n}", row, x) for n, x in given.items() if x is not None
        }  # fmt: skip
        for sigma in LEVELS:
            expert = "high" if 1000 * sigma >= BOUNDARY else "low"
            keep = {"text": True, "image": True, "bridge": True}
            for name, error in errors(model, clip, expert, dict.fromkeys(WEIGHTS, sigma), noises, keep).items():
                seen.setdefault(name, []).append(error.item())
                seen.setdefault(f"{name}_{expert}", []).append(error.item())
    means = {name: sum(values) / len(values) for name, values in seen.items()}
    return {"loss": sum(weight * means[name] for name, weight in WEIGHTS.items()), **means}


def end_of(run: Path) -> dict[str, Tensor]:
    """The tensors of a run's last checkpoint."""
    path = max((run / "checkpoints").glob("step-*"))
    described = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {key: torch.empty(one.size) for key, one in described.items()}
    dcp.load(tensors, checkpoint_id=path, no_dist=True)
    return tensors
