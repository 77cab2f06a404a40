"""The parts of a model, and what it means to freeze some of them. Everything about frozen parts starts here.

    optim.train=[bridge]                     # video_high video_low video audio bridge; video: both experts
    optim.parts.audio.lr=1e-4                # over optim.lr_tower; a single expert's over those of `video`

A frozen part has no gradient, nothing that the optimizer keeps, and no average: that is its weights. A forward gathers
it as any other; a backward gathers it only where a gradient passes through it on its way to a part that trains.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from core.errors import RunError
from core.ranges import bounded
from model.bridge import Conditioner
from model.joint import JointTransformer

GROUPS = {"video_dit": "video_high", "video_dit_2": "video_low", "audio_dit": "audio", "dual_tower_bridge": "bridge"}
PLACES = {tower: place for place, tower in enumerate(GROUPS)}
TOWERS = {part: tower for tower, part in GROUPS.items()}  # by part: "video_high" is "video_dit"
ALL = frozenset(GROUPS)
NAMES = ("video_high", "video_low", "video", "audio", "bridge")


def tower_of(name: str) -> str:
    """The tower of a parameter by its full name: "video_dit", "video_dit_2", "audio_dit" or "dual_tower_bridge". Its
    parameters are stepped together."""
    return name.split(".")[0]


@dataclass
class PartConfig:
    """Settings of one part.

    lr: learning rate (null: lr_tower, or lr_bridge for the Bridge)
    weight_decay: its weight decay (null: optim.weight_decay)
    """

    lr: float | None = bounded(None, "[0, inf)")
    weight_decay: float | None = bounded(None, "[0, inf)")


@dataclass
class PartsConfig:
    """Settings of single parts; those of one expert override those of both.

    video_high: of the expert for high noise
    video_low: of the expert for low noise
    video: of both experts
    audio: of the audio tower
    bridge: of the Bridge
    """

    video_high: PartConfig = field(default_factory=PartConfig)
    video_low: PartConfig = field(default_factory=PartConfig)
    video: PartConfig = field(default_factory=PartConfig)
    audio: PartConfig = field(default_factory=PartConfig)
    bridge: PartConfig = field(default_factory=PartConfig)

    def of(self, name: str) -> list[PartConfig]:
        """A setting of the part that a parameter belongs to, by its full name; the most specific one counts."""
        part = GROUPS[tower_of(name)]
        return [getattr(self, part), *([self.video] if part.startswith("video") else [])]


def check_names(train: Sequence[str]) -> None:
    """ValueError unless these are names of parts, and at least one."""
    if unknown := [name for name in train if name not in NAMES]:
        raise ValueError(f"optim.train names {', '.join(map(repr, unknown))}; the parts are {', '.join(NAMES)}")
    if not train:
        raise ValueError(f"optim.train is empty: nothing would be learned; name some of {', '.join(NAMES)}")


def trained_towers(train: Sequence[str], experts: Sequence[str]) -> frozenset[str]:
    """The towers, and the Bridge, that `optim.train` names, by their names in the model with these `experts`.

    RunError for an expert that it does not have.
    """
    there = {f"video_{expert}" for expert in experts} | {"audio", "bridge"}
    if absent := [name for name in train if name != "video" and name not in there]:
        raise RunError(f"optim.train names {absent[0]}, but this model has only {', '.join(sorted(there))}")
    named = [part for part in there if part in train or (part.startswith("video_") and "video" in train)]
    return frozenset(TOWERS[part] for part in named)


def idle_experts(train: Sequence[str], experts: Sequence[str]) -> list[str]:
    """Experts in whose steps none of the parts in `optim.train` takes part."""
    trained = trained_towers(train, experts)
    if trained & {"audio_dit", "dual_tower_bridge"}:
        return []
    return [expert for expert in experts if TOWERS[f"video_{expert}"] not in trained]


def freeze(model: JointTransformer, trained: Collection[str]) -> None:
    """Let only these towers take part in gradients. Before FSDP2 or ZeRO shards them."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(tower_of(name) in trained)


AHEAD = 2  # units whose weights are on their way while one computes: the next large one, whatever stands between


class Unit(NamedTuple):
    """Modules whose parameters are gathered together, in the order in which they run, and the streams of states
    ("video", "audio") that they join."""

    modules: tuple[nn.Module, ...]
    reads: frozenset[str]
    writes: frozenset[str]


def forward_order(model: JointTransformer, expert: str, video: bool, audio: bool) -> Iterator[Unit]:
    """The units that a forward of this expert runs, in order, each with the modules of it that run; `video`, `audio`:
    whether it gets them."""
    tower = model.expert(expert)
    none, seen, heard = frozenset[str](), frozenset({"video"}), frozenset({"audio"})
    for present, part, stream in ((video, tower, seen), (audio, model.audio_dit, heard)):
        if present:
            yield Unit((part.patch_embedding, part.text_embedding), none, stream)
            yield Unit((part.time_embedding, part.time_projection), none, stream)
    for i in range(model.config.video.num_layers):
        for modules in small_units(model, i) if audio else ():
            running = modules if video else tuple(one for one in modules if not isinstance(one, Conditioner))
            if running:
                streams = seen | heard if isinstance(running[0], Conditioner) else heard
                yield Unit(running, streams, streams)
        if video:
            yield Unit((tower.blocks[i],), seen, seen)
    if video:
        yield Unit((tower.head,), seen, none)
    if audio:
        yield Unit((model.audio_dit.head,), heard, none)


def small_units(model: JointTransformer, layer: int) -> list[tuple[nn.Module, ...]]:
    """What runs in a layer beside the video block, in order: both Bridge directions, if the towers meet there, and the
    audio block, if audio is that deep. They are one unit, except where sound learns beside a frozen Bridge: it may
    learn alone, and the Bridge would be gathered for nothing."""
    bridge, key = model.dual_tower_bridge, str(layer)
    pair: tuple[nn.Module, ...] = ()
    if layer in bridge.layers:
        pair = bridge.audio_to_video_conditioners[key], bridge.video_to_audio_conditioners[key]
    block = (model.audio_dit.blocks[layer],) if layer < model.config.audio.num_layers else ()
    if pair and block and (learns(pair[0]) or not learns(block[0])):
        return [pair + block]
    return [modules for modules in (pair, block) if modules]


def learns(module: nn.Module) -> bool:
    """Whether its weights train: all parameters of a module belong to one part."""
    return next(module.parameters()).requires_grad


def in_backward(order: Sequence[Unit]) -> list[bool]:
    """Which of a forward's units a gradient passes through: those that train, and what follows them."""
    carried: set[str] = set()
    found = []
    for unit in order:
        takes_part = any(map(learns, unit.modules)) or bool(unit.reads & carried)
        carried |= unit.writes if takes_part else set()
        found.append(takes_part)
    return found
