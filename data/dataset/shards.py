"""Writes shards: tar files of samples, reproducible byte for byte, complete as soon as they have their name.

`av-000000.tar` holds `<key>.safetensors` and `<key>.json` of each sample, `text-<captioner>-000000.tar` the text
embedding and the caption under the same keys in the same order. All samples of a shard have one bucket. What the index
needs of them is gathered on the way (see data.dataset.rows), so that nothing written is read again for it.
"""

import contextlib
import hashlib
import os
import tarfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from webdataset import TarWriter

from core.durable import sync_folder, temporary, write_atomically
from data.clip import Bucket, EncodedClip, encode_json
from data.dataset.record import CAPTIONERS, EMPTY_TEXT, encode_captioners
from data.dataset.rows import AV, Rows, TarRows, join
from data.errors import DataError


class ShardWriter:
    """Distributes samples to shards by bucket; one is full with `samples_per_shard` or `shard_bytes` (0: no limit).

    Shards are numbered from `first`, with `digits` digits; several writers of one folder take ranges of `most` numbers.
    A context manager: leaving it closes the last, shorter shards; an exception removes the unfinished ones. After it,
    `rows()` is what the index needs of them.
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
        self._closed: list[dict[str, Rows]] = []
        self._next, self._end = first, first + most if most else None
        root.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        for shard in self._open.values():
            self._close(shard, keep=kind is None)
        self._open.clear()
        sync_folder(self.root)

    def write(self, clip: EncodedClip, bucket: Bucket, caption: str, text: Tensor) -> None:
        """Append a sample; its json gets the bucket. text: [L, D]. ValueError: a key with a dot or over 24 letters."""
        if "." in clip.key or not 0 < len(clip.key.encode()) <= 24:
            raise ValueError(f"key {clip.key!r} must have 1 to 24 letters and no dot")
        if bucket not in self._open:
            if self._next == self._end:
                raise DataError(
                    f"{self.root}: a unit has no shard numbers left; store more per shard (samples_per_shard, "
                    "shard_mb) or cut the work into more (units=N)"
                )
            self._open[bucket] = _Shard(self.root, f"{self._next:0{self._digits}d}", self.captioner)
            self._next += 1
        shard = self._open[bucket]
        clip.meta["bucket"] = bucket.to_dict()
        shard.write(clip, caption, text)
        if shard.samples == self.samples_per_shard or 0 < self.shard_bytes <= shard.bytes:
            self._close(self._open.pop(bucket), keep=True)

    def rows(self) -> dict[str, Rows]:
        """The rows of all closed shards in the order of their numbers: of the av tars, and of the captioner's."""
        closed = sorted(self._closed, key=lambda rows: rows[AV].files[0]["name"])
        return {column: join([rows[column] for rows in closed]) for column in (closed[0] if closed else ())}

    def _close(self, shard: "_Shard", keep: bool) -> None:
        rows = shard.close(keep)
        if rows:
            self._closed.append(rows)


class _Shard:
    """One open pair of tars."""

    def __init__(self, root: Path, number: str, captioner: str):
        self.samples = self.bytes = 0
        self._av = ShardTar(root / f"av-{number}.tar", AV)
        self._text = TextTar(root, captioner, number)

    def write(self, clip: EncodedClip, caption: str, text: Tensor) -> None:
        tensors, meta = clip.to_members()
        self._av.write(clip.key, tensors, meta)
        self._text.add(clip.key, {"caption": caption}, text)
        self.samples += 1
        self.bytes += len(tensors) + len(meta)

    def close(self, keep: bool) -> dict[str, Rows]:
        if not keep:
            self._av.abandon()
            self._text.abandon()
            return {}
        return {AV: self._av.close(), self._text.column: self._text.close()}


class ShardTar:
    """One tar of samples under a temporary name; `close` gives it its name, `abandon` removes it."""

    def __init__(self, path: Path, column: str):
        """column: "av" or "text-<captioner>"."""
        self.path, self.column = path, column
        self._file = _Hashed(temporary(path))
        # mtime 0 and fixed owner (TarWriter's default): equal samples give equal shards
        self._tar = TarWriter(self._file, encoder=False, mtime=0)
        self._rows = TarRows(column, path)

    def write(self, key: str, tensors: bytes, meta: bytes) -> None:
        """Append a sample: the bytes of its .safetensors and its .json."""
        members = [self._member(key, "json", meta), self._member(key, "safetensors", tensors)]
        self._rows.add(key, (members[1], tensors), (members[0], meta))

    def close(self) -> Rows:
        """Finish the file, durably (all but its name, see sync_folder). Returns what the index needs of it."""
        self._tar.close()
        size, digest = self._file.close()
        os.rename(temporary(self.path), self.path)
        return self._rows.close(size, digest)

    def abandon(self) -> None:
        """Remove what was written."""
        with contextlib.suppress(OSError):  # a full disk is why it is abandoned
            self._tar.close()
        self._file.give_up()
        with contextlib.suppress(OSError):
            temporary(self.path).unlink()

    def _member(self, key: str, kind: str, data: bytes) -> int:
        """Append a member; returns where its data begin."""
        self._tar.write({"__key__": key, kind: data})
        blocks = -(-len(data) // tarfile.BLOCKSIZE)
        number: int = self._tar.tarstream.offset - blocks * tarfile.BLOCKSIZE
        return number


class TextTar(ShardTar):
    """text-<captioner>-<number>.tar: one captioner's texts of the shard of that number, in the order of its keys."""

    def __init__(self, root: Path, captioner: str, number: str):
        super().__init__(root / f"text-{captioner}-{number}.tar", f"text-{captioner}")

    def add(self, key: str, meta: dict[str, Any], text: Tensor) -> None:
        """Append a text [L, D]. meta: `caption` and what else is known of it; "" where the captioner has none."""
        self.write(key, save({"text": text.to(torch.bfloat16).contiguous()}), encode_json(meta))


class _Hashed:
    """A file that is written from start to end, and its SHA-256."""

    def __init__(self, path: Path):
        self._file, self._sha256, self._size = open(path, "wb"), hashlib.sha256(), 0  # noqa: SIM115

    def write(self, data: bytes) -> int:
        self._sha256.update(data)
        self._size += len(data)
        return self._file.write(data)

    def give_up(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()

    def close(self) -> tuple[int, str]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._size, self._sha256.hexdigest()


def write_empty_text(root: Path, text: Tensor) -> None:
    """Store the encoded empty prompt [L0, D] of a dataset."""
    data = save({"text": text.to(torch.bfloat16).contiguous()})
    write_atomically(root / EMPTY_TEXT, data)


def write_captioners(root: Path, own: list[str], added: list[str]) -> None:
    """State whose captions are the dataset's own (part of its fingerprint), and whose were added later."""
    write_atomically(root / CAPTIONERS, encode_captioners(own, added))
