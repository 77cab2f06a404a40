"""Weights and inputs that the reference implementation and ours are both given, drawn from numpy's Philox.

Only uniform numbers are drawn, in float64: their stream is fixed for good, unlike torch's, so that what the reference
said of them (`recorded/`, made by record_reference.py) is compared with what our model says of the same numbers.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RECORDED = Path(__file__).parent / "recorded"
VIDEO, AUDIO = 16, 8  # channels of the latents
TEXT_DIM, FREQ_DIM = 12, 16


class Case(NamedTuple):
    """Settings of the reference's classes, and the size of what it is asked. Every head has 32 channels."""

    bridge: dict[str, Any]
    heads: tuple[int, int]  # of video, audio
    layers: tuple[int, int]
    experts: tuple[str, ...]  # folders of the video towers
    fps: float
    clips: int
    grid: tuple[int, int, int]  # of the video's latents
    steps: int  # of sound
    times: tuple[float, float]
    audio_rope: str = "dac"


CASES = {
    # As released but for its sizes; picture without a partner in the last block.
    "released": Case(
        {"interaction_strategy": "full", "audio_fps": 50.0, "apply_cross_rope": True},
        (2, 1), (3, 2), ("video_dit", "video_dit_2"), 24.0, 2, (3, 4, 6), 11, (921.5, 388.25),
    ),
    # Everything that MOVA's classes can do besides, the older sound among it.
    "switches": Case(
        {
            "interaction_strategy": "distributed", "audio_fps": 44100 / 2048, "apply_cross_rope": True,
            "apply_first_frame_bias_in_rope": True, "pooled_adaln": True, "trainable_condition_scale": True,
        },
        (1, 2), (4, 4), ("video_dit",), 16.0, 1, (4, 6, 2), 9, (37.0, 950.0), "oobleck",
    ),
    "no rope": Case(
        {"interaction_strategy": "shallow_focus", "audio_fps": 50.0, "apply_cross_rope": False},
        (1, 1), (3, 3), ("video_dit",), 30.0, 1, (2, 4, 4), 7, (500.0, 500.0),
    ),
}  # fmt: skip
HEAD = 32


def part_settings(case: Case) -> dict[str, dict[str, Any]]:
    """Arguments of the reference's classes, by folder."""
    tower = {"text_dim": TEXT_DIM, "freq_dim": FREQ_DIM, "eps": 1e-6, "has_image_input": False}
    video = {
        **tower, "dim": HEAD * case.heads[0], "num_heads": case.heads[0], "num_layers": case.layers[0], "ffn_dim": 48,
        "in_dim": 2 * VIDEO + 4, "out_dim": VIDEO, "patch_size": [1, 2, 2],
    }  # fmt: skip
    audio = {
        **tower, "dim": HEAD * case.heads[1], "num_heads": case.heads[1], "num_layers": case.layers[1], "ffn_dim": 40,
        "in_dim": AUDIO, "out_dim": AUDIO, "patch_size": [1], "vae_type": case.audio_rope,
    }  # fmt: skip
    bridge = {
        "visual_layers": case.layers[0], "audio_layers": case.layers[1], "visual_hidden_dim": video["dim"],
        "audio_hidden_dim": audio["dim"], "head_dim": HEAD, **case.bridge,
    }  # fmt: skip
    return {**{name: video for name in case.experts}, "audio_dit": audio, "dual_tower_bridge": bridge}


def uniform(key: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers of mean 0 and variance 1, uniform, float32: a function of the key and the shape."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return torch.from_numpy((generator.random(shape) - 0.5) * 12**0.5).to(torch.float32)


def recorded(case: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, what is no tensor) that the reference said of a case."""
    path = RECORDED / case.replace(" ", "-")
    return load_file(path.with_suffix(".safetensors")), json.loads(path.with_suffix(".json").read_text())


def write_folder(case: str, facts: dict[str, Any], folder: Path) -> None:
    """The weights of a case as the reference saves them. `facts`: of `recorded`."""
    for part, about in facts["parts"].items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(about["config"]))
        weights = {name: weight(case, part, name, tuple(shape)) for name, shape in about["shapes"].items()}
        save_file(weights, folder / part / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def ask(model: Any, case: str, expert: str) -> Any:
    """What our model says of the case's inputs."""
    given, one = inputs(case), CASES[case]
    t_video, t_audio = (torch.full((one.clips,), t) for t in one.times)
    return model(
        video=given["video"], audio=given["audio"], condition=given["condition"], text=given["text"], t_video=t_video,
        t_audio=t_audio, fps=one.fps, expert=expert,
    )  # fmt: skip


def weight(case: str, part: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """The value of one parameter; none is so small that the part it belongs to would play no role."""
    values = uniform(f"{case}/{part}/{name}", shape)
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.2 * values
    if name == "condition_scale":
        return 0.7 + 0 * values
    if name.endswith(("modulation", "bias")):
        return 0.3 * values
    return values / max(1, values[0].numel()) ** 0.5


def inputs(case: str) -> dict[str, Tensor]:
    """video, audio: noisy latents; condition: mask of the first frame, and its latents; text; goal_video, goal_audio:
    the velocities that the losses compare with."""
    one = CASES[case]
    video, audio = (one.clips, VIDEO, *one.grid), (one.clips, AUDIO, one.steps)
    condition = torch.zeros(one.clips, 4 + VIDEO, *one.grid)
    condition[:, :4, 0] = 1
    condition[:, 4:, 0] = uniform(f"{case}/first frame", (one.clips, VIDEO, *one.grid[1:]))
    return {
        "video": uniform(f"{case}/video", video),
        "audio": uniform(f"{case}/audio", audio),
        "condition": condition,
        "text": uniform(f"{case}/text", (one.clips, 5, TEXT_DIM)),
        "goal_video": uniform(f"{case}/goal video", video),
        "goal_audio": uniform(f"{case}/goal audio", audio),
    }


def summary(case: str, part: str, name: str, gradient: Tensor) -> tuple[float, float]:
    """A gradient in two numbers: its norm, and its product with signs drawn for it, which sees where it points."""
    signs = uniform(f"{case}/{part}/{name}/signs", tuple(gradient.shape)).sign().double()
    values = gradient.double()
    return values.norm().item(), (values * signs).sum().item()
