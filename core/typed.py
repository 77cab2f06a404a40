r"""Text values are taken literally: a key whose type is text takes what the shell passed, character for character.

    run.id=1_11                     the text 1_11, not the number 111
    prompt="It's raining, (a lot)"  quotes, commas, brackets and ${...} have no meaning
    run.start_from=null             none, where the key may be null
    prompt=\null                    the word null (\\null: a backslash before it)

Other keys keep Hydra's grammar: numbers, true and false, lists as [a,b] and dicts as {a: 1}, whose items need quotes
if they contain blanks, commas or =. Values in YAML files keep YAML's.

Such a text enters the composed config as an interpolation that holds it in hexadecimal digits, so neither Hydra's
parser nor OmegaConf's ("???", "${") can interpret any of it; it is text again as soon as it is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

RESOLVER = "as_typed"
NULL = re.compile(r"(\\*)null")


def escape(text: str) -> str:
    """An interpolation that yields this text, whatever characters it contains."""
    return f"${{{RESOLVER}:x{text.encode('utf-8', 'surrogateescape').hex()}}}"


def _unescape(digits: str) -> str:
    return bytes.fromhex(digits[1:]).decode("utf-8", "surrogateescape")


OmegaConf.register_new_resolver(RESOLVER, _unescape, replace=True)


def read_text(value: str, optional: bool) -> str | None:
    """The text typed for a key, or None for a bare null if the key may be null."""
    if value == "null" and optional:
        return None
    return value[1:] if NULL.fullmatch(value) and value.startswith("\\") else value


def write_text(text: str | None) -> str:
    """What to type for a text, or for None: the inverse of read_text."""
    if text is None:
        return "null"
    return f"\\{text}" if NULL.fullmatch(text) else text


def override(key: str, value: Any) -> str:
    """The argument key=value that gives a program this value: text unchanged, lists and dicts in Hydra's grammar."""
    return f"{key}={write_text(value) if value is None or isinstance(value, str) else literal(value)}"


def literal(value: Any) -> str:
    """A value in Hydra's grammar; text in it is quoted."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", value)
        text = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
        return f"'{text}'"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{literal(one)}" for name, one in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ",".join(map(literal, value)) + "]"
    return repr(value)
