"""Rows of an index without their samples: what shards of a large dataset would leave behind, for benches."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from data.clip import Bucket
from data.dataset.rows import AV, Rows, dtype_of

BUCKETS = [
    Bucket(frames=frames, height=height, width=width, audio_steps=sound, fps=24.0, has_video=True, has_audio=True)
    for frames, height, width, sound in [
        (49, 44, 80, 403), (49, 60, 60, 403), (25, 44, 80, 203), (49, 80, 44, 403), (13, 90, 160, 103),
    ]
]  # fmt: skip
SAMPLE_BYTES = 1_000_000
SCORES = ("dnsmos_ovrl", "silence_ratio")


def make_rows(
    numbers: list[int], sizes: list[int], captioner: str, scores: tuple[str, ...], rng: np.random.Generator
) -> dict[str, Rows]:
    """The rows of shards of these numbers and samples: random keys, checksums and scores."""
    count = sum(sizes)
    digits = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
    key = digits[rng.integers(0, 16, (count, 24), dtype=np.uint8)].view("S24")[:, 0]
    place = np.concatenate([np.arange(size, dtype=np.uint64) for size in sizes]) * np.uint64(SAMPLE_BYTES)

    def member(column: str, start: int, size: int) -> dict[str, np.ndarray]:
        return {
            f"{column}_offset": place + np.uint64(start),
            f"{column}_size": np.full(count, size, np.uint64),
            f"{column}_xxh3": rng.integers(0, 1 << 63, count, dtype=np.uint64),
        }

    ones = np.ones(count, dtype_of("av_finite"))
    columns = {AV: {"key": key, **member(AV, 1536, 900_000), "av_finite": ones, **member("json", 512, 700)}}
    columns[AV] |= {f"score-{name}": rng.random(count, dtype=np.float32) for name in scores}
    text = f"text-{captioner}"
    columns[text] = {"key": key, **member(text, 1536, 800_000), f"{text}_finite": ones, f"{text}_absent": 1 - ones}
    files: dict[str, list[dict[str, Any]]] = {AV: [], text: []}
    for number, size in zip(numbers, sizes, strict=True):
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        for column in columns:
            name = f"{column}-{number:06d}.tar"
            files[column].append({"name": name, "samples": size, "bytes": size * SAMPLE_BYTES, "sha256": digest})
        files[AV][-1] |= {"bucket": BUCKETS[number % len(BUCKETS)].to_dict(), "encoders": {"video": "synthetic"}}
    return {column: Rows(files[column], values) for column, values in columns.items()}
