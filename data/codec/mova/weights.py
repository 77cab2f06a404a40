"""Weights of codecs from local folders and files: safetensors (one file or shards with an index) and pickled state
dicts, which are read with weights_only. And the one number that stands for them in a fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data.codec import CodecError

PICKLED = (".pth", ".pt", ".ckpt")


def find_part(place: str, folders: tuple[str, ...], files: tuple[str, ...], key: str) -> Path:
    """A part's folder (with config.json) or file of pickled weights in `place`, or `place` itself. CodecError when
    there is none. key: the configuration key, for the message."""
    root = Path(place)
    if root.is_file():
        return root
    found = [root / name for name in folders if (root / name / "config.json").is_file()]
    found += [root / name for name in files if (root / name).is_file()]
    if not found and (root / "config.json").is_file():
        found = [root]
    if not found:
        raise CodecError(f"{key}={place} holds none of {', '.join(f'{name}/config.json' for name in folders)}"
                        f"{''.join(f', {name}' for name in files)}: give the folder of the weights")  # fmt: skip
    return found[0]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder. CodecError when it is no JSON object."""
    try:
        values = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CodecError(f"{folder / 'config.json'} can't be read ({error})") from None
    if not isinstance(values, dict):
        raise CodecError(f"{folder / 'config.json'} holds no object")
    return values


def read_state(path: Path) -> dict[str, Tensor]:
    """All tensors of a folder of safetensors, of one such file, or of a pickled state dict (also under "state_dict"),
    mapped into memory. CodecError for files that are missing or hold something else."""
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise CodecError(f"{path} holds no *.safetensors")
        if index := next(iter(sorted(path.glob("*.safetensors.index.json"))), None):
            files = [path / name for name in sorted(set(_weight_map(index).values()))]
        if gone := [file.name for file in files if not file.is_file()]:
            raise CodecError(f"{path}: {gone[0]} is missing, which its index names; copy the whole folder")
        return {name: tensor for file in files for name, tensor in _read(file).items()}
    return _read(path)


def _weight_map(index: Path) -> dict[str, str]:
    """{tensor: file} of an index. CodecError when it is none."""
    try:
        found = json.loads(index.read_text())["weight_map"]
        if all(isinstance(name, str) and Path(name).name == name for name in found.values()):
            return dict(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise CodecError(f"{index} has no weight_map of tensors to files beside it: copy the whole folder again")


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix not in PICKLED:
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise CodecError(f"{file} can't be read as safetensors ({error})") from None
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a torch.package, a pickle of classes, a truncated zip: each says so in its own class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CodecError(f"{file} can't be read with weights_only ({reason}): convert it to safetensors") from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(one, Tensor) for one in state.values()):
        raise CodecError(f"{file} holds no state dict of tensors")
    return state


def load_into(module: torch.nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Give a module on the meta device its weights. CodecError names one that is missing, unknown or misshapen."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for words, names in (
        ("lacks", expected.keys() - found.keys()),
        ("has unknown", found.keys() - expected.keys()),
        ("has another shape of", {name for name in expected.keys() & found.keys() if expected[name] != found[name]}),
    ):
        if names:
            first = sorted(names)[0]
            shape = f" {found[first]}, expected {expected[first]}" if first in found and first in expected else ""
            raise CodecError(f"{path} {words} {first}{shape} ({len(names)} such): these are weights of another network")
    module.load_state_dict(dict(state), assign=True)


def hash_state(state: Mapping[str, Tensor]) -> str:
    """One number for names, types, shapes and bits of all tensors, whatever their order and files."""
    lines = []
    for name in sorted(state):
        tensor = state[name].detach().contiguous()
        bits = xxhash.xxh3_128_hexdigest(tensor.reshape(-1).view(torch.uint8).numpy().data)
        lines.append(f"{name} {tensor.dtype} {list(tensor.shape)} {bits}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def fingerprint(prefix: str, revision: int, *facts: Any) -> str:
    """`prefix` and a short hash of all that decides what a codec gives."""
    content = json.dumps([revision, *facts], sort_keys=True)
    return f"{prefix}{revision}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
