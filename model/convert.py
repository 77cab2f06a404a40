"""Folders in the reference's layout <-> model.

    model = load_mova("MOVA-360p", dtype=torch.bfloat16)      # video_dit, [video_dit_2,] audio_dit, dual_tower_bridge
    save_mova(model, "exported")

Each folder holds `config.json` (diffusers style) and `diffusion_pytorch_model*.safetensors`, with an index when split.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.bridge import BridgeConfig
from model.joint import JointConfig, JointTransformer
from model.tower import TowerConfig

WEIGHTS = "diffusion_pytorch_model"
SHARD_BYTES = 5_000_000_000
# Variants of the reference's towers that MOVA does not use; a folder that switches one on is refused.
TOWER_SWITCHES_OFF = (
    "has_image_input", "has_image_pos_emb", "has_ref_conv", "add_control_adapter", "seperated_timestep",
    "fuse_vae_embedding_in_latents",
)  # fmt: skip
TOWER_FIELDS = ("dim", "num_heads", "num_layers", "ffn_dim", "in_dim", "out_dim", "text_dim", "freq_dim", "eps")


class LayoutError(Exception):
    """A folder is not in the reference's layout; the message names the file and what is wrong."""


def load_mova(folder: str | Path, dtype: torch.dtype = torch.float32) -> JointTransformer:
    """Model with the weights of a folder in the reference's layout, cast to dtype, on the CPU.

    Raises LayoutError for a missing folder or file, an unsupported config, and missing, unknown or misshapen tensors.
    """
    root = Path(folder)
    with torch.device("meta"):
        model = JointTransformer(read_config(root))
    for name, part in model.named_children():
        _load_part(part, root / name, dtype)
    return model


def read_config(folder: str | Path) -> JointConfig:
    """The JointConfig of a folder in the reference's layout. Raises LayoutError."""
    root = Path(folder)
    video, audio, bridge = (_read_json(root / part) for part in ("video_dit", "audio_dit", "dual_tower_bridge"))
    two_experts = (root / "video_dit_2").is_dir()
    if two_experts and _tower_fields(_read_json(root / "video_dit_2")) != _tower_fields(video):
        raise LayoutError(f"{root}: video_dit and video_dit_2 have different sizes; the experts must be alike")
    try:
        config = JointConfig(
            video=TowerConfig(**_tower_fields(video), rope="video"),
            audio=TowerConfig(**_tower_fields(audio), rope=audio.get("vae_type", "oobleck")),
            bridge=BridgeConfig(
                head_dim=bridge["head_dim"],
                strategy=bridge["interaction_strategy"],
                audio_fps=bridge["audio_fps"],
                cross_rope=bridge["apply_cross_rope"],
                first_frame_bias=bridge["apply_first_frame_bias_in_rope"],
                pooled_adaln=bridge["pooled_adaln"],
                trainable_condition_scale=bridge["trainable_condition_scale"],
            ),
            two_experts=two_experts,
        )
    except KeyError as error:
        raise LayoutError(f"{root}: a config.json lacks the key {error}") from None
    except ValueError as error:
        raise LayoutError(f"{root}: {error}") from None
    expected = {
        "visual_layers": config.video.num_layers, "audio_layers": config.audio.num_layers,
        "visual_hidden_dim": config.video.dim, "audio_hidden_dim": config.audio.dim,
    }  # fmt: skip
    for key, value in expected.items():
        if bridge[key] != value:
            raise LayoutError(f"{root}/dual_tower_bridge: {key} is {bridge[key]}, the towers have {value}")
    return config


