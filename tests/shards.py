"""Small datasets for tests: shards of random latents, written and indexed as real ones are."""

from pathlib import Path

import torch
import webdataset
from safetensors.torch import save, save_file

from data.clip import Bucket, EncodedClip
from data.index import build_index


def make_dataset(
    root: Path, shards: list[tuple[Bucket, int]], nan: int | None = None, seed: int = 0, dim: int = 6
) -> Path:
    """Shards of random latents; sample number `nan` gets a NaN in its sound. Captions of 2 to 6 tokens of `dim`."""
    root.mkdir(parents=True)
    rng = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).to(torch.bfloat16)

    save_file({"text": values(3, dim)}, root / "empty-text.safetensors")
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
                clip = EncodedClip(key, video, sound, condition, {"bucket": bucket.to_dict()})
                members = clip.to_members()
                av.write({"__key__": key, "safetensors": members[0], "json": members[1]})
                caption = {"text": values(2 + number % 5, dim)}
                text.write({"__key__": key, "safetensors": save(caption), "json": b'{"caption": "a test"}'})
                number += 1
    build_index(root)
    return root
