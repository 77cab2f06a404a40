"""Lists the members of a shard, and refuses a tar that could harm whoever unpacks or loads it."""

import tarfile
from pathlib import Path

from data.dataset.checksum import XXH3, ChecksumKind, sha256
from data.dataset.rows import Rows, TarRows
from data.errors import DataError

MEMBERS = {"safetensors", "json"}
PICKLES = {"pkl", "pickle", "pt", "pth", "ckpt", "bin", "npy", "npz", "joblib", "dill"}  # may hold objects
REPAIR = "restore it or prepare the dataset again"


def refuse_unsafe(member: tarfile.TarInfo) -> str | None:
    """Why a shard must not have this member, or None: links and devices, paths out of the folder, pickles."""
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
        raise DataError(f"{path} is truncated: no end mark follows its last member, which ends at byte {end}; {REPAIR}")
    for key, kinds in members.items():
        if set(kinds) != MEMBERS or len(key.encode()) > 24:
            raise DataError(
                f"{path}: sample {key!r} has members {sorted(kinds)}, expected json and safetensors and a key "
                "of at most 24 characters; prepare the dataset again"
            )
    if not members:
        raise DataError(f"{path} is empty; delete it or prepare the dataset again")
    return members


def read_rows(path: Path, column: str, kind: ChecksumKind = XXH3) -> Rows:
    """Scan a tar and read each member once: the rows of the index. column: "av" or "text-<captioner>".

    DataError as `scan`, when a json doesn't parse, or when the samples don't belong into one shard.
    """
    rows = TarRows(column, path, kind)
    entries = scan(path)
    with open(path, "rb") as file:
        for key, kinds in entries.items():
            members = []
            for name in ("safetensors", "json"):
                offset, size = kinds[name]
                file.seek(offset)
                data = bytearray(size)
                file.readinto(data)
                members.append((offset, data))
            rows.add(key, members[0], members[1])
    return rows.close(path.stat().st_size, sha256(path))
