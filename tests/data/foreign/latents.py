"""Latents of others for tests: folders and tars of them, and what an import has stored."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from data.dataset.index import DatasetIndex
from data.foreign.latents import Encoders
from data.import_latents import ImportConfig

T, H, W = 5, 4, 6  # 17 frames
FPS = 17.0  # so that a clip lasts a second: 50 steps of sound
LA = 50
ENCODERS = Encoders(video="wan-vae-f32", audio="dac-128")


def latents(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sample(seed: int, kinds: str = "vac", frames: int = T, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Some of video, condition and audio."""
    tensors = {}
    if "v" in kinds:
        tensors["video"] = latents(seed, 16, frames, H, W, dtype=dtype)
    if "c" in kinds:
        tensors["condition"] = latents(seed + 1000, 16, frames, H, W, dtype=dtype)
    if "a" in kinds:
        tensors["audio"] = latents(seed + 2000, LA, 128, dtype=dtype)
    return tensors


def put(folder: Path, name: str, tensors: Mapping[str, Tensor], caption: str = "", **meta: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({kind: tensor.contiguous() for kind, tensor in tensors.items()}, folder / f"{name}.safetensors")
    if caption:
        (folder / f"{name}.txt").write_text(caption)
    if meta:
        (folder / f"{name}.json").write_text(json.dumps(meta))


def settings(source: Path | str, output: Path, **changes: Any) -> ImportConfig:
    return ImportConfig(**{"source": str(source), "output": str(output), "encoders": ENCODERS, "fps": FPS, **changes})


def stored(output: Path) -> dict[str, tuple[Any, str, Tensor]]:
    """Clip, caption and text by source."""
    index = DatasetIndex.open(output)
    assert index.verify() == []
    captions = {}
    for path in output.glob("text-*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    captions[member.name[:-5]] = json.load(tar.extractfile(member))["caption"]  # type: ignore[arg-type]
    found = {}
    for row in range(len(index)):
        clip = index.read_clip(row)
        found[clip.meta["source"]] = (clip, captions[clip.key], index.read_text(row, index.captioners[0]))
    assert len(found) == len(index)
    return found


def verdicts(output: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    assert len({line["source"] for line in lines}) == len(lines)
    return {line["source"]: line["reason"] for line in lines}


def equal(clip: Any, tensors: Mapping[str, Tensor]) -> None:
    for kind in ("video", "condition", "audio"):
        tensor, expected = getattr(clip, kind), tensors.get(kind)
        assert (tensor is None) == (expected is None), kind
        assert expected is None or torch.equal(tensor, expected.to(torch.bfloat16)), kind


def npy(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, tensor.numpy())
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes | tarfile.TarInfo]], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


MEMBERS = {
    "video": "latent.safetensors",
    "condition": "first.npy",
    "audio": "sound.npy",
    "caption": "txt",
    "meta": "json",
}


def members_of(key: str, seed: int, caption: str = "words") -> list[tuple[str, bytes | tarfile.TarInfo]]:
    tensors = sample(seed, dtype=torch.float32)
    return [
        (f"{key}.latent.safetensors", save({"any": tensors["video"]})),
        (f"{key}.first.npy", npy(tensors["condition"])),
        (f"{key}.jpg", b"not looked at"),
        (f"{key}.sound.npy", npy(tensors["audio"])),
        (f"{key}.txt", caption.encode()),
        (f"{key}.json", json.dumps({"fps": FPS}).encode()),
    ]
