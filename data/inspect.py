"""Shows the content of a dataset, and checks that its bytes are those that were written.

    mova inspect DIR                  # buckets, hours, captioners, scores; every shard's size and members
    mova inspect DIR verify=true      # every byte: of the files, of the index, and whether these agree
    mova inspect https://host/dir     # a remote dataset, see data.storage

Exits with 1 and one line for every difference from what the index recorded.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.compose import Schema
from core.program import Call, Program
from core.ranges import bounded
from core.terminal import escape_letters
from data.dataset.index import DatasetIndex
from data.dataset.record import CAPTIONERS, read_captioners
from data.dataset.rows import AV
from data.dataset.scan import read_rows, scan
from data.errors import DataError
from data.storage.storage import CACHE_BYTES


@dataclass
class InspectConfig:
    """The dataset, and the depth of the checks.

    dir: folder, address or command (data.storage); `dir=` may be omitted for the first argument
    verify: read every file and compare its SHA-256, verify the columns of the index, and compare them with the members
        of local shards
    members: check the names of all members of local shards
    samples: number of samples to list
    cache: folder of the cache for remote data (null: in the user's cache folder)
    cache_bytes: largest size of the cache
    """

    dir: str = "???"
    verify: bool = False
    members: bool = True
    samples: int = bounded(3, "[0, inf)")
    cache: str | None = None
    cache_bytes: int = bounded(CACHE_BYTES, "[1, inf)")


def describe(index: DatasetIndex, samples: int) -> list[str]:
    """Lines that say what a dataset holds."""
    total = sum(size for _, size, _ in index.recorded_files())
    lines = [
        f"dataset      {index.storage}",
        f"samples      {len(index)} in {len(index.shards)} shards, {total / 1e9:.3f} GB",
        f"fingerprint  {index.fingerprint}",
        f"captioners   {', '.join(index.captioners) or 'none'}; embeddings of width {index.text_dim}",
        *(f"encoder      {kind}: {fingerprint}" for kind, fingerprint in sorted(index.encoders.items())),
    ]
    counts, hours = np.diff(index.shard_start), 0.0
    for number, bucket in enumerate(index.buckets):
        shards = np.flatnonzero(index.shard_bucket == number)
        if len(shards) == 0:
            continue
        meta = index.read_meta(int(index.shard_start[shards[0]]))
        seconds = float(meta.get("seconds") or (4 * (bucket.frames - 1) + 1) / bucket.fps)  # one geometry, one length
        here = int(counts[shards].sum())
        hours += here * seconds / 3600
        lines.append(
            f"bucket {number}     {bucket}: {here} samples in {len(shards)} shards, {here * seconds / 3600:.4f} h "
            f"({seconds:.3f} s each)"
        )
    lines.append(f"hours        {hours:.4f}")
    for name in index.scores:
        values = index.score(name)
        found = values[~np.isnan(values)]
        spread = f"{found.min():.4g} .. {np.median(found):.4g} .. {found.max():.4g}" if len(found) else "none"
        lines.append(f"score        {name}: {spread} (least, median, largest); {len(values) - len(found)} not measured")
    for row in range(min(samples, len(index))):
        meta = {name: value for name, value in index.read_meta(row).items() if isinstance(value, (str, int, float))}
        lines.append(f"sample       {index.key(row)}: {json.dumps(meta, ensure_ascii=False)[:160]}")
    return lines


def member_differences(index: DatasetIndex) -> list[str]:
    """One message for every local shard that is not readable, holds anything unsafe, or other members than recorded."""
    messages = []
    for column, file, number in _files(index):
        rows = slice(int(index.shard_start[number]), int(index.shard_start[number + 1]))
        try:
            offsets, sizes, keys = (index.columns[name][rows] for name in (f"{column}_offset", f"{column}_size", "key"))
        except DataError as error:
            messages.append(str(error))
            continue
        try:
            found = scan(Path(index.root) / file)
        except DataError as error:
            messages.append(f"{file}: {error}")
            continue
        members = [kinds["safetensors"] for kinds in found.values()]
        recorded = list(zip(offsets.tolist(), sizes.tolist(), strict=True))
        if [key.encode() for key in found] != keys.tolist() or members != recorded:
            messages.append(f"{file}: its members are not those of the index, which was built from another file")
    return messages


def row_differences(index: DatasetIndex) -> list[str]:
    """One message for every column of the index that disagrees with the members of a local shard."""
    messages = []
    for column, file, number in _files(index):
        rows = slice(int(index.shard_start[number]), int(index.shard_start[number + 1]))
        try:
            found = read_rows(Path(index.root) / file, column, index.checksum_of(column)).columns
        except DataError as error:
            messages.append(f"{file}: {error}")
            continue
        if column == AV:
            found["shard"] = np.full(len(found["key"]), number, np.uint32)
            missing = np.full(len(found["key"]), np.nan, np.float32)
            found |= {name: found.get(name, missing) for name in index.columns if name.startswith("score-")}
        for name in found.keys() & index.columns.keys():
            if not np.array_equal(index.columns[name][rows], found[name], equal_nan=name.startswith("score-")):
                messages.append(f"index/{name}.npy: disagrees with the members of {file}")
    return messages


def captioner_differences(index: DatasetIndex) -> list[str]:
    """A message when captioners.json, from which a lost index is rebuilt, disagrees with the index."""
    try:
        stated = read_captioners(Path(index.root))
    except DataError as error:
        return [str(error)]
    if stated is None or (stated[0] == index.own_captioners and {*stated[0], *stated[1]} == set(index.captioners)):
        return []
    return [f"{CAPTIONERS}: names {', '.join([*stated[0], *stated[1]])}, the index {', '.join(index.captioners)}"]


def _files(index: DatasetIndex) -> Iterator[tuple[str, str, int]]:
    """Every tar: the start of its columns' names in the index, its own name, the number of its shard."""
    for number, shard in enumerate(index.shards):
        yield AV, shard["name"], number
        for captioner, file in shard["text"].items():
            yield f"text-{captioner}", file, number


def inspect(config: InspectConfig) -> list[str]:
    """Print what is there; returns a message for every difference."""
    index = DatasetIndex.open(
        config.dir, cache=config.cache, cache_bytes=config.cache_bytes, check_files=False
    )  # all differences are wanted, not the first one
    messages = [] if index.storage.remote else index.size_differences()
    if config.verify:
        damaged = index.verify() + index.column_differences()
        messages += damaged
        messages += [] if index.storage.remote else captioner_differences(index)
        if not damaged and not index.storage.remote:  # else it is known that they don't agree
            messages += row_differences(index)
    if config.members and not index.storage.remote:
        messages += member_differences(index)
    try:
        print("\n".join(describe(index, config.samples)))
    except DataError as error:
        messages.append(str(error))
    return list(dict.fromkeys(messages))


def _run(call: Call[InspectConfig]) -> int:
    messages = inspect(call.config)
    for message in messages:
        print(f"difference: {message}", file=sys.stderr)
    if messages:
        print(f"error: {len(messages)} differences; restore these files or prepare the dataset again", file=sys.stderr)
        return 1
    note = "" if call.config.verify else " (sizes and members; verify=true reads every byte)"
    print(f"no differences found{note}")
    return 0


PROGRAM = Program(
    "inspect", __doc__, _run, schema=Schema("inspect", InspectConfig, ()), first="dir", before=escape_letters
)

if __name__ == "__main__":
    PROGRAM.start()
