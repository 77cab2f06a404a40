"""Finds the folder that holds a part of the model, and opens the part as tensors that can be read in ranges.

    part = open_part(Path("Wan2.2-I2V-A14B"), "video_low")       # low_noise_model/
    part.config, part.names, part.read("blocks.0.ffn.0.weight", 0, 5120)

Folders are told apart by their names: MOVA (video_dit, video_dit_2, audio_dit, dual_tower_bridge), original Wan 2.2
(high_noise_model, low_noise_model), diffusers (transformer: high noise, transformer_2: low noise), one tower alone
(config.json beside its weights), and this project's flat export. Class names do not help: original Wan and MOVA both
use WanModel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.bridge import Bridge, BridgeConfig
from model.joint import JointConfig, JointTransformer
from model.tower import Tower, TowerConfig
from model.weights.configs import BRIDGE_SIZES, bridge_sizes, read_bridge, read_tower
from model.weights.files import LayoutError, Tensors, open_files, read_json
from model.weights.flat import FLAT_CLASS, read_flat
from model.weights.names import are_diffusers, clip_names, from_diffusers

MODULES = {"video_high": "video_dit", "video_low": "video_dit_2", "audio": "audio_dit", "bridge": "dual_tower_bridge"}
PARTS = tuple(MODULES)
FOLDERS = {
    "video_high": {"video_dit": "MOVA", "high_noise_model": "Wan", "transformer": "diffusers"},
    "video_low": {"video_dit_2": "MOVA", "low_noise_model": "Wan", "transformer_2": "diffusers"},
    "audio": {"audio_dit": "MOVA"},
    "bridge": {"dual_tower_bridge": "MOVA"},
}
AUDIO_LATENTS = 128  # channels of MOVA's audio VAE
# What an audio tower that starts from a video tower cannot take: its stem and head are for other latents.
AUDIO_FRESH = ("patch_embedding.weight", "head.head.weight", "head.head.bias")
STEM = "patch_embedding.weight"
SHOWN = 8  # tensors in one message


@dataclass(frozen=True)
class PartSource:
    """One part of the model on disk. Names and shapes are those of the part's module in model/.

    `fresh`: tensors of the part that the source does not have in a form that fits. `joint`: fields of JointConfig that
    the source knows ("text_length", "prediction").
    """

    part: str
    place: str
    layout: str
    config: TowerConfig | BridgeConfig
    tensors: Tensors
    origin: Mapping[str, str]  # name in `tensors`, by the part's own
    shapes: Mapping[str, tuple[int, ...]]
    fresh: tuple[str, ...] = ()
    towers: Mapping[str, int] = field(default_factory=dict)  # sizes of the towers that a Bridge was made for
    joint: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the tensors that the source provides."""
        return list(self.origin)

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored."""
        return self.tensors.dtype(self.origin[name])

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start]: elements of a tensor of `shapes`, in its order of memory, in the stored dtype.

        A video stem for 16 channels is widened: noisy latents come first in MOVA's input, so its channels stay the
        first ones and the others get weights of 0. Errors as `Tensors.read`.
        """
        stored, shape = self.tensors.shape(self.origin[name]), self.shapes[name]
        if stored == shape:
            return self.tensors.read(self.origin[name], start, stop)
        narrow, wide = math.prod(stored[1:]), math.prod(shape[1:])
        first, last = start // wide, -(-stop // wide)
        rows = self.tensors.read(self.origin[name], first * narrow, last * narrow).view(last - first, narrow)
        padded = rows.new_zeros(last - first, wide)
        padded[:, :narrow] = rows
        return padded.flatten()[start - first * wide : stop - first * wide]

    def fingerprint(self) -> str:
        """A digest of the tensors read from it."""
        return self.tensors.fingerprint(self.origin.values())


