"""Folders in the reference's layout <-> a whole model in this process.

    model = load_mova("MOVA-360p", dtype=torch.bfloat16)      # video_dit, [video_dit_2,] audio_dit, dual_tower_bridge
    save_mova(model, "exported")

For one process with memory for the whole model. Training reads such folders (and others, see model/weights) slice by
slice: init.source; a run's weights become such a folder by tools/export.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from model.joint import JointConfig, JointTransformer
from model.weights.configs import bridge_config, tower_config
from model.weights.files import STEM, LayoutError
from model.weights.mova import INDEX_FILE, inexpressible, model_index
from model.weights.parts import MODULES, PartSource, joint_config, open_part, parts_in
from model.weights.write import write_json, write_weights

__all__ = ["LayoutError", "load_mova", "read_config", "save_mova"]


def load_mova(folder: str | Path, dtype: torch.dtype = torch.float32) -> JointTransformer:
    """Model with the weights of a folder in the reference's layout, cast to dtype, on the CPU.

    Raises LayoutError for a missing folder or file, an unsupported config, and missing, unknown or misshapen tensors.
    """
    parts = _parts(Path(folder))
    with torch.device("meta"):
        model = JointTransformer(joint_config(parts))
    for part, source in parts.items():
        weights = {
            name: source.read(name, 0, math.prod(source.shapes[name])).view(source.shapes[name]).to(dtype)
            for name in source.names
        }
        module = getattr(model, MODULES[part])
        module.load_state_dict(weights, assign=True)
        module.requires_grad_(True)
    return model


def read_config(folder: str | Path) -> JointConfig:
    """The JointConfig of a folder in the reference's layout. Raises LayoutError."""
    return joint_config(_parts(Path(folder)))


def save_mova(model: JointTransformer, folder: str | Path, boundary_ratio: float = 0.9) -> None:
    """Write a model in the reference's layout, in the dtype it has. The parts must be whole (not sharded) tensors.

    `boundary_ratio`: the noise level that separates the experts, written to model_index.json. LayoutError for a model
    that the layout cannot express.
    """
    if lost := inexpressible(model.config):
        raise LayoutError(f"MOVA's layout cannot express {', '.join(lost)}")
    root = Path(folder)
    for module, part in model.named_children():
        place = root / module
        place.mkdir(parents=True, exist_ok=True)
        for old in place.glob(f"{STEM}*"):  # a folder that held other shards must not mix with these
            old.unlink()
        tensors = part.state_dict()
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}

        def read(name: str, tensors: dict[str, Tensor] = tensors) -> Tensor:
            return tensors[name].detach().cpu().contiguous()

        write_weights(place, sizes, read)
        config = model.config
        if module == "dual_tower_bridge":
            write_json(place / "config.json", bridge_config(config))
        else:
            write_json(place / "config.json", tower_config(config.audio if module == "audio_dit" else config.video))
    write_json(root / INDEX_FILE, model_index(model.config, boundary_ratio))


def _parts(root: Path) -> dict[str, PartSource]:
    there = parts_in(root)
    for part in ("video_high", "audio", "bridge"):
        if part not in there:
            raise LayoutError(f"{root}/{MODULES[part]}/config.json is missing; the reference's layout has it")
    return {part: open_part(root, part) for part in there}
