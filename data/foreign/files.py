"""Reads folders of .safetensors and WebDataset tars written by other software, with suspicion.

Nothing that may hold pickled objects is ever opened. Each sample, and each file that is none, is yielded with a name;
reading its content raises DataError with the reason why it can't be used.
"""

import hashlib
import io
import json
import os
import stat
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor
from webdataset.tariterators import base_plus_ext

from data.dataset.checksum import sha256
from data.dataset.scan import PICKLES
from data.errors import DataError
from data.foreign.latents import Names
from data.sources.captions import decode
from data.sources.verdict import name_of

TARS = (".tar", ".tar.gz", ".tgz")
BESIDE = (".json", ".txt")  # of a .safetensors
BESIDE_LIMIT = 1 << 20  # bytes of a json or a caption


@dataclass
class ForeignSample:
    """A sample as it was found. digest: SHA-256 of its tensors' files; caption: None when the json may have it."""

    digest: str
    tensors: dict[str, Tensor]  # by kind
    meta: dict[str, Any]
    caption: str | None


@dataclass
class Foreign:
    """Something that may be a sample. name: what records call it; read: its content, or DataError with the reason."""

    name: str
    read: Callable[[], ForeignSample]


def walk(root: Path) -> Iterator[Path]:
    """Files below a folder in a fixed order, a folder at a time; folders behind links once. Hidden ones are left out.

    DataError for a folder that can't be read.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            found = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            raise DataError(f"folder {folder} can't be read ({error.strerror}); make it readable") from error
        if (found.st_dev, found.st_ino) in seen:
            continue
        seen.add((found.st_dev, found.st_ino))
        folders = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if os.path.isdir(entry.path):  # entry.is_dir() raises for a link that leads to itself
                folders.append(Path(entry.path))
            else:
                yield Path(entry.path)
        waiting += reversed(folders)


def folder_sample(path: Path, name: str, names: Names, limit: int) -> Foreign:
    """A file of a folder of latents. limit: bytes that it may have."""
    return Foreign(name, lambda: _read_file(path, names, limit))


def _read_file(path: Path, names: Names, limit: int) -> ForeignSample:
    if path.suffix.lower() != ".safetensors":
        pickled = set(path.name.lower().split(".")[1:]) & PICKLES
        why = "may hold pickled objects, which run code when loaded" if pickled else "is not a .safetensors"
        raise DataError(f"{why}; latents are read from .safetensors")
    if (size := _plain_size(path)) > limit:
        raise DataError(f"has {size} bytes, a sample may have {limit}: raise sample_mb")
    digest = sha256(path)
    tensors = {}
    try:
        with safe_open(path, framework="pt") as opened:
            there = set(opened.keys())
            for kind, name in vars(names).items():
                if name in there:
                    tensors[kind] = opened.get_tensor(name)
    except SafetensorError as error:
        raise DataError(f"is not a valid .safetensors ({error})") from error
    if not tensors:
        raise DataError(f"has none of the tensors {_named(names)}; it has {_some(there)}: see tensors.*")
    meta, caption = (path.with_name(path.stem + ending) for ending in BESIDE)
    return ForeignSample(
        digest,
        tensors,
        parse_meta(_small(meta)) if meta.is_file() else {},
        _words(_small(caption), caption.name) if caption.is_file() else None,
    )


def _plain_size(path: Path) -> int:
    """Bytes of a file. DataError for a pipe, whose reader waits for ever, or a device; OSError for what isn't there."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise DataError("can't be read (it is no plain file)")
    return found.st_size


def tar_samples(path: Path, name: str, members: Mapping[str, str], names: Names, limit: int) -> Iterator[Foreign]:
    """The samples of a WebDataset tar: members in succession whose names agree to the first dot.

    members: for video, audio, condition, text, caption and meta, how the names go on after that dot. limit: bytes that
    a sample's members may have together. A tar that ends early yields its whole samples, then itself with the reason.
    """
    wanted = set(members.values())
    key: str | None = None
    parts: dict[str, bytes] = {}
    problem = ""
    try:
        _plain_size(path)
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                base, ending = base_plus_ext(member.name)
                if base is None or not (member.isreg() or member.islnk() or member.issym()):
                    continue
                if base != key:
                    if key is not None:
                        yield _tar_sample(f"{name}/{name_of(key)}", parts, problem, members, names)
                    key, parts, problem = base, {}, ""
                if ending.lower() not in wanted:
                    continue
                if found := _objection(member, ending, parts, limit):
                    problem, parts = found, {}
                elif not problem:
                    parts[ending.lower()] = _read_member(tar, member)
    except DataError as error:
        yield refused(name, str(error))
        return
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:  # zlib's errors come as ReadError or OSError
        if key is not None:
            yield refused(f"{name}/{name_of(key)}", "its tar can't be read to its end")
        yield refused(name, f"can't be read to its end ({type(error).__name__}: {error}); fetch or write it again")
        return
    if key is None:
        yield refused(name, "holds no members")
    else:
        yield _tar_sample(f"{name}/{name_of(key)}", parts, problem, members, names)


