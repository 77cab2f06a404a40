"""Turns a command line into a checked config: Hydra's compose API over conf/, with one line for each mistake.

    schema = Schema("train", TrainConfig)               # conf/train.yaml, whose keys and types the dataclass declares
    composed = compose(schema, ["model=small", "run.id=1_11", "steps=20"])
    config, plain = composed.typed(), composed.plain()

A program without a YAML file of its own names its groups: Schema("bench_step", StepBench, (("model", "small"),)).
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from core.errors import UserError
from core.keys import Variants, hints, is_optional, is_text, nearest, types_of, walk, words
from core.ranges import to_object
from core.renamed_keys import new_name
from core.typed import escape, read_text

PACKAGE = "conf"
_REGISTERED: dict[str, Schema] = {}  # by name; a later one takes the place of an earlier one
Groups = tuple[tuple[str, str | None], ...]  # (group, its default choice)


class ConfigError(UserError):
    """A key, a value or a choice that the config does not accept."""


@dataclass(frozen=True)
class Schema:
    """What the config of a program consists of.

    name: of conf/NAME.yaml, where `groups` is None; groups: those of a program without such a file; variants:
    dataclasses of which one is chosen by name.
    """

    name: str
    type: type
    groups: Groups | None = None
    variants: Variants = field(default_factory=dict)

    def register(self) -> None:
        """Register it with Hydra, once: as `NAME_schema`, on which conf/NAME.yaml builds, or as the whole config."""
        if _REGISTERED.get(self.name) is self:
            return
        _REGISTERED[self.name] = self
        store = ConfigStore.instance()
        node = OmegaConf.structured(self.type)
        _open_dicts(node)
        store.store(name=f"{self.name}_schema", node=node)
        for group, choices in self.variants.items():
            for choice, kind in choices.items():
                variant = OmegaConf.structured(kind)
                _open_dicts(variant)
                store.store(group=group, name=f"{choice}_schema", node=variant)
        if self.groups is not None:
            defaults = [f"{self.name}_schema", *({group: choice} for group, choice in self.groups), "_self_"]
            store.store(name=self.name, node={"defaults": defaults})

    def types_of(self, path: str) -> list[Any]:
        """The types that a key may have; none for a key that does not exist."""
        return types_of(self.type, path, self.variants)

    def paths(self, beside: str) -> list[str]:
        """All keys; with `path` through a dict, also the other keys that such an entry can have."""
        found = [one.path for one in walk(self.type, self.variants)]
        above = beside.rpartition(".")[0]
        inner = [kind for kind in self.types_of(above) if dataclasses.is_dataclass(kind)] if above else []
        return found + [f"{above}.{name}" for kind in inner for name in hints(typing.cast(type, kind))]


@dataclass(frozen=True)
class Composed:
    """A config that fits its schema. choices: the name chosen in each group ("null": none)."""

    config: DictConfig
    choices: dict[str, str]

    def typed(self) -> Any:
        """The dataclass. ConfigError for a missing, impossible or contradictory value."""
        try:
            return to_object(self.config)
        except MissingMandatoryValue as error:
            raise _missing(error) from None
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            raise ConfigError(_first_line(error)) from None

    def plain(self) -> dict[str, Any]:
        """Nested plain values. ConfigError for a missing one."""
        try:
            values: Any = OmegaConf.to_container(self.config, resolve=True, throw_on_missing=True)
            return dict(values)
        except MissingMandatoryValue as error:
            raise _missing(error) from None
        except OmegaConfBaseException as error:
            raise ConfigError(_first_line(error)) from None


def compose(schema: Schema, overrides: Sequence[str], also: Sequence[str] = ()) -> Composed:
    """The config that these key=value arguments describe. ConfigError for the first wrong one; `also`: keys of another
    config to consider when suggesting a correction."""
    schema.register()
    with hydra.initialize_config_module(PACKAGE, version_base=None):
        groups = choices_by_group(schema)
        read = [_read(override, schema, groups, also) for override in overrides]
        chosen = [one for one in read if one.chooses]
        try:
            config = hydra.compose(schema.name, [one.given for one in chosen], return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise _explained(error, schema, chosen) from None
    choices = {str(group): str(name) for group, name in config.hydra.runtime.choices.items()}
    with flag_override(config, "struct", False):
        del config["hydra"]
    for one in read:
        if not one.chooses:
            _assign(config, one, schema)
    return Composed(config, choices)


@dataclass(frozen=True)
class _Override:
    """An argument: the text as typed, its key (without + and ~) and its value; chooses: it selects a choice of a group;
    removes: it removes an entry from a dict."""

    given: str
    key: str
    value: Any = None
    chooses: bool = False
    removes: bool = False


def _read(given: str, schema: Schema, groups: Mapping[str, list[str]], also: Sequence[str] = ()) -> _Override:
    """Parse an argument and check its key. ConfigError if either fails."""
    left, equals, value = given.partition("=")
    key = left.lstrip("+~").partition("@")[0]
    if given.startswith("-") or not key or not (equals or left.startswith("~")):
        raise ConfigError(f"{given}: not of the form key=value (--help lists the keys)")
    if (new := new_name(key)) is not None:
        remedy = f"this key was removed; use {new} instead" if "=" in new else f"this key is now called {new}"
        raise ConfigError(f"{given}: {remedy}")
    kinds = schema.types_of(key)
    if key in groups and not (kinds and value.startswith("{")):
        _check_choice(given, key, value, groups)
        return _Override(given.lstrip("+"), key, chooses=True)
    if not kinds:
        raise ConfigError(f"{given}: there is no key {key}{nearest(key, [*schema.paths(key), *groups, *also])}")
    if left.startswith("~"):
        if _entry(key, schema) is None:
            raise ConfigError(f"{given}: this key cannot be removed; give it a value, {key}=... (null means none)")
        return _Override(given, key, removes=True)
    return _Override(given, key, _read_value(given, key, value, kinds))


def _read_value(given: str, key: str, value: str, kinds: Sequence[Any]) -> Any:
    """The value of a key: text as typed, everything else in Hydra's grammar."""
    if all(is_text(kind) for kind in kinds):
        text = read_text(value, all(is_optional(kind) for kind in kinds))
        if text == "???":
            raise ConfigError(f"{given}: ??? marks a missing value and cannot be given")
        return None if text is None else escape(text)
    try:
        parsed = OverridesParser.create().parse_override(f"key={value}")
        if not parsed.is_sweep_override():
            return parsed.value()
    except HydraException:
        pass
    remedy = ""
    if value[:1] in ("[", "{"):
        remedy = "; put items that have blanks, commas or = in quotes, as ['a=1','b c']"
    elif "," in value:
        remedy = "; a list is written [a,b]"
    raise ConfigError(f"{given}: {key} takes {_wanted(kinds)}{remedy}")


