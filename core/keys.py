"""The keys of a config, read from its dataclasses: their names and types, and which one a typo probably meant.

    walk(TrainConfig)                            # every key in order, groups flattened: run.id, run.root, steps, ...
    types_of(TrainConfig, "optim.lr_tower")      # [float]; [] for a key that does not exist

In a dict the user chooses the names: `cluster.environment.NAME` has the type of its values. If one of several
dataclasses is chosen by name (`cluster`: local or slurm), `variants` holds them, and a key of any of them exists.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Variants = Mapping[str, Mapping[str, type]]  # {"cluster": {"local": LocalConfig, "slurm": SlurmConfig}}

WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false"}
NEAR = 0.7  # minimum similarity for suggesting a key


@dataclass(frozen=True)
class Key:
    """One key. owner: the dataclass that declares it, under `name`; variant: the choice it belongs to, or ""."""

    path: str
    name: str
    owner: type
    type: Any
    variant: str = ""


def walk(schema: type, variants: Variants | None = None, prefix: str = "") -> list[Key]:
    """All keys of a config in the order in which they are declared; those of a nested dataclass with their prefix."""
    keys: list[Key] = []
    for name, kind in hints(schema).items():
        path = prefix + name
        inner = [one for one in _members(kind) if dataclasses.is_dataclass(one)]
        if chosen := (variants or {}).get(path):
            keys += [
                dataclasses.replace(key, variant=key.variant or choice)
                for choice, one in chosen.items()
                for key in walk(one, variants, f"{path}.")
            ]
        elif inner:
            keys += walk(typing.cast(type, inner[0]), variants, f"{path}.")
        else:
            keys.append(Key(path, name, schema, kind))
    return keys


def types_of(schema: type, path: str, variants: Variants | None = None) -> list[Any]:
    """The types that a key may have: one, several if variants differ, none if the key does not exist."""
    found: list[Any] = [schema]
    at = ""
    for part in path.split("."):
        at = f"{at}.{part}" if at else part
        found = [kind for one in found for kind in _below(one, part)]
        if chosen := (variants or {}).get(at):
            found = list(chosen.values())
    return found


def hints(schema: type) -> dict[str, Any]:
    """The fields of a dataclass with their types, resolved."""
    known = typing.get_type_hints(schema)
    return {one.name: known[one.name] for one in dataclasses.fields(schema)}


def is_text(kind: Any) -> bool:
    """Whether a key of this type takes text as typed: str, or str | None."""
    return set(_members(kind)) == {str}


def is_optional(kind: Any) -> bool:
    """Whether null is a value of this type."""
    return types.NoneType in (typing.get_args(kind) or (kind,)) or kind is Any


def words(kind: Any) -> str:
    """A type as a user reads it: "text", "whole number", "list of text", "number or null"."""
    if is_optional(kind) and kind is not Any:
        return f"{' or '.join(words(one) for one in _members(kind))} or null"
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return f"list of {words(inner[0])}s".replace("texts", "text").replace("s or nulls", "s or null")
    if origin is dict:
        return f"{{name: {words(inner[1])}}}"
    if dataclasses.is_dataclass(kind):
        return "{key: value}"
    return WORDS.get(kind, "any value")


def nearest(wrong: str, paths: Iterable[str]) -> str:
    """A question that names the keys most similar to a wrong one, or "" if none is similar."""
    known = list(dict.fromkeys(paths))
    near = difflib.get_close_matches(wrong, known, n=3, cutoff=NEAR)
    if not near:  # right name, wrong place: lr_tower, or train.engine.optim.lr_tower
        last = wrong.rpartition(".")[2]
        near = [path for path in known if path.rpartition(".")[2] == last][:3]
    near = [path for path in near if path != wrong]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _below(kind: Any, part: str) -> Sequence[Any]:
    found = []
    for one in _members(kind):
        inner = typing.get_args(one)
        if dataclasses.is_dataclass(one):
            known = hints(typing.cast(type, one))
            found += [known[part]] if part in known else []
        elif typing.get_origin(one) is dict:
            found.append(inner[1])
        elif typing.get_origin(one) is list and part.isdigit():
            found.append(inner[0])
        elif one is Any:
            found.append(Any)
    return found


def _members(kind: Any) -> list[Any]:
    """The types of a union, without None."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return [one for one in typing.get_args(kind) if one is not types.NoneType]
    return [kind]
