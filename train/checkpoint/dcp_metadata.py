"""Reads checkpoints in DCP's format without a plan on rank 0, and without letting a pickle run code.

`.metadata` is a pickle. This reader knows the names that a checkpoint of tensors needs, and refuses all others
before anything is called; tensors are read by torch's own weights-only reader.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from core.errors import RunError
from train.checkpoint.dcp_files import METADATA
from train.faults.garbage import without_garbage_collection
from train.parallel.collectives import gather

_DCP = "torch.distributed.checkpoint"
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
NAMES = {
    ("torch", "Size"),
    *(("torch", name) for name in DTYPES),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),  # the folder that it was written to, in those that DCP wrote
    (f"{_DCP}.filesystem", "_StorageInfo"),
    *(
        (f"{_DCP}.metadata", name)
        for name in (
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
            "ChunkStorageMetadata", "StorageMeta",
        )
    ),
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of tensors needs")
        return super().find_class(module, name)


def read_metadata(path: Path) -> Metadata:
    """A checkpoint's METADATA. RunError if it is not one of tensors, or names anything else; no code in it is run."""
    file = path / METADATA
    try:
        with open(file, "rb") as stream, without_garbage_collection():
            metadata = _Unpickler(stream).load()
        _check(metadata)
    except OSError as error:
        raise RunError(f"checkpoint {path} cannot be read: {error}", retry=True) from error
    except Exception as error:  # a pickle that is damaged or made up may raise anything
        raise RunError(f"{file} is refused, nothing in it was run: {error}") from None
    result: Metadata = metadata
    return result


def _check(metadata: Any) -> None:
    """ValueError unless this describes a checkpoint of tensors whose files are beside METADATA."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError(f"it holds {type(metadata).__name__}, which does not describe a checkpoint")
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{key!r} is not a tensor")
    files = set()
    for index, info in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(info, _StorageInfo):
            raise ValueError(f"it places {index!r} at {info!r}")
        files.add(info.relative_path)
    for name in files:
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(f"its file {name!r} is not beside it")


def read_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Fill tensors, sharded ones too, from a checkpoint of any layout. All ranks call; each reads what it keeps.

    RunError, on all ranks, when one of them cannot read: a tensor is missing or has another shape, or a file fails.
    """
    faults = gather([fault] if (fault := read_alone(tensors, path)) is not None else [])
    if faults:
        message, retry = next((one for one in faults if not one[1]), faults[0])
        raise RunError(message, retry)


@dataclass(frozen=True)
class Reads:
    """What this rank reads from a checkpoint: parts of records, and their destinations."""

    reader: FileSystemReader
    planner: DefaultLoadPlanner
    plan: LoadPlan


def plan_reads(tensors: dict[str, Tensor], path: Path) -> Reads:
    """RunError as `read_metadata`; ValueError or RuntimeError for a tensor that is missing or has another shape."""
    metadata = read_metadata(path)
    reader, planner = FileSystemReader(path), DefaultLoadPlanner(flatten_state_dict=False)
    with without_garbage_collection():
        reader.set_up_storage_reader(metadata, is_coordinator=False)
        planner.set_up_planner(tensors, metadata, is_coordinator=False)
        return Reads(reader, planner, planner.finish_plan(planner.create_local_plan()))


def read_alone(tensors: dict[str, Tensor], path: Path) -> tuple[str, bool] | None:
    """Fill this rank's tensors. Returns what went wrong, and whether another attempt may succeed."""
    try:
        reads = plan_reads(tensors, path)
        reads.reader.read_data(reads.plan, reads.planner).wait()
    except RunError as error:
        return str(error), error.retry
    except Exception as error:
        return f"checkpoint {path} cannot be read: {str(error) or type(error).__name__}", True
    return None
