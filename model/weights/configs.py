"""config.json of the layouts <-> the sizes and switches of model/.

tower = read_tower(config, shapes, "audio_dit", rope="dac")
written = tower_config(tower)                       # as MOVA writes it; diffusers_config: as diffusers does
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from model.bridge import BridgeConfig
from model.joint import JointConfig
from model.tower import TowerConfig
from model.weights.files import LayoutError

Shapes = Mapping[str, tuple[int, ...]]  # of a tower's tensors, by its own names

# Variants of the reference's towers that MOVA does not use; a folder that switches one on is refused.
SWITCHES_OFF = (
    "has_image_input", "has_image_pos_emb", "has_ref_conv", "add_control_adapter", "seperated_timestep",
    "fuse_vae_embedding_in_latents",
)  # fmt: skip
SWITCHES_ON = ("require_vae_embedding", "qk_norm", "cross_attn_norm")
IDLE = ("require_clip_embedding",)  # says nothing where has_image_input is off
FIELDS = ("dim", "num_heads", "num_layers", "ffn_dim", "in_dim", "out_dim", "text_dim", "freq_dim", "eps", "patch_size")
IN_SHAPES = ("text_dim", "patch_size")  # what original Wan leaves out of its config
DIFFUSERS = {
    "num_heads": "num_attention_heads", "num_layers": "num_layers", "ffn_dim": "ffn_dim", "in_dim": "in_channels",
    "out_dim": "out_channels", "text_dim": "text_dim", "freq_dim": "freq_dim", "eps": "eps", "patch_size": "patch_size",
}  # fmt: skip
FIXED = {"qk_norm": "rms_norm_across_heads", "cross_attn_norm": True, "pos_embed_seq_len": None}  # in diffusers
BRIDGE = {
    "head_dim": "head_dim", "strategy": "interaction_strategy", "audio_fps": "audio_fps",
    "cross_rope": "apply_cross_rope", "first_frame_bias": "apply_first_frame_bias_in_rope",
    "pooled_adaln": "pooled_adaln", "trainable_condition_scale": "trainable_condition_scale",
}  # fmt: skip
BRIDGE_SIZES = ("visual_hidden_dim", "audio_hidden_dim", "visual_layers", "audio_layers")
HEAD = 128  # channels of a head in all towers that Wan and MOVA released
BLOCKS = 1000  # more than any tower or Bridge has; a config that asks for more is not built
WAN_5B = 48  # latent channels of the VAE of Wan 2.2's 5B model, which is not MOVA's


def read_tower(config: dict[str, Any] | None, shapes: Shapes, place: str, rope: str) -> TowerConfig:
    """The sizes of a tower. `config`: of original Wan, MOVA or diffusers; None: all is derived from the tensors'
    shapes.

    LayoutError for a missing key, a switch that MOVA's towers do not have, and impossible sizes.
    """
    if config is None:
        values = sizes_of(shapes, place)
    elif "num_attention_heads" in config:
        values = _from_diffusers(config, place)
    else:
        values = _from_original(config, shapes, place)
    check_sizes(values, shapes, place)
    if WAN_5B in (values["in_dim"], values["out_dim"]):
        raise LayoutError(f"{place}: {WAN_5B} latent channels belong to the VAE of Wan 2.2's 5B model, MOVA's has 16")
    try:
        return TowerConfig(**(values | {"patch_size": [int(n) for n in values["patch_size"]], "rope": rope}))
    except (ValueError, TypeError) as error:
        raise LayoutError(f"{place}: {error}") from None


def sizes_of(shapes: Shapes, place: str) -> dict[str, Any]:
    """A tower's sizes, from the shapes of its tensors; heads are as wide as in all towers that Wan and MOVA released.
    LayoutError if a tensor needed for this is missing."""
    try:
        dim, in_dim, *patch = shapes["patch_embedding.weight"]
        blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
        return {
            "dim": dim, "num_heads": max(1, dim // HEAD), "num_layers": len(blocks),
            "ffn_dim": shapes["blocks.0.ffn.0.weight"][0], "in_dim": in_dim,
            "out_dim": shapes["head.head.weight"][0] // math.prod(patch),
            "text_dim": shapes["text_embedding.0.weight"][1], "freq_dim": shapes["time_embedding.0.weight"][1],
            "eps": 1e-6, "patch_size": patch,
        }  # fmt: skip
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise LayoutError(f"{place}: not the tensors of a tower ({error} is missing or has no such axes)") from None


def read_bridge(config: dict[str, Any], place: str) -> tuple[BridgeConfig, dict[str, int]]:
    """The Bridge's switches, and the sizes of the towers that it was made for. LayoutError as `read_tower`."""
    lacking = [key for key in (*BRIDGE.values(), *BRIDGE_SIZES) if key not in config]
    if lacking:
        raise LayoutError(f"{place}/config.json lacks the key {lacking[0]!r}")
    _refuse_unknown_switches(config, (*BRIDGE.values(), *BRIDGE_SIZES), place)
    sizes = {key: _whole(config[key], f"{place}/config.json: {key}") for key in BRIDGE_SIZES}
    if max(sizes["visual_layers"], sizes["audio_layers"]) > BLOCKS:
        raise LayoutError(f"{place}/config.json: {sizes['visual_layers']} and {sizes['audio_layers']} layers")
    try:
        return BridgeConfig(**{ours: config[theirs] for ours, theirs in BRIDGE.items()}), sizes
    except (ValueError, TypeError) as error:
        raise LayoutError(f"{place}: {error}") from None


