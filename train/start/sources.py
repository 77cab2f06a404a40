"""The sources that `init` names, opened and checked against each other: what is read, what is drawn, and which model
that makes.

    sources = open_sources(init)                       # RunError where a part has none, or where they do not fit
    sources.model                                      # the JointConfig that they form, None if undetermined
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from core.errors import RunError, missing
from model.joint import JointConfig
from model.weights.files import LayoutError
from model.weights.parts import (
    PARTS,
    PartSource,
    check_bridge,
    differences,
    joint_config,
    of_joint,
    open_part,
    parts_in,
)
from train.checkpoint.checkpoint import committed, damage, has_marker
from train.start.checkpoint_tensors import CheckpointTensors, model_of, read_state
from train.start.config import FRESH, ZERO, InitConfig

Choose = Callable[[Path], Path]  # from the folder of a run to the checkpoint that is read


@dataclass(frozen=True)
class Sources:
    """`parts`: what is read, by part; `made`: what is drawn, and how ("fresh" or "zero"); `model`: the config that they
    form, None if a tower's sizes come from no source."""

    parts: Mapping[str, PartSource]
    made: Mapping[str, str]
    model: JointConfig | None

    def check(self, model: JointConfig) -> None:
        """RunError, with the differing values side by side, unless the sources are of this model."""
        lines = []
        for part, source in self.parts.items():
            name = "video" if part.startswith("video") else part
            lines += [f"{name}.{line} ({source.place})" for line in differences(getattr(model, name), source.config)]
            if part == "bridge":
                try:
                    check_bridge(source, model.video, model.audio)
                except LayoutError as error:
                    lines.append(str(error))
            lines += [
                f"{key}: {getattr(model, key)} -> {value} ({source.place})"
                for key, value in source.joint.items()
                if getattr(model, key) != value
            ]
        if model.two_experts != ("video_low" in {*self.parts, *self.made}):
            lines.append(f"two_experts: {model.two_experts} -> {not model.two_experts}")
        if lines:
            unlike = "; ".join(dict.fromkeys(lines))
            raise RunError(
                f"init: the weights belong to another model than the configured one (model -> source): {unlike}; leave "
                "out model= to take the source's"
            )


def open_sources(init: InitConfig, choose: Choose | None = None) -> Sources:
    """Open what `init` names; only headers and configs are read. `choose`: picks a run's checkpoint (default: its
    newest). RunError if a part has no source, a source cannot be read, or they do not fit each other."""
    parts, made = {}, {}
    for part in PARTS:
        word = getattr(init, part)
        if word in (FRESH, ZERO):
            made[part] = word
        elif word is not None:
            parts[part] = _open(f"init.{part}", Path(word), part, True, choose or newest_of)
        elif init.source is not None and part in _parts(Path(init.source), choose or newest_of):
            parts[part] = _open("init.source", Path(init.source), part, False, choose or newest_of)
        elif part != "video_low":  # a model may have one expert
            where = f"init.source={init.source} holds none" if init.source else "init.source is not given"
            zero = f" or init.{part}={ZERO}" if part == "bridge" else ""
            raise RunError(f"init.{part} has no source: {where}; give init.{part}=FOLDER, or init.{part}={FRESH}{zero}")
    try:
        whole = any(part.startswith("video") for part in parts) and "audio" in parts
        model = joint_config(parts) if whole else None
    except LayoutError as error:
        raise RunError(f"init: {error}") from None
    if model is not None and made.get("video_low"):
        model.two_experts = True
    return Sources(parts, made, model)


def newest_of(run: Path) -> Path:
    """The newest committed checkpoint of a run. RunError if it has none."""
    found = committed(run / "checkpoints")
    if not found:
        raise missing(f"{run} holds no committed checkpoint")
    return found[-1]


def _checkpoint(path: Path, choose: Choose) -> Path | None:
    """The checkpoint that a path denotes; None for a source of another kind."""
    if (path / "checkpoints").is_dir() or has_marker(path):
        found = choose(path) if (path / "checkpoints").is_dir() else path
        if fault := damage(found):
            raise missing(f"{found} cannot be used: {fault}")
        return found
    return None


def _parts(path: Path, choose: Choose) -> list[str]:
    found = _checkpoint_or_refuse("init.source", path, choose)
    if found is not None:
        two_experts = model_of(read_state(found)).two_experts
        return [part for part in PARTS if part != "video_low" or two_experts]
    try:
        return parts_in(path)
    except LayoutError as error:
        raise RunError(f"init.source={path}: {error}") from None
    except OSError as error:
        raise RunError(f"init.source={path} cannot be read: {error}", retry=True) from None


def _open(key: str, path: Path, part: str, borrow: bool, choose: Choose) -> PartSource:
    found = _checkpoint_or_refuse(key, path, choose)
    try:
        if found is None:
            return open_part(path, part, borrow)
        parts = of_joint(model_of(read_state(found)), CheckpointTensors(found), "model.", str(found), "checkpoint")
    except LayoutError as error:
        raise RunError(f"{key}={path}: {error}") from None
    except OSError as error:
        raise RunError(f"{key}={path} cannot be read: {error}", retry=True) from None
    if part not in parts:
        raise RunError(f"{key}={path} holds {', '.join(parts)}, but no {part}")
    return parts[part]


def _checkpoint_or_refuse(key: str, path: Path, choose: Choose) -> Path | None:
    if not path.exists():
        raise missing(f"{key}={path} does not exist; give a folder of weights, a run or one of its checkpoints")
    try:
        return _checkpoint(path, choose)
    except RunError as error:
        raise RunError(f"{key}={path}: {error}", error.retry) from None
