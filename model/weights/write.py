"""Writes safetensors files: one, or several with an index, each read, written and freed before the next.

write_weights(folder, {"a.weight": 4096}, read)     # read("a.weight") -> Tensor of that many bytes
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from model.weights.files import STEM

SHARD_BYTES = 5_000_000_000


def split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The names in order, in files of at most `limit` bytes each (of one tensor where that has more)."""
    files: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if files[-1] and held + size > limit:
            files.append([])
            held = 0
        files[-1].append(name)
        held += size
    return files


def write_weights(
    folder: Path,
    sizes: Mapping[str, int],
    read: Callable[[str], Tensor],
    stem: str = STEM,
    limit: int | None = None,
    done: Callable[[int], None] = lambda size: None,
) -> None:
    """Write tensors of these sizes (bytes), one file's in memory at a time. Files get the mode that the umask gives.

    limit: bytes of a file (None: SHARD_BYTES); done: called with the bytes of each tensor read. OSError is not caught.
    """
    files = split(sizes, limit or SHARD_BYTES)
    names = [f"{stem}.safetensors"]
    if len(files) > 1:
        names = [f"{stem}-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for file, keys in zip(names, files, strict=True):
        tensors: dict[str, Tensor] = {}
        for key in keys:
            tensors[key] = read(key)
            done(sizes[key])
        _save(folder / file, tensors)
        del tensors
    if len(files) > 1:
        weight_map = {key: file for file, keys in zip(names, files, strict=True) for key in keys}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / f"{stem}.safetensors.index.json", index)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        mode = os.fstat(file.fileno()).st_mode  # by the umask; the library writes 0600
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
    except SafetensorError as error:  # the library's word for what the file system refuses
        raise OSError(errno.EIO, str(error), str(path)) from error
    os.chmod(partial, mode & 0o777)
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