def parts_in(path: Path) -> list[str]:
    """The parts that a source holds under their own names. LayoutError if it holds none, or one twice."""
    if _is_flat(path):
        return _joint_parts(read_flat(path))
    found = [part for part in PARTS if _folder(path, part) is not None]
    if not found and (path.is_file() or (path / "config.json").is_file()):
        found = [_kind(open_files(path))]
    if not found:
        known = ", ".join(name for folders in FOLDERS.values() for name in folders)
        raise LayoutError(f"{path}: neither config.json nor any folder of a known layout ({known}) is there")
    return found


def open_part(path: Path, part: str, borrow: bool = False) -> PartSource:
    """One part of a source, checked: every tensor of the part is there in its shape, and no other one.

    `borrow`: where the source has no such part but one video tower, take that: for the other expert as it is, for the
    audio tower without stem and head. LayoutError, with the first names and shapes side by side, when it does not fit.
    """
    _refuse_other_vae(path)
    if _is_flat(path):
        config, joint = read_flat(path), open_files(path)
        return of_joint(config, joint, "", str(path), "flat")[part]
    found = _folder(path, part)
    if found is not None:
        folder, layout = found
        return _open(folder, part, layout)
    there = parts_in(path)
    alone = _folder(path, "video_high") is None and there == ["video_high"]
    if there == [part]:
        return _open(path, part, "one tower")
    if borrow and there == ["video_high"] and part in ("video_low", "audio"):
        folder, layout = (path, "one tower") if alone else _folder(path, "video_high") or (path, "")
        return _open(folder, part, layout) if part == "video_low" else _audio_of_video(folder, layout)
    raise LayoutError(f"{path} holds {', '.join(there)}, but no {part}")


def of_joint(config: JointConfig, tensors: Tensors, prefix: str, place: str, layout: str) -> dict[str, PartSource]:
    """The parts of a whole model whose tensors lie together, as `<prefix><module>.<name>`. LayoutError as
    `open_part`."""
    try:
        with torch.device("meta"):
            model = JointTransformer(config)
    except ValueError as error:
        raise LayoutError(f"{place}: {error}") from None
    configs: dict[str, TowerConfig | BridgeConfig] = {
        "video_high": config.video,
        "video_low": config.video,
        "audio": config.audio,
        "bridge": config.bridge,
    }
    joint = {"text_length": config.text_length, "prediction": config.prediction}
    known = {prefix + name for name in model.state_dict()}
    surplus = [name for name in tensors.names() if name.startswith(prefix) and name not in known]
    if surplus:
        _refuse(place, {name: (tensors.shape(name), None) for name in surplus})
    parts = {}
    for part in _joint_parts(config):
        shapes = _shapes(getattr(model, MODULES[part]))
        origin = {name: f"{prefix}{MODULES[part]}.{name}" for name in shapes}
        _check(place, tensors, origin, shapes)
        towers = bridge_sizes(config.video, config.audio) if part == "bridge" else {}
        parts[part] = PartSource(
            part, place, layout, configs[part], tensors, origin, shapes, towers=towers, joint=joint
        )
    return parts


def joint_config(parts: Mapping[str, PartSource], bridge: BridgeConfig | None = None) -> JointConfig:
    """The config of the model that parts form; video_high or video_low, and audio, must be among them. `bridge`: where
    no part gives its switches. LayoutError, naming both sides, if they do not fit each other."""
    videos = [parts[part] for part in ("video_high", "video_low") if part in parts]
    if len(videos) == 2 and (unlike := differences(videos[0].config, videos[1].config)):
        raise LayoutError(f"{videos[0].place} and {videos[1].place} have different sizes: {'; '.join(unlike)}")
    video, audio = videos[0].config, parts["audio"].config
    assert isinstance(video, TowerConfig) and isinstance(audio, TowerConfig)
    if "bridge" in parts:
        check_bridge(parts["bridge"], video, audio)
        found = parts["bridge"].config
        assert isinstance(found, BridgeConfig)
        bridge = found
    joint: dict[str, Any] = {}
    for one in parts.values():
        for key, value in one.joint.items():
            if joint.setdefault(key, value) != value:
                raise LayoutError(f"{one.place}: {key} is {value}, another part's source has {joint[key]}")
    try:
        return JointConfig(video, audio, bridge or BridgeConfig(), two_experts="video_low" in parts, **joint)
    except ValueError as error:
        raise LayoutError(f"{videos[0].place}, {parts['audio'].place}: {error}") from None


