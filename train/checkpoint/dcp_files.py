"""A checkpoint's files in the format of torch.distributed.checkpoint (DCP), which each rank writes from the layout
alone.

DCP plans a save on rank 0: every rank sends a list of its shards and gets one back, which takes minutes and gigabytes
at a thousand ranks. But shapes and meshes, which all ranks know, tell who holds which rows, and the length of what
`torch.save` writes depends on shape and dtype only. So each rank knows all files before one is written: it writes its
own, checking every offset, and the first one makes `.metadata`, once for all saves of the same layout.

    plan = FilePlan(placements_of(tensors))          # the same on all ranks
    checksums = write_file(plan, tensors, folder, rank)
    (folder / METADATA).write_bytes(plan.metadata())  # rank 0
"""

from __future__ import annotations

import hashlib
import heapq
import os
import pickle
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.serialization import skip_data

from train.faults.garbage import without_garbage_collection

METADATA = ".metadata"

Grid = tuple[tuple[int, ...], ...]  # ranks by [replica][shard]


@dataclass(frozen=True)
class Placed:
    """Where a tensor lies: its rows are split evenly over the shards, as torch.chunk does, and each replica has all."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    grid: Grid

    @property
    def bytes(self) -> int:
        """Size of the whole tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def rows(self, shard: int) -> tuple[int, int]:
        """(first row, number of rows) of a shard; of a scalar (0, 1)."""
        count = self.shape[0] if self.shape else 1
        each = -(-count // len(self.grid[0]))
        first = min(shard * each, count)
        return first, min(each, count - first)

    def shard_shape(self, rows: int) -> tuple[int, ...]:
        """The shape of this many of its rows."""
        return (rows, *self.shape[1:]) if self.shape else ()


@dataclass(frozen=True)
class FileChunk:
    """Rows of one tensor in one rank's file."""

    key: str
    shape: tuple[int, ...]
    offset: int  # bytes, in the file
    length: int


def placements_of(tensors: Mapping[str, Tensor]) -> dict[str, Placed]:
    """The placement of each tensor on the ranks; a plain one is whole on all of them. ValueError for a split other than
    of rows over one axis of the mesh."""
    grids: dict[Any, Grid] = {None: tuple((rank,) for rank in range(dist.get_world_size()))}
    placed = {}
    for key, tensor in tensors.items():
        where = None
        if isinstance(tensor, DTensor):
            where = tensor.device_mesh, tensor.placements
            if where not in grids:
                grids[where] = _grid(*where, key)
        placed[key] = Placed(tuple(tensor.shape), tensor.dtype, grids[where])
    return placed


def _grid(mesh: DeviceMesh, placements: tuple[Placement, ...], key: str) -> Grid:
    split = [axis for axis, placement in enumerate(placements) if not isinstance(placement, Replicate)]
    if len(split) > 1 or any(type(placements[axis]) is not Shard or placements[axis] != Shard(0) for axis in split):
        raise ValueError(f"{key} is placed as {placements}: a checkpoint holds rows split over one axis of the mesh")
    ranks = mesh.mesh.movedim(split[0], -1) if split else mesh.mesh.reshape(-1, 1)
    return tuple(tuple(row) for row in ranks.reshape(-1, ranks.shape[-1]).tolist())


class FilePlan:
    """Which rank writes which rows of which tensor, and where in its file. Depends on its arguments only.

    Replicas share the work: each tensor is written by the shards of one of them.
    """

    def __init__(self, placed: dict[str, Placed]) -> None:
        self.placed = placed
        self._writers = _share_out(placed)

    def pieces(self, rank: int) -> list[FileChunk]:
        """What a rank writes, in the order of its file."""
        found, offset = [], 0
        positions: dict[Grid, tuple[int, int] | None] = {}
        for key, one in self.placed.items():
            if one.grid not in positions:
                positions[one.grid] = next(
                    ((r, ranks.index(rank)) for r, ranks in enumerate(one.grid) if rank in ranks), None
                )
            position = positions[one.grid]
            if position is None or position[0] != self._writers[key]:
                continue
            rows = one.rows(position[1])[1]
            if rows:
                shape = one.shard_shape(rows)
                found.append(FileChunk(key, shape, offset, saved_bytes(shape, one.dtype)))
                offset += found[-1].length
        return found

    def digest(self) -> str:
        """The same on all ranks whose plans are equal."""
        grids: dict[Grid, int] = {}
        sums = hashlib.sha256(torch.__version__.encode())
        for key, one in self.placed.items():
            sums.update(f"{key} {one.shape} {one.dtype} {grids.setdefault(one.grid, len(grids))};".encode())
        sums.update(repr(list(grids)).encode())
        return sums.hexdigest()

    def metadata(self) -> bytes:
        """The content of METADATA. Takes seconds at 700,000 shards."""
        out = _Stream()
        with without_garbage_collection():
            pickle.Pickler(out, protocol=4).dump(self._describe())
        return b"".join(out.parts)

    def _describe(self) -> Metadata:
        described: dict[str, Any] = {}
        stored = {}
        ends: dict[int, int] = {}  # of the ranks' files, so far
        names: dict[int, str] = {}
        layouts: dict[tuple[Any, ...], tuple[list[ChunkStorageMetadata], list[tuple[int, int]]]] = {}
        for key, one in self.placed.items():
            kind = (one.shape, one.dtype, one.grid)
            if kind not in layouts:  # objects that tensors of one kind share make the file and its reading small
                layouts[kind] = _chunks(one)
            chunks, shards = layouts[kind]
            described[key] = TensorStorageMetadata(TensorProperties(one.dtype), torch.Size(one.shape), chunks)
            ranks = one.grid[self._writers[key]]
            for index, (chunk, (shard, length)) in enumerate(zip(chunks, shards, strict=True)):
                rank = ranks[shard]
                begin = ends.get(rank, 0)
                info = _StorageInfo(names.setdefault(rank, file_name(rank)), begin, length)
                stored[MetadataIndex(key, chunk.offsets, index)] = info
                ends[rank] = begin + length
        return Metadata(
            described, {key: (key,) for key in self.placed}, stored, StorageMeta(), version=CURRENT_DCP_VERSION
        )


def _chunks(one: Placed) -> tuple[list[ChunkStorageMetadata], list[tuple[int, int]]]:
    """The parts of a tensor that have rows, and (shard, bytes in its file) of each."""
    chunks, shards = [], []
    for shard in range(len(one.grid[0])):
        first, rows = one.rows(shard)
        if rows:
            shape = one.shard_shape(rows)
            begin = torch.Size((first, *[0] * (len(shape) - 1)) if shape else ())
            chunks.append(ChunkStorageMetadata(begin, torch.Size(shape)))
            shards.append((shard, saved_bytes(shape, one.dtype)))
    return chunks, shards


def _share_out(placed: dict[str, Placed]) -> dict[str, int]:
    """The replica that writes each tensor: the large ones first, each to the one that has least so far."""
    loads: dict[Grid, list[tuple[int, int]]] = {}
    writers = {}
    for key, one in sorted(placed.items(), key=lambda item: -item[1].bytes):
        heap = loads.setdefault(one.grid, [(0, replica) for replica in range(len(one.grid))])
        load, writers[key] = heap[0]
        heapq.heapreplace(heap, (load + one.bytes, writers[key]))
    return writers


def file_name(rank: int) -> str:
    """The file that a rank writes."""
    return f"__{rank}_0.distcp"


def write_file(plan: FilePlan, tensors: Mapping[str, Tensor], folder: Path, rank: int) -> dict[str, int]:
    """Write a rank's shards, which lie in host memory. Returns {name: CRC-32} of its file, empty where it has none.

    RuntimeError if the file does not match the plan; OSError if it cannot be written.
    """
    pieces = plan.pieces(rank)
    if not pieces:
        return {}
    with open(folder / file_name(rank), "xb") as file:
        out: Any = _Stream(file)
        for piece in pieces:
            tensor = tensors[piece.key].detach()
            shard = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if tuple(shard.shape) != piece.shape:
                raise RuntimeError(f"{piece.key}: rank {rank} holds {tuple(shard.shape)}, not {piece.shape}")
            if shard.untyped_storage().nbytes() != shard.nbytes:
                shard = shard.clone()  # torch.save writes whole storages
            torch.save(shard, out)
            if out.position != piece.offset + piece.length:
                raise RuntimeError(
                    f"{piece.key}: torch.save wrote {out.position - piece.offset} bytes, {piece.length} were expected "
                    f"(torch {torch.__version__})"
                )
        file.flush()
        os.fsync(file.fileno())
    return {file_name(rank): out.checksum}


@cache
def saved_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes that torch.save writes for a contiguous tensor, measured by writing one without its data."""
    out: Any = _Stream()
    with skip_data():
        torch.save(torch.empty(shape, dtype=dtype), out)
    number: int = out.position
    return number


class _Stream:
    """Counts bytes and computes their checksum on the way into a file (or into `parts`)."""

    def __init__(self, file: Any = None) -> None:
        self.position = 0
        self.checksum = 0
        self.parts: list[bytes] = []
        self._file = file

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.position += size
        if self._file is None:
            self.parts.append(bytes(data))
        else:
            self._file.write(data)
            self.checksum = zlib.crc32(data, self.checksum)
        return size

    def seek(self, distance: int, whence: int) -> None:
        """Forward only: for data that is not written."""
        assert whence == os.SEEK_CUR and self._file is None
        self.position += distance

    def flush(self) -> None:
        """The file is flushed when it is whole."""
