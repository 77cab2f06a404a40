"""What lies in a shard: its members, refused where a tar could harm whoever unpacks or loads it."""

import json
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.clip import Bucket
from data.errors import DataError
from data.tensors import is_finite, load_tensors

KINDS = {"safetensors", "json"}
PICKLES = {"pkl", "pickle", "pt", "pth", "ckpt", "bin", "npy", "npz", "joblib", "dill"}  # may hold objects
REPAIR = "restore it or prepare the dataset again"


@dataclass(frozen=True)
class Members:
    """The samples of one tar, in its order: per sample the place, checksum and soundness of its two members."""

    keys: list[str]
    offsets: dict[str, list[int]]  # by kind; [samples]
    sizes: dict[str, list[int]]
    crcs: dict[str, list[int]]
    finite: list[int]  # 1: the tensors parse and hold no NaN or inf
    jsons: list[dict[str, Any]]


def refuse_unsafe(member: tarfile.TarInfo) -> str | None:
    """Why a member has no place in a shard, or None: links and devices, paths out of the folder, pickles."""
    name = member.name
    if not member.isreg() or member.issparse():
        return "is a link, folder or special file; a shard holds plain files only"
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or name[1:2] == ":":
        return "has a path that leads out of the folder"
    if "/" in name or "\\" in name:
        return "lies in a folder; members of a shard have plain names"
    if PICKLES & set(name.lower().split(".")[1:]):
        return "may hold pickled objects, which run code when loaded; tensors are stored as .safetensors"
    return None


def scan(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Members of a tar: key -> kind (safetensors, json) -> (offset of the data, size).

    DataError naming the tar and the member when it can't be read, holds anything unsafe, or is not a shard.
    """
    members: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            end = 0  # of the last member, in whole blocks
            for member in tar:
                if reason := refuse_unsafe(member):
                    raise DataError(f"{path}: member {member.name!r} {reason}; don't use this shard")
                key, _, kind = member.name.partition(".")
                if kind in members.setdefault(key, {}):
                    raise DataError(f"{path}: {member.name} occurs twice; prepare the dataset again")
                members[key][kind] = (member.offset_data, member.size)
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        with open(path, "rb") as file:
            file.seek(end)
            mark = file.read(2 * tarfile.BLOCKSIZE)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path} can't be read ({error}); {REPAIR}") from error
    if mark != bytes(2 * tarfile.BLOCKSIZE):  # or samples could be missing unnoticed
        raise DataError(f"{path} is cut off: no end mark follows its last member, which ends at byte {end}; {REPAIR}")
    for key, kinds in members.items():
        if set(kinds) != KINDS or len(key.encode()) > 24:
            raise DataError(
                f"{path}: sample {key!r} has members {sorted(kinds)}, expected json and safetensors and a key "
                "of at most 24 characters; prepare the dataset again"
            )
    if not members:
        raise DataError(f"{path} is empty; delete it or prepare the dataset again")
    return members


def read_members(path: Path) -> Members:
    """Scan a tar and read each member once. DataError as `scan`, or when a json doesn't parse."""
    places = scan(path)
    found = Members(list(places), _lists(), _lists(), _lists(), finite=[], jsons=[])
    with open(path, "rb") as file:
        for key, kinds in places.items():
            for kind in found.offsets:
                offset, size = kinds[kind]
                file.seek(offset)
                data = bytearray(size)
                file.readinto(data)
                found.offsets[kind].append(offset)
                found.sizes[kind].append(size)
                found.crcs[kind].append(zlib.crc32(data))
                if kind == "safetensors":
                    found.finite.append(_sound(data))
                    continue
                try:
                    found.jsons.append(dict(json.loads(data)))
                except (ValueError, TypeError) as error:
                    raise DataError(f"{path}: {key}.json does not parse ({error}); prepare it again") from error
    return found


def bucket_of(path: Path, metas: list[dict[str, Any]]) -> dict[str, Any]:
    """The one bucket of all samples of a shard. DataError when there is none, or more than one."""
    try:
        for meta in metas:
            Bucket.from_dict(meta["bucket"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: a sample's json has no valid bucket ({error}); prepare the dataset again") from error
    if any(meta["bucket"] != metas[0]["bucket"] for meta in metas):
        raise DataError(f"{path} mixes buckets; all samples of one shard must have one geometry")
    return metas[0]["bucket"]


def scores_of(metas: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Numbers in the samples' "scores": name -> [samples] float32, NaN where a sample doesn't have it."""
    columns: dict[str, np.ndarray] = {}
    for i, meta in enumerate(metas):
        scores = meta.get("scores")
        for name, value in scores.items() if isinstance(scores, dict) else ():
            if isinstance(value, (int, float)):
                columns.setdefault(name, np.full(len(metas), np.nan, np.float32))[i] = value
    return columns


def _lists() -> dict[str, list[int]]:
    return {kind: [] for kind in sorted(KINDS)}


def _sound(data: bytearray) -> int:
    try:
        return int(all(is_finite(tensor) for tensor in load_tensors(data).values()))
    except ValueError:
        return 0  # reading says what is wrong with it
