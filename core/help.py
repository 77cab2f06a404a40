"""What `mova PROGRAM --help` prints: every key with type, default and meaning, from the dataclasses' docstrings.

The docstring of a config dataclass has a line `key: meaning` for each of its keys; a longer meaning continues on lines
that are indented further. The text before the first such line describes the dataclass itself.
"""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from core.compose import PACKAGE, Schema, choices_by_group, compose
from core.errors import UserError
from core.keys import Key, hints, walk, words

WIDEST = 120
LONGEST = 80  # characters of a default


def meanings(kind: type) -> dict[str, str]:
    """{key: meaning} from the docstrings of a dataclass and its bases."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__[:-1]):
        name = ""
        for line in inspect.cleandoc(one.__dict__.get("__doc__") or "").splitlines():
            match = re.match(r"(\w+): (\S.*)", line)
            if match and match[1] in hints(kind):
                name = match[1]
                found[name] = match[2].strip()
            elif name and line.startswith(" "):
                found[name] += f" {line.strip()}"
            else:
                name = ""
    return found


def summary(kind: type) -> str:
    """The docstring of a dataclass up to its first key."""
    lines = []
    for line in inspect.cleandoc(kind.__dict__.get("__doc__") or "").splitlines():
        match = re.match(r"(\w+): \S", line)
        if not line.strip() or (match and match[1] in hints(kind)):
            break
        lines.append(line.strip())
    return " ".join(lines)


def describe(command: str, doc: str, schema: Schema | None) -> str:
    """The whole help of a program. doc: its module's docstring; schema: None for a program without keys."""
    head = doc.strip()
    if schema is None:
        return f"{head}\n"
    return "\n".join([head, "", *_groups(schema), *_keys(schema), *_footer(command), ""])


def _groups(schema: Schema) -> list[str]:
    schema.register()
    with hydra.initialize_config_module(PACKAGE, version_base=None):
        groups = choices_by_group(schema)
    if not groups:
        return []
    width = max(map(len, groups))
    lines = [f"  {group:<{width}}  {', '.join(choices)}" for group, choices in groups.items()]
    return [f"Choices (files of {PACKAGE}/), as group=name:", "", *lines, ""]


def _keys(schema: Schema) -> list[str]:
    values = composed_defaults(schema)
    lines: list[str] = []
    section: str | None = None
    for key in walk(schema.type, schema.variants):
        above = key.path.rpartition(".")[0]
        title = f"{above} ({above}={key.variant})" if key.variant else above
        if title != section:
            section = title
            lines += ["" if lines else "Keys, as key=value:", *([] if lines else [""]), *_section(title, key)]
        lines += _one(key, values)
    return lines


def _section(title: str, key: Key) -> list[str]:
    about = summary(key.owner)
    return _wrapped(f"{title}: {about}" if title else about, 0) if title or about else []


def _one(key: Key, values: DictConfig | None) -> list[str]:
    text = meanings(key.owner).get(key.name, "")
    default = default_of(key, values)
    shown = ", required" if default is None else f", default {default}"
    return [f"  {key.path}  <{words(key.type)}>{shown}", *_wrapped(text, 6)]


def default_of(key: Key, values: DictConfig | None) -> str | None:
    """The default of a key as it is typed; None where it must be given. `values`: see `composed_defaults`."""
    value: Any = OmegaConf.select(values, key.path, default="???") if values is not None else "???"
    if key.variant and (values is None or OmegaConf.is_missing(values, key.path) or value == "???"):
        value = _of_variant(key)
    if value == "???":
        return None
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return '""' if value == "" else str(value)[:LONGEST]


def _of_variant(key: Key) -> Any:
    return OmegaConf.select(OmegaConf.structured(key.owner), key.name, default="???")


def composed_defaults(schema: Schema) -> DictConfig | None:
    """The config of a program to which nothing is given; None where it can't be composed."""
    try:
        return compose(schema, []).config
    except UserError:
        return None


def _footer(command: str) -> list[str]:
    return [
        "",
        f"{command} ... --cfg job prints the composed config and exits. Text is taken as typed;",
        r"null means none where a key may be null (the word itself: \null); lists are [a,b], dicts {a: 1}.",
    ]


def _wrapped(text: str, indent: int) -> list[str]:
    width = min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)
    space = " " * indent
    return textwrap.wrap(text, width, initial_indent=space, subsequent_indent=space, break_on_hyphens=False)