def _assign(config: DictConfig, one: _Override, schema: Schema) -> None:
    """Set a key, as Hydra would. ConfigError if the dataclasses reject the value."""
    entry = _entry(one.key, schema)
    if one.removes:
        above, _, name = one.key.rpartition(".")
        OmegaConf.select(config, above).pop(name, None)
        return
    try:
        if entry is not None and OmegaConf.select(config, entry[0]) is None and dataclasses.is_dataclass(entry[1]):
            OmegaConf.update(config, entry[0], OmegaConf.structured(entry[1]))
        OmegaConf.update(config, one.key, one.value)
    except (ConfigKeyError, ConfigAttributeError) as error:
        kinds = schema.types_of(path := _path(error, one.key))
        group = path.partition(".")[0]
        reason = f"{path} belongs to another choice of {group} ({group}=...)" if kinds else _no_key(path, schema)
        raise ConfigError(f"{one.given}: {reason}") from None
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        path = _path(error, one.key)
        raise ConfigError(f"{one.given}: {path} takes {_wanted(schema.types_of(path))}") from None


def _path(error: BaseException, key: str) -> str:
    """The key that an error names, without a list index."""
    path = str(getattr(error, "full_key", None) or key).partition("[")[0]
    return path if path.startswith(key) or key.startswith(path) else key


def _no_key(path: str, schema: Schema) -> str:
    return f"there is no key {path}{nearest(path, schema.paths(path))}"


