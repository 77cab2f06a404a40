"""Removes possible secrets from values and messages before others can read them."""

from __future__ import annotations

import re
from typing import Any, TypeVar, cast

HIDDEN = "***"
ADDRESS = re.compile(r"(\w+://)(?:[^\s/]*@)?([^\s?#]*)(?:[?#][^\s]*)?")
# Options of a command whose value is a secret: curl -u me:secret, --password secret, --secret-key=secret.
OPTION = r"(?:-u|--user|--(?:[\w-]+-)?(?:token|secret|password|passwd|pass|secret-key|access-key|api-key))"
# Words of a command, as "curl -u me:secret" or "-H 'Authorization: Bearer secret'", and assignments of such names.
WORDS = (
    re.compile(r"(?i)(\bauthorization:\s*(?:\w+\s+)?)[^\s'\"]+"),
    re.compile(rf"((?:^|[\s,\[])['\"]?{OPTION}(?:=|['\"]?\s*[\s,]\s*)['\"]?)[^\s'\",\]]+"),
    re.compile(r"(?i)(\b\w*(?:token|secret|password|passwd|api_?key|access_?key)\s*=\s*)[^\s'\"&,]+"),
    re.compile(r"(?i)(\b\w+-[\w-]*(?:token|secret|key)\s*:\s*)[^\s'\",]+"),
)

T = TypeVar("T")


def without_secrets(values: T) -> T:
    """A text, or nested plain values, with user, query and fragment removed from URLs, and with what follows "token=",
    "Authorization:" and the like hidden in commands."""
    cleaned: Any = values
    if isinstance(values, dict):
        cleaned = {str(name): without_secrets(value) for name, value in values.items()}
    elif isinstance(values, list):
        before = [None, *values][: len(values)]  # a command, word by word
        cleaned = [
            HIDDEN if isinstance(last, str) and re.fullmatch(OPTION, last) else without_secrets(value)
            for last, value in zip(before, values, strict=True)
        ]
    elif isinstance(values, str):
        cleaned = ADDRESS.sub(r"\1\2", values) if "://" in values else values
        for pattern in WORDS:
            cleaned = pattern.sub(rf"\1{HIDDEN}", cleaned)
    return cast(T, cleaned)
