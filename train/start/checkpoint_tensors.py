"""Reads the tensors of a checkpoint by name and range, without a process group, whatever layout wrote it.

tensors = CheckpointTensors(Path("runs/first/checkpoints/step-00001000"))
tensors.read("model.video_dit.head.head.weight", 0, 5120)
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from core.errors import RunError
from model.joint import JointConfig
from model.weights.files import LayoutError
from train.checkpoint import checkpoint
from train.checkpoint.checkpoint import MARKER
from train.checkpoint.dcp_metadata import read_metadata


class CheckpointTensors:
    """Implements model.weights.files.Tensors. RunError when the checkpoint's metadata cannot be read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        metadata = read_metadata(path)
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._chunks: dict[str, list[tuple[int, int, _StorageInfo]]] = {}  # (first element, end, where)
        for name, described in metadata.state_dict_metadata.items():
            assert isinstance(described, TensorStorageMetadata)  # read_metadata sees to it
            self._tensors[name] = described
            self._chunks[name] = []
        for index, where in metadata.storage_data.items():
            shape = self.shape(index.fqn)
            sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in self._tensors[index.fqn].chunks}
            offsets = tuple(index.offset or (0,) * len(shape))
            row = math.prod(shape[1:])
            if any(offsets[1:]) or sizes[offsets][1:] != shape[1:]:
                raise RunError(f"{path}: {index.fqn} is split along another axis than its rows, as no run here does")
            first = (offsets[0] if shape else 0) * row
            self._chunks[index.fqn].append((first, first + math.prod(sizes[offsets]), where))

    def names(self) -> Iterable[str]:
        """All tensors: model.<name>, ema.<name>, optim.<name>.<moment>."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See Tensors."""
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """See Tensors."""
        return self._tensors[name].properties.dtype

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """See Tensors. A rank's shard of the tensor is read as a whole."""
        chunks = sorted(self._chunks[name], key=lambda chunk: chunk[:2])
        wanted = [chunk for chunk in chunks if chunk[0] < stop and chunk[1] > start]
        if len(wanted) == 1 and wanted[0][0] <= start and wanted[0][1] >= stop:
            first, _, where = wanted[0]
            return self._load(where)[start - first : stop - first]
        found = torch.empty(stop - start, dtype=self.dtype(name))
        done = start
        for first, last, where in wanted:
            if first > done:
                break
            end = min(last, stop)
            found[done - start : end - start] = self._load(where)[done - first : end - first]
            done = max(done, end)
        if done < stop:
            raise LayoutError(f"{self._path}: elements {done} to {stop} of {name} lie in none of its files")
        return found

    def fingerprint(self, names: Iterable[str]) -> str:
        """See Tensors: of the checksums of all files, whatever the names."""
        files = json.loads((self._path / MARKER).read_text())["files"]
        sums = sorted((name, entry["crc32"]) for name, entry in files.items() if name.endswith(".distcp"))
        return hashlib.sha256(repr(sums).encode()).hexdigest()[:16]

    def _load(self, where: _StorageInfo) -> Tensor:
        """[n] elements of one record."""
        with open(self._path / where.relative_path, "rb") as file:
            view: Any = _create_file_view(file, where.offset, where.length)
            found: Tensor = torch.load(view, map_location="cpu", weights_only=True)
            return found.detach().flatten()


def read_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint besides its tensors. RunError if it cannot be read."""
    try:
        return checkpoint.read_state(path)
    except (OSError, ValueError) as error:
        raise RunError(f"checkpoint {path} cannot be read: {error}", retry=isinstance(error, OSError)) from None


def model_of(content: dict[str, Any]) -> JointConfig:
    """The model of a checkpoint by its STATE."""
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(JointConfig), content["config"]["model"]))
    assert isinstance(config, JointConfig)
    return config
