"""Small datasets for tests: shards of random latents, written and indexed as real ones are."""

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import torch
import webdataset
from safetensors.torch import load_file, save, save_file

from data.clip import Bucket, EncodedClip
from data.dataset.build import build_index


def make_dataset(
    root: Path,
    shards: list[tuple[Bucket, int]],
    nan: int | None = None,
    seed: int = 0,
    dim: int = 6,
    encoders: dict[str, str] | None = None,
    mixes: bool = False,
) -> Path:
    """Shards of random latents; sample number `nan` gets a NaN in its sound. Captions of 2 to 6 tokens of `dim`.

    encoders: the fingerprints that the samples state; mixes: the empty prompt is that of all such datasets.
    """
    root.mkdir(parents=True)
    rng = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).to(torch.bfloat16)

    empty = torch.ones(3, dim, dtype=torch.bfloat16) if mixes else values(3, dim)
    save_file({"text": empty}, root / "empty-text.safetensors")
    number = 0
    for shard, (bucket, count) in enumerate(shards):
        with (
            webdataset.TarWriter(str(root / f"av-{shard:06d}.tar")) as av,
            webdataset.TarWriter(str(root / f"text-plain-{shard:06d}.tar")) as text,
        ):
            for _ in range(count):
                key = f"{seed:04x}{number:020x}"
                grid = (16, bucket.frames, bucket.height, bucket.width)
                audio = values(bucket.audio_steps, 128)
                if number == nan:
                    audio[1, 2] = float("nan")
                video, condition = (values(*grid), values(*grid)) if bucket.has_video else (None, None)
                sound = audio if bucket.has_audio else None
                meta = {"bucket": bucket.to_dict()} | ({"encoders": encoders} if encoders else {})
                clip = EncodedClip(key, video, sound, condition, meta)
                members = clip.to_members()
                av.write({"__key__": key, "safetensors": members[0], "json": members[1]})
                caption = {"text": values(2 + number % 5, dim)}
                text.write({"__key__": key, "safetensors": save(caption), "json": b'{"caption": "a test"}'})
                number += 1
    build_index(root)
    return root


def add_captions(root: Path, captioner: str, seed: int, without: Sequence[int] = (), dim: int = 6) -> None:
    """Random captions of one more captioner for all samples; rows `without` have none (the empty prompt)."""
    rng = torch.Generator().manual_seed(seed)
    empty = load_file(root / "empty-text.safetensors")["text"]
    row = 0
    for av in sorted(root.glob("av-*.tar")):
        with (
            tarfile.open(av) as shard,
            webdataset.TarWriter(str(root / av.name.replace("av-", f"text-{captioner}-"))) as text,
        ):
            for key in [name[:-5] for name in shard.getnames() if name.endswith(".json")]:
                words = torch.randn(2 + row % 3, dim, generator=rng).to(torch.bfloat16)
                caption = None if row in without else f"{captioner} says {row}"
                members = {"safetensors": save({"text": words if caption else empty})}
                text.write({"__key__": key, **members, "json": json.dumps({"caption": caption}).encode()})
                row += 1
    build_index(root)