def check_bridge(bridge: PartSource, video: TowerConfig, audio: TowerConfig) -> None:
    """LayoutError unless a Bridge was made for such towers."""
    for key, value in bridge_sizes(video, audio).items():
        if bridge.towers[key] != value:
            raise LayoutError(f"{bridge.place}: {key} is {bridge.towers[key]}, the towers have {value}")


def differences(one: Any, other: Any) -> list[str]:
    """ "field: value of one -> value of the other" for the fields of two configs that differ."""
    first, second = vars(one), vars(other)
    return [f"{key}: {first[key]} -> {second[key]}" for key in first if first[key] != second[key]]


def _is_flat(path: Path) -> bool:
    config = path / "config.json"
    return config.is_file() and read_json(config).get("_class_name") == FLAT_CLASS


def _joint_parts(config: JointConfig) -> list[str]:
    return [part for part in PARTS if part != "video_low" or config.two_experts]


def _folder(path: Path, part: str) -> tuple[Path, str] | None:
    """(the folder of a part, its layout). LayoutError if several are possible."""
    found = [(path / name, layout) for name, layout in FOLDERS[part].items() if (path / name).is_dir()]
    if len(found) > 1:
        raise LayoutError(f"{path} holds {part} twice: {', '.join(folder.name for folder, _ in found)}")
    return found[0] if found else None


def _kind(tensors: Tensors) -> str:
    """The part that tensors belong to, when the folder's name does not tell."""
    names = list(tensors.names())
    if any(name.startswith("audio_to_video_conditioners.") for name in names):
        return "bridge"
    stem = STEM if STEM in names else None
    return "audio" if stem is not None and len(tensors.shape(stem)) == 3 else "video_high"


def _config(folder: Path) -> dict[str, Any] | None:
    """config.json of a folder; None for a file, which has none."""
    return None if folder.is_file() else read_json(folder / "config.json")


def _open(folder: Path, part: str, layout: str) -> PartSource:
    config, tensors = _config(folder), open_files(folder)
    if part == "bridge":
        if config is None:
            raise LayoutError(f"{folder}: a Bridge's switches are in its config.json; give its folder")
        bridge, sizes = read_bridge(config, str(folder))
        video, audio, _, layers = (sizes[key] for key in BRIDGE_SIZES)
        shapes = _on_meta(folder, lambda: Bridge(bridge, video, audio, layers))
        origin = _origin(tensors, str(folder))
        _check(str(folder), tensors, origin, shapes)
        return PartSource(part, str(folder), layout, bridge, tensors, origin, shapes, towers=sizes)
    origin = _origin(tensors, str(folder))
    stored = {name: tensors.shape(key) for name, key in origin.items()}
    rope = str((config or {}).get("vae_type", "oobleck" if config else "dac")) if part == "audio" else "video"
    tower = read_tower(config, stored, str(folder), rope)
    if part != "audio" and tower.in_dim == tower.out_dim:  # text to video: noisy latents and nothing else
        tower = replace(tower, in_dim=2 * tower.out_dim + 4)  # noisy, mask of 4, condition
        stored[STEM] = (stored[STEM][0], tower.in_dim, *stored[STEM][2:]) if STEM in stored else ()
    shapes = _on_meta(folder, lambda: Tower(tower))
    _check(str(folder), tensors, origin, shapes, stored)
    return PartSource(part, str(folder), layout, tower, tensors, origin, shapes, joint=_stated(config))