def tower_config(tower: TowerConfig) -> dict[str, Any]:
    """config.json of a tower as MOVA writes it."""
    written: dict[str, Any] = {name: getattr(tower, name) for name in FIELDS if name != "patch_size"}
    written |= {name: False for name in (*SWITCHES_OFF, *IDLE)}
    written |= {"require_vae_embedding": True, "in_dim_control_adapter": 24, "patch_size": list(tower.patch_size)}
    if tower.rope == "video":
        return {"_class_name": "WanModel", **written}
    return {"_class_name": "WanAudioModel", **written, "vae_type": tower.rope}


def diffusers_config(tower: TowerConfig) -> dict[str, Any]:
    """config.json of a video tower as diffusers' WanTransformer3DModel writes it."""
    written = {theirs: getattr(tower, ours) for ours, theirs in DIFFUSERS.items()}
    return {
        "_class_name": "WanTransformer3DModel", **written, "attention_head_dim": tower.head_dim, **FIXED,
        "image_dim": None, "added_kv_proj_dim": None, "rope_max_seq_len": 1024, "patch_size": list(tower.patch_size),
    }  # fmt: skip


def bridge_config(config: JointConfig) -> dict[str, Any]:
    """config.json of the Bridge as MOVA writes it."""
    return {
        "_class_name": "DualTowerConditionalBridge",
        **bridge_sizes(config.video, config.audio),
        **{theirs: getattr(config.bridge, ours) for ours, theirs in BRIDGE.items()},
    }


def bridge_sizes(video: TowerConfig, audio: TowerConfig) -> dict[str, int]:
    """The sizes of the towers that a Bridge's config states."""
    return {
        "visual_layers": video.num_layers, "audio_layers": audio.num_layers,
        "visual_hidden_dim": video.dim, "audio_hidden_dim": audio.dim,
    }  # fmt: skip


def check_sizes(values: dict[str, Any], shapes: Shapes, place: str) -> None:
    """LayoutError for what is no size, and for another number of blocks than the tensors have (before any is built)."""
    for name in FIELDS:
        for number in values[name] if name == "patch_size" and isinstance(values[name], list) else [values[name]]:
            if name != "eps":
                _whole(number, f"{place}: {name}")
            elif not isinstance(number, int | float) or not 0 < number < 1:
                raise LayoutError(f"{place}: {name} is {number!r}, no small number above 0")
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    if values["num_layers"] > max(blocks, BLOCKS):
        raise LayoutError(f"{place}: num_layers is {values['num_layers']}, the files have {blocks} blocks")


def _whole(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise LayoutError(f"{what} is {value!r}, no whole number above 0")
    return value


def _from_original(config: dict[str, Any], shapes: Shapes, place: str) -> dict[str, Any]:
    switched = [name for name in SWITCHES_OFF if config.get(name)]
    switched += [name for name in SWITCHES_ON if config.get(name, True) is False]
    if switched:
        raise LayoutError(f"{place}: {', '.join(switched)} is not as in MOVA's towers")
    _refuse_unknown_switches(config, (*FIELDS, *SWITCHES_OFF, *SWITCHES_ON, *IDLE), place)
    absent = [name for name in FIELDS if name not in config]
    found = sizes_of(shapes, place) if set(absent) & set(IN_SHAPES) else {}
    if lacking := [name for name in absent if name not in IN_SHAPES]:
        raise LayoutError(f"{place}/config.json lacks the key {lacking[0]!r}")
    return {name: config[name] if name in config else found[name] for name in FIELDS}


def _from_diffusers(config: dict[str, Any], place: str) -> dict[str, Any]:
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise LayoutError(f"{place}: {key} is {config[key]}, MOVA's towers have {value}")
    clip = [key for key in ("image_dim", "added_kv_proj_dim") if config.get(key) is not None]
    if clip:
        raise LayoutError(f"{place}: {clip[0]} is {config[clip[0]]}: MOVA has no CLIP image-to-video weights")
    try:
        values = {ours: config[theirs] for ours, theirs in DIFFUSERS.items()}
        heads, width = config["num_attention_heads"], config["attention_head_dim"]
    except KeyError as error:
        raise LayoutError(f"{place}/config.json lacks the key {error}") from None
    return values | {"dim": _whole(heads, f"{place}: num_attention_heads") * _whole(width, f"{place}: head width")}


def _refuse_unknown_switches(config: dict[str, Any], known: tuple[str, ...], place: str) -> None:
    unknown = [key for key, value in config.items() if value is True and key not in known]
    if unknown:
        raise LayoutError(f"{place}/config.json switches on {', '.join(unknown)}, which is not known here")
