"""Tensors in files, by name and range: reads only what is asked for, however large the files are.

    files = open_files(Path("high_noise_model"))
    files.shape("blocks.0.ffn.0.weight"), files.dtype(...)
    part = files.read("blocks.0.ffn.0.weight", 0, 5120)     # elements in the order of memory, in the file's dtype

Reads go through plain file reads, not a memory map: a map of 28 GB counts as the process's memory wherever limits
apply per process, and is slow on parallel file systems.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from core.errors import UserError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
STEM = "diffusion_pytorch_model"
PREFIX = "model.diffusion_model."  # of the tower's tensors in files that hold a whole pipeline
SHARD = re.compile(r".*-(\d+)-of-(\d+)\.safetensors")
SAMPLE = 4096  # bytes of each tensor that a fingerprint covers
SHOWN = 3  # files or tensors in one message


class LayoutError(UserError):
    """Files are not in a known layout; the message names the file and what is wrong."""


class Tensors(Protocol):
    """Named tensors that can be read in parts."""

    def names(self) -> Iterable[str]:
        """Of all of them."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole shape."""

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start]: elements in the order of memory, in the stored dtype, on the CPU. OSError if the file
        system fails, LayoutError if the file is truncated."""

    def fingerprint(self, names: Iterable[str]) -> str:
        """A digest of some of them that changes when their values do."""


@dataclass(frozen=True)
class _Place:
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes


class SafetensorsFiles:
    """The tensors of several safetensors files. LayoutError for any other file, and for a name that occurs in two."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._places: dict[str, _Place] = {}
        for path in paths:
            for name, place in _header(path).items():
                if name in self._places:
                    raise LayoutError(f"{name} is in both {self._places[name].path} and {path}: keep one of them")
                self._places[name] = place
        if any(name.startswith(PREFIX) for name in self._places):
            self._places = {n.removeprefix(PREFIX): p for n, p in self._places.items() if n.startswith(PREFIX)}

    def names(self) -> Iterable[str]:
        """See Tensors."""
        return self._places.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See Tensors."""
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """See Tensors."""
        return self._places[name].dtype

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """See Tensors."""
        place = self._places[name]
        size = place.dtype.itemsize
        return _bytes(place.path, place.offset + start * size, (stop - start) * size).view(place.dtype)

    def fingerprint(self, names: Iterable[str]) -> str:
        """See Tensors. Covers name, dtype and shape of each, and its first 4 KiB."""
        digest = hashlib.sha256()
        for name in sorted(names):
            place = self._places[name]
            digest.update(f"{name} {place.dtype} {place.shape}\n".encode())
            count = min(math.prod(place.shape), SAMPLE // place.dtype.itemsize)
            digest.update(self.read(name, 0, count).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


class PickledFile:
    """The tensors of a .pth file: read by torch's weights-only reader, which runs no code of the file.

    LayoutError for a file that holds anything but named tensors (beside them, or around them, as "state_dict").
    """

    def __init__(self, path: Path) -> None:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except OSError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise LayoutError(f"{path} is refused, nothing in it was run: {reason}") from None
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise LayoutError(f"{path} does not hold only tensors by name")
        self._tensors: dict[str, Tensor] = {str(name): tensor.contiguous() for name, tensor in content.items()}

    def names(self) -> Iterable[str]:
        """See Tensors."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See Tensors."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """See Tensors."""
        return self._tensors[name].dtype

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """See Tensors."""
        return self._tensors[name].flatten()[start:stop].clone()

    def fingerprint(self, names: Iterable[str]) -> str:
        """See Tensors. Covers what that of safetensors files covers."""
        digest = hashlib.sha256()
        for name in sorted(names):
            tensor = self._tensors[name]
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            first = tensor.flatten()[: SAMPLE // tensor.dtype.itemsize]
            digest.update(first.clone().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def open_files(path: Path) -> Tensors:
    """The tensors of a file, or of a folder: sharded with an index, or in one file; a second copy of another dtype
    beside them does not matter. LayoutError if there is none, or if several are possible."""
    if path.is_file():
        return PickledFile(path) if path.suffix in (".pth", ".pt") else SafetensorsFiles([path])
    index = path / f"{STEM}.safetensors.index.json"
    single = path / f"{STEM}.safetensors"
    if index.is_file():
        return _indexed(index)
    if single.is_file():
        return SafetensorsFiles([single])
    indexes, files = sorted(path.glob("*.safetensors.index*.json")), sorted(path.glob("*.safetensors"))
    if len(indexes) == 1:
        return _indexed(indexes[0])
    if not indexes and len(files) == 1:
        return SafetensorsFiles(files)
    if not indexes and files and _complete(files):
        return SafetensorsFiles(files)
    if indexes or files:
        found = ", ".join(one.name for one in (indexes or files)[:SHOWN])
        raise LayoutError(f"{path}: several sets of weights ({found}, ...); name one file, or leave one set there")
    pickled = sorted([*path.glob("*.pth"), *path.glob("*.pt")])
    if len(pickled) == 1:
        return PickledFile(pickled[0])
    raise LayoutError(f"{path}: no {STEM}*.safetensors there")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. LayoutError for a file that is missing or holds anything else."""
    if not path.is_file():
        raise LayoutError(f"{path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LayoutError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise LayoutError(f"{path} holds {type(content).__name__}, not an object")
    return content


def _indexed(index: Path) -> SafetensorsFiles:
    """The files that an index names. LayoutError for one that is missing, or that lacks a tensor."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(value, str) for value in named.values()):
        raise LayoutError(f"{index} has no weight_map of names to files")
    if outside := sorted(name for name in set(named.values()) if Path(name).name != name):
        raise LayoutError(f"{index} names {outside[0]}, which does not lie beside it")
    paths = sorted({index.parent / name for name in named.values()})
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise LayoutError(f"{index.parent}: {index.name} names {absent}, which do not exist")
    files = SafetensorsFiles(paths)
    there = set(files.names())
    lacking = sorted(name for name in named if name.removeprefix(PREFIX) not in there)
    if lacking:
        raise LayoutError(
            f"{index.parent}: {index.name} names {lacking[:SHOWN]} ({len(lacking)}), which no file contains"
        )
    return files


def _complete(files: list[Path]) -> bool:
    """Whether these are all shards of one set, as their names count them."""
    matches = [SHARD.fullmatch(path.name) for path in files]
    counted = [(int(match[1]), int(match[2])) for match in matches if match is not None]
    return len(counted) == len(files) and counted == [(number + 1, len(files)) for number in range(len(files))]


def _header(path: Path) -> dict[str, _Place]:
    """The header of a safetensors file. LayoutError if the library rejects it, or for an unknown dtype."""
    try:
        with safe_open(path, framework="pt"):  # checks that the header fits the file
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
    except Exception as error:
        raise LayoutError(f"{path}: not a readable safetensors file ({error})") from error
    entries.pop("__metadata__", None)
    unknown = [f"{name} ({entry['dtype']})" for name, entry in entries.items() if entry["dtype"] not in DTYPES]
    if unknown:
        raise LayoutError(f"{path}: unknown dtypes: {', '.join(unknown[:SHOWN])}")
    return {
        name: _Place(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in entries.items()
    }


def _bytes(path: Path, offset: int, count: int) -> Tensor:
    """[count] uint8 of a file."""
    found = torch.empty(count, dtype=torch.uint8)
    view, done = memoryview(found.numpy().data), 0
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while done < count:
            read = file.readinto(view[done:])
            if not read:
                raise LayoutError(f"{path} ends at byte {offset + done}: it was changed or truncated meanwhile")
            done += read
    return found