def _audio_of_video(folder: Path, layout: str) -> PartSource:
    """An audio tower out of a video tower of its size: all but the stem's weight and the head's linear."""
    video = _open(folder, "video_high", layout)
    assert isinstance(video.config, TowerConfig)
    tower = replace(video.config, in_dim=AUDIO_LATENTS, out_dim=AUDIO_LATENTS, patch_size=[1], rope="dac")
    shapes = _on_meta(folder, lambda: Tower(tower))
    origin = {name: key for name, key in video.origin.items() if name not in AUDIO_FRESH}
    _check(str(folder), video.tensors, origin, shapes, {name: shapes[name] for name in AUDIO_FRESH})
    return PartSource(
        "audio", str(folder), layout, tower, video.tensors, origin, shapes, fresh=AUDIO_FRESH, joint=video.joint
    )


def _stated(config: dict[str, Any] | None) -> dict[str, Any]:
    """What a tower's config states about the whole model: all published towers predict velocities; only original Wan
    states how many rows of text are attended."""
    stated = {"text_length": int(config["text_len"])} if config and "text_len" in config else {}
    return {"prediction": "velocity", **stated}


def _origin(tensors: Tensors, place: str) -> dict[str, str]:
    """{own name: name in the files}. LayoutError for names that no tower of MOVA has."""
    names = list(tensors.names())
    if clip := clip_names(names):
        some = ", ".join(f"{name} {tensors.shape(name)}" for name in clip[:3])
        raise LayoutError(
            f"{place} holds {len(clip)} tensors of CLIP image-to-video weights ({some}), which MOVA's towers lack; "
            "Wan 2.2 image-to-video and text-to-video weights fit"
        )
    if not are_diffusers(names):
        return {name: name for name in names}
    return {from_diffusers(name) or name: name for name in names}


def _on_meta(folder: Path, build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    try:
        with torch.device("meta"):
            return _shapes(build())
    except ValueError as error:
        raise LayoutError(f"{folder}: {error}") from None


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _check(
    place: str,
    tensors: Tensors,
    origin: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """LayoutError unless the files hold exactly the part's tensors in their shapes; `stored`: shapes that override the
    files' own."""
    there = set(tensors.names())
    whole = [f"{key} ({tensors.dtype(key)})" for key in origin.values() if key in there and not _floats(tensors, key)]
    if whole:
        raise LayoutError(f"{place} holds no floating-point weights: {', '.join(whole[:SHOWN])}; give unquantized ones")
    found = {name: tensors.shape(key) for name, key in origin.items() if key in there} | dict(stored or {})
    unlike = {
        name: (found.get(name), shapes.get(name))
        for name in sorted(found.keys() | shapes.keys())
        if found.get(name) != shapes.get(name)
    }
    if unlike:
        _refuse(place, unlike)


def _refuse(place: str, unlike: Mapping[str, tuple[Any, Any]]) -> None:
    """LayoutError that names tensors with (shape in the files, shape in the model)."""
    named = [
        f"{name}: {here or 'not there'} -> {wanted or 'not there'}"
        for name, (here, wanted) in list(unlike.items())[:SHOWN]
    ]
    more = [f"and {len(unlike) - SHOWN} more"] if len(unlike) > SHOWN else []
    raise LayoutError(f"{place}: tensors do not fit the config (files -> model): " + "; ".join(named + more))


def _floats(tensors: Tensors, name: str) -> bool:
    return tensors.dtype(name).is_floating_point


def _refuse_other_vae(path: Path) -> None:
    """LayoutError for a pipeline around another VAE than Wan 2.1's, whose latents MOVA's towers do not take."""
    for folder in (path / "vae", path / "video_vae"):
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        if config.get("z_dim", 16) != 16 or config.get("is_residual"):
            raise LayoutError(
                f"{folder}: z_dim {config.get('z_dim')}, is_residual {config.get('is_residual')}: this is the VAE of "
                "Wan 2.2's 5B model; MOVA's has 16 latent channels"
            )
