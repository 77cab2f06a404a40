"""The request for an export."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from data.codec import EncoderConfig

FORMATS = ("mova", "diffusers", "safetensors")


@dataclass(frozen=True)
class ExportRequest:
    """See the keys of tools/export/__main__.py."""

    run: Path
    out: Path
    step: int | None
    format: str
    weights: str | None
    dtype: str
    base: Path | None
    encoder: EncoderConfig = field(default_factory=EncoderConfig)  # how the base's encoders were used
