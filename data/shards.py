"""Writes shards: tar files of samples, reproducible byte for byte, complete as soon as they have their name.

`av-000000.tar` holds `<key>.safetensors` and `<key>.json` of each sample, `text-<captioner>-000000.tar` the text
embedding and the caption under the same keys in the same order. All samples of a shard have one bucket.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import save
from torch import Tensor
from webdataset import TarWriter

from data.clip import Bucket, EncodedClip, encode_json
from data.errors import DataError
from data.index import EMPTY_TEXT


class ShardWriter:
    """Distributes samples to shards by bucket; one is full with `samples_per_shard` or `shard_bytes` (0: no limit).

    Shards are numbered from `first`, with `digits` digits; several writers of one folder take ranges of `most` numbers.
    A context manager: leaving it closes the last, shorter shards; an exception removes the unfinished ones.
    """

    def __init__(
        self,
        root: Path,
        samples_per_shard: int,
        captioner: str = "builtin",
        *,
        shard_bytes: int = 0,
        first: int = 0,
        most: int = 0,
        digits: int = 6,
    ):
        if samples_per_shard < 0 or shard_bytes < 0 or samples_per_shard + shard_bytes == 0:
            raise DataError(
                f"samples_per_shard is {samples_per_shard}; it must be at least 1, or 0 with a limit in bytes"
            )
        self.root, self.samples_per_shard, self.captioner = root, samples_per_shard, captioner
        self.shard_bytes, self._digits = shard_bytes, digits
        self._open: dict[Bucket, _Shard] = {}
        self._next, self._end = first, first + most if most else None
        root.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        for shard in self._open.values():
            shard.close(keep=kind is None)
        self._open.clear()

    def write(self, clip: EncodedClip, bucket: Bucket, caption: str, text: Tensor) -> None:
        """Append a sample; its json gets the bucket. text: [L, D]. ValueError: a key with a dot or over 24 letters."""
        if "." in clip.key or not 0 < len(clip.key.encode()) <= 24:
            raise ValueError(f"key {clip.key!r} must have 1 to 24 letters and no dot")
        if bucket not in self._open:
            if self._next == self._end:
                raise DataError(f"{self.root}: a unit has no shard numbers left; cut the work into more (units=N)")
            self._open[bucket] = _Shard(self.root, f"{self._next:0{self._digits}d}", self.captioner)
            self._next += 1
        shard = self._open[bucket]
        clip.meta["bucket"] = bucket.to_dict()
        shard.write(clip, caption, text)
        if shard.samples == self.samples_per_shard or 0 < self.shard_bytes <= shard.bytes:
            self._open.pop(bucket).close(keep=True)


class _Shard:
    """One open pair of tars under temporary names."""

    def __init__(self, root: Path, number: str, captioner: str):
        self.samples = self.bytes = 0
        self.paths = [root / f"av-{number}.tar", root / f"text-{captioner}-{number}.tar"]
        self.files: list[IO[bytes]] = [open(temporary(path), "wb") for path in self.paths]  # noqa: SIM115
        # mtime 0 and fixed owner (TarWriter's default): equal samples give equal shards
        self.tars = [TarWriter(file, encoder=False, mtime=0) for file in self.files]

    def write(self, clip: EncodedClip, caption: str, text: Tensor) -> None:
        tensors, meta = clip.to_members()
        embedding = save({"text": text.to(torch.bfloat16).contiguous()})
        self.tars[0].write({"__key__": clip.key, "safetensors": tensors, "json": meta})
        self.tars[1].write({"__key__": clip.key, "safetensors": embedding, "json": encode_json({"caption": caption})})
        self.samples += 1
        self.bytes += len(tensors) + len(meta)

    def close(self, keep: bool) -> None:
        for tar, file, path in zip(self.tars, self.files, self.paths, strict=True):
            tar.close()
            file.flush()
            os.fsync(file.fileno())
            file.close()
            if keep:
                os.rename(temporary(path), path)
            else:
                temporary(path).unlink()


def write_empty_text(root: Path, text: Tensor) -> None:
    """Store the encoded empty prompt [L0, D] of a dataset."""
    data = save({"text": text.to(torch.bfloat16).contiguous()})
    write_atomically(root / EMPTY_TEXT, lambda path: path.write_bytes(data))


def temporary(path: Path) -> Path:
    """Name under which `path` is written until it is complete."""
    return path.with_name(f".{path.name}.partial")


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file under a temporary name, then sync and rename it: never half a file at `path`."""
    unfinished = temporary(path)
    write(unfinished)
    with open(unfinished, "rb+") as file:
        os.fsync(file.fileno())
    os.rename(unfinished, path)
