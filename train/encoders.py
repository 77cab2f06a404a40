"""Checks that a run's data, held-out set, checkpoints and starting weights use latents of the same encoders.

A dataset states the fingerprints of its video, audio and text codecs (data/codec); a checkpoint those of the data that
it was trained on. `data.ignore_encoders=true` accepts others; the checkpoint's config then records that.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from core.errors import RunError
from data.codec import KINDS
from train.dataloader import OpenedSegment

logger = logging.getLogger(__name__)


def agreed(
    stated: Mapping[str, str], whose: str, found: Mapping[str, str], found_whose: str, ignore: bool = False
) -> dict[str, str]:
    """`found`, completed from `stated`. RunError, naming both, if they disagree on a codec; with `ignore` only a
    warning."""
    for kind in KINDS:
        if kind in stated and kind in found and stated[kind] != found[kind]:
            text = f"{whose} is of the {kind} codec {stated[kind]}, {found_whose} of {found[kind]}"
            if not ignore:
                raise RunError(f"{text}: use latents of one codec, or set data.ignore_encoders=true")
            logger.warning("%s; continuing because of data.ignore_encoders", text)
    return dict(stated) | dict(found)


def encoders_of_data(parts: list[OpenedSegment], ignore: bool = False) -> dict[str, str]:
    """Fingerprints by kind of all datasets of a run. RunError if two of its segments differ."""
    known: dict[str, str] = {}
    whose: dict[str, str] = {}  # by kind, the first that states it
    for part in parts:
        for selection in part.mixture.selections if part.mixture is not None else []:
            name, stated = f"dataset {selection.index.root}", selection.index.encoders
            for kind in [kind for kind in KINDS if kind in stated]:
                known = agreed({kind: stated[kind]}, name, known, whose.setdefault(kind, name), ignore)
    return known


def encoders_of_start(
    stated: Mapping[str, str] | None, path: Path | str, data: Mapping[str, str], ignore: bool = False
) -> dict[str, str]:
    """Those of the data, compared with those that a checkpoint or a folder of weights states. If it states none, the
    data's are assumed, with a log message."""
    if not stated:
        if data:
            named = ", ".join(f"{kind} {one}" for kind, one in sorted(data.items()))
            logger.warning("%s names no encoders; those of the data are assumed: %s", path, named)
        return dict(data)
    return agreed(stated, str(path), data, "the data", ignore)