def _objection(member: tarfile.TarInfo, ending: str, parts: Mapping[str, bytes], limit: int) -> str:
    """Why a sample that has `parts` can't have this member too; "" where it can."""
    size = sum(map(len, parts.values())) + member.size
    if not member.isreg():
        return f"its member .{ending} is a link"
    if size > limit:
        return f"has {size} bytes and more, a sample may have {limit}: raise sample_mb"
    return f"has two members .{ending}" if ending.lower() in parts else ""


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    data = tar.extractfile(member)
    assert data is not None
    content = data.read()
    if len(content) != member.size:
        raise tarfile.ReadError("unexpected end of data")
    return content


def refused(name: str, reason: str) -> Foreign:
    """Something that can't be a sample."""

    def read() -> ForeignSample:
        raise DataError(reason)

    return Foreign(name, read)


def _tar_sample(name: str, parts: dict[str, bytes], problem: str, members: Mapping[str, str], names: Names) -> Foreign:
    def read() -> ForeignSample:
        if problem:
            raise DataError(problem)
        tensors: dict[str, Tensor] = {}
        digest = hashlib.sha256()
        for kind, wanted in vars(names).items():
            ending = members.get(kind)
            if wanted is None or ending not in parts:
                continue
            alone = list(members.values()).count(ending) == 1
            if (tensor := _tensor(parts[ending], ending, wanted, alone)) is not None:
                tensors[kind] = tensor
        for ending in sorted({members[kind] for kind in tensors}):
            digest.update(f"{ending} {len(parts[ending])} ".encode() + parts[ending])
        if not tensors:
            raise DataError(f"has no latents; it has the members {_some(parts)}: see members.* and tensors.*")
        meta = parse_meta(parts[members["meta"]]) if members.get("meta") in parts else {}
        return ForeignSample(digest.hexdigest(), tensors, meta, _caption(parts, members))

    return Foreign(name, read)


def _caption(parts: Mapping[str, bytes], members: Mapping[str, str]) -> str | None:
    ending = members.get("caption")
    if ending is None or ending not in parts or ending == members.get("meta"):
        return None
    return _words(parts[ending], f".{ending}")


def _tensor(data: bytes, ending: str, name: str, alone: bool) -> Tensor | None:
    """The tensor of that name, or None; the only one of its file whatever its name, where only one is looked for."""
    if ending.endswith("npy"):
        try:
            array = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise DataError(f".{ending} is no array ({error})") from error
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.dtype.itemsize > 8:
            raise DataError(f".{ending} holds {getattr(array, 'dtype', type(array).__name__)}, expected floating point")
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=True))
    try:
        tensors = load(data)
    except Exception as error:  # safetensors raises its own class, and KeyError for types that torch lacks
        raise DataError(f".{ending} is not a valid .safetensors ({type(error).__name__}: {error})") from error
    if name not in tensors and alone and len(tensors) == 1:
        return next(iter(tensors.values()))
    if name not in tensors and alone:
        raise DataError(f".{ending} has no tensor {name}; it has {_some(tensors)}: see tensors.*")
    return tensors.get(name)


def parse_meta(data: bytes) -> dict[str, Any]:
    """The object that a json is. DataError for anything else, for NaN, and when it has over BESIDE_LIMIT bytes."""
    if len(data) > BESIDE_LIMIT:
        raise DataError(f"its json has over {BESIDE_LIMIT} bytes")

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    try:
        values = json.loads(decode(data), parse_constant=refuse)
    except (DataError, ValueError, RecursionError) as error:
        raise DataError(f"its json does not parse ({type(error).__name__}: {error})") from error
    if not isinstance(values, dict):
        raise DataError(f"its json is a {type(values).__name__}, expected an object")
    return values


def _words(data: bytes, name: str) -> str:
    if len(data) > BESIDE_LIMIT:
        raise DataError(f"the caption in {name} has over {BESIDE_LIMIT} bytes")
    try:
        words = decode(data).strip()
    except DataError as error:
        raise DataError(f"the caption in {name} can't be used: {error}") from error
    if "\0" in words:
        raise DataError(f"the caption in {name} holds NUL characters")
    return words


def _small(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(BESIDE_LIMIT + 1)


def _named(names: Names) -> str:
    return ", ".join(name for name in vars(names).values() if name)


def _some(names: Any) -> str:
    listed = sorted(map(str, names))
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "") or "none"