def _entry(path: str, schema: Schema) -> tuple[str, Any] | None:
    """(path of the entry, its type) if a path leads through a dict whose names the user chooses."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        above = schema.types_of(".".join(parts[:end]))
        if above and typing.get_origin(above[0]) is dict:
            return ".".join(parts[: end + 1]), typing.get_args(above[0])[1]
    return None


def _wanted(kinds: Sequence[Any]) -> str:
    """A type with its article: "a whole number", "text", "a list of numbers"."""
    name = words(kinds[0]) if kinds else "another value"
    return f"a {name}" if name.startswith(("whole", "number", "list")) else name


def _check_choice(given: str, group: str, value: str, groups: Mapping[str, list[str]]) -> None:
    names = [name.strip(" '\"") for name in value.strip("[]").split(",")] if value.startswith("[") else [value]
    for name in names:
        if name not in groups[group] and name != "null":
            there = ", ".join(groups[group])
            raise ConfigError(f"{given}: {PACKAGE}/{group} has no {name or 'empty name'}; choose one of {there}")


def choices_by_group(schema: Schema) -> dict[str, list[str]]:
    """{group: its choices} of the groups that a program takes. Within initialize_config_module."""
    loader = GlobalHydra.instance().config_loader()
    # Not the loader's own get_group_options, which copies the repository for each group: a third of a composition.
    repository: Any = loader.repository  # type: ignore[attr-defined]  # of Hydra's one loader
    if schema.groups is not None:
        names = [group for group, _ in schema.groups]
    else:
        loaded = repository.load_config(schema.name)
        entries = [] if loaded is None else loaded.defaults_list or []
        names = [str(one.group) for one in entries if hasattr(one, "group") and not one.override]
    found = {name: repository.get_group_options(name, ObjectType.CONFIG) for name in names}
    return {name: [one for one in options if not one.endswith("_schema")] for name, options in found.items()}


def _explained(error: Exception, schema: Schema, chosen: Sequence[_Override]) -> ConfigError:
    """In one line, what Hydra rejects in the chosen files."""
    if isinstance(error, MissingConfigException):
        return ConfigError(f"{PACKAGE}/{error.missing_cfg_file}.yaml does not exist, but another config file names it")
    cause: BaseException = error
    while not isinstance(cause, OmegaConfBaseException) and (before := cause.__cause__ or cause.__context__):
        cause = before
    path = str(getattr(cause, "full_key", None) or "").partition("[")[0]
    if not path:
        null = next((one for one in chosen if one.given.endswith("=null")), None)
        if null is not None:
            return ConfigError(f"{null.given}: choose one of the configs in {PACKAGE}/{null.key}")
        named = next((f"{one.given}: " for one in chosen if one.key in str(error)), "")
        return ConfigError(named + _first_line(error))
    place = _file_in(error)
    if (new := new_name(path)) is not None:
        return ConfigError(f"{place}: {path} is now called {new}")
    if not (kinds := schema.types_of(path)):
        return ConfigError(f"{place}: {_no_key(path, schema)}")
    return ConfigError(f"{place}: {path} takes {_wanted(kinds)} ({_first_line(cause)})")


def _file_in(error: Exception) -> str:
    """The file of conf/ that a Hydra error names."""
    first = str(error).splitlines()[0]
    name = first.split("'")[1] if first.startswith("In '") else ""
    return f"{PACKAGE}/{name}.yaml" if name else PACKAGE


def _missing(error: MissingMandatoryValue) -> ConfigError:
    key = getattr(error, "full_key", None) or "a mandatory key"
    return ConfigError(f"{key} is missing: give it on the command line, {key}=...")


def _first_line(error: BaseException) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    key = getattr(error, "full_key", None)
    return text if not key or key in text else f"{key}: {text}"


def _open_dicts(node: DictConfig) -> None:
    """Let dicts accept names that the user chooses without a "+"."""
    kind = OmegaConf.get_type(node)
    if not dataclasses.is_dataclass(kind):
        return
    for name in hints(typing.cast(type, kind)):
        if OmegaConf.is_missing(node, name) or node[name] is None:
            continue
        if isinstance(node[name], DictConfig):
            if not dataclasses.is_dataclass(OmegaConf.get_type(node[name])):
                OmegaConf.set_struct(node[name], False)
            else:
                _open_dicts(node[name])