def save_mova(model: JointTransformer, folder: str | Path, boundary_ratio: float = 0.9) -> None:
    """Write a model in the reference's layout, in the dtype it has. The parts must be whole (not sharded) tensors.

    `boundary_ratio`: the noise level that separates the experts, written to model_index.json.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    for name, part in model.named_children():
        (root / name).mkdir(exist_ok=True)
        _save_weights(part, root / name)
        _write_json(root / name / "config.json", _part_config(model.config, name))
    index = {
        "_class_name": "MOVA",
        "audio_vae_type": model.config.audio.rope,
        "boundary_ratio": boundary_ratio if model.config.two_experts else None,
    }
    _write_json(root / "model_index.json", index)


def _part_config(config: JointConfig, part: str) -> dict[str, Any]:
    if part == "dual_tower_bridge":
        bridge = config.bridge
        return {
            "_class_name": "DualTowerConditionalBridge",
            "visual_layers": config.video.num_layers,
            "audio_layers": config.audio.num_layers,
            "visual_hidden_dim": config.video.dim,
            "audio_hidden_dim": config.audio.dim,
            "audio_fps": bridge.audio_fps,
            "head_dim": bridge.head_dim,
            "interaction_strategy": bridge.strategy,
            "apply_cross_rope": bridge.cross_rope,
            "apply_first_frame_bias_in_rope": bridge.first_frame_bias,
            "trainable_condition_scale": bridge.trainable_condition_scale,
            "pooled_adaln": bridge.pooled_adaln,
        }
    tower = config.audio if part == "audio_dit" else config.video
    written: dict[str, Any] = {name: getattr(tower, name) for name in TOWER_FIELDS}
    written |= {name: False for name in TOWER_SWITCHES_OFF}
    written |= {"require_vae_embedding": True, "require_clip_embedding": False, "in_dim_control_adapter": 24}
    written["patch_size"] = list(tower.patch_size)
    if part == "audio_dit":
        return {"_class_name": "WanAudioModel", **written, "vae_type": tower.rope}
    return {"_class_name": "WanModel", **written}


def _tower_fields(config: dict[str, Any]) -> dict[str, Any]:
    switched_on = [name for name in TOWER_SWITCHES_OFF if config.get(name)]
    if switched_on:
        raise LayoutError(f"{config.get('_class_name')}: {', '.join(switched_on)} is on; MOVA's towers have it off")
    return {name: config[name] for name in TOWER_FIELDS} | {"patch_size": list(config["patch_size"])}


def _load_part(part: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    wanted = {name: tensor.shape for name, tensor in part.state_dict().items()}
    weights = _read_weights(folder, dtype)
    missing, unknown = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or unknown:
        raise LayoutError(
            f"{folder}: missing tensors {missing[:5]} ({len(missing)}), unknown {unknown[:5]} ({len(unknown)})"
        )
    for name, shape in wanted.items():
        if weights[name].shape != shape:
            raise LayoutError(
                f"{folder}: {name} has shape {tuple(weights[name].shape)}, the config says {tuple(shape)}"
            )
    part.load_state_dict(weights, assign=True)
    part.requires_grad_(True)


def _read_weights(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    files = sorted(folder.glob(f"{WEIGHTS}*.safetensors"))
    if not files:
        raise LayoutError(f"{folder}: no {WEIGHTS}*.safetensors there")
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    if index.is_file():
        named = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        absent = [path.name for path in named if not path.is_file()]
        if absent:
            raise LayoutError(f"{folder}: {index.name} names {absent}, which are not there")
        files = named
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as reader:
                tensors |= {name: reader.get_tensor(name).to(dtype) for name in reader.keys()}  # noqa: SIM118
        except Exception as error:
            raise LayoutError(f"{path}: not a readable safetensors file ({error})") from error
    return tensors


def _save_weights(part: nn.Module, folder: Path) -> None:
    """One file, or several of at most SHARD_BYTES with an index; each written beside and renamed into place."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in part.state_dict().items():
        nbytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().contiguous()
        size += nbytes
    names = [
        f"{WEIGHTS}.safetensors" if len(shards) == 1 else f"{WEIGHTS}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        for i in range(len(shards))
    ]
    for old in folder.glob(f"{WEIGHTS}*"):  # a folder that held other shards must not mix with these
        old.unlink()
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / (name + ".partial"), metadata={"format": "pt"})
        os.replace(folder / (name + ".partial"), folder / name)
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(t.numel() * t.element_size() for shard in shards for t in shard.values())
        _write_json(
            folder / f"{WEIGHTS}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise LayoutError(f"{path} is missing; the reference's layout has video_dit, audio_dit and dual_tower_bridge")
    return json.loads(path.read_text())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)
