"""Export a run's checkpoint as a folder of weights.

    mova export run=runs/first out=exported                       # MOVA's layout, bfloat16, averages
    mova export run=runs/first step=2000 weights=raw dtype=float32 format=safetensors out=exported
    mova export run=runs/first format=diffusers out=exported      # transformer/, transformer_2/, and ours
    mova export run=runs/first base=MOVA-360p out=exported        # with the encoders of that folder

`step`: of a committed checkpoint (null: the newest). `weights`: "ema" or "raw" (null: ema where the run keeps one).
`dtype`: "bfloat16" (what loaders keep in float32 stays float32), "float32", or "source": as each tensor was read at the
start. One file's tensors are in memory at a time, and no process group is needed. A model that a format cannot
express is refused; format=safetensors expresses everything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from core.compose import Schema
from core.program import Call, Program
from core.ranges import bounded
from data.codec import EncoderConfig
from tools.export.folder import export
from tools.export.request import FORMATS, ExportRequest

DTYPES = ("bfloat16", "float32", "source")


@dataclass
class ExportConfig:
    """The weights to export, and their format.

    run: a run's folder
    out: folder to create
    step: of a committed checkpoint; null: the newest
    format: mova, diffusers or safetensors (one flat set of names)
    weights: raw, or ema for the average; null: the average if the run keeps one
    dtype: bfloat16, float32, or source: as each tensor was read at the start of training
    base: a MOVA folder whose encoders are copied (format=mova); they must be those of the run
    """

    run: str = MISSING
    out: str = MISSING
    step: int | None = bounded(None, "[0, inf)")
    format: str = "mova"
    weights: str | None = None
    dtype: str = "bfloat16"
    base: str | None = None
    encoder: EncoderConfig = field(default_factory=EncoderConfig)

    def __post_init__(self) -> None:
        for key, known in (("format", FORMATS), ("weights", (None, "ema", "raw")), ("dtype", DTYPES)):
            if getattr(self, key) not in known:
                words = ", ".join(str(word) for word in known if word is not None)
                raise ValueError(f"{key}={getattr(self, key)} is not one of {words}")
        if self.base is not None and self.format != "mova":
            raise ValueError(f"base={self.base}: a base folder needs format=mova")


def _run(typed: ExportConfig) -> None:
    base = None if typed.base is None else Path(typed.base)
    order = ExportRequest(
        Path(typed.run), Path(typed.out), typed.step, typed.format, typed.weights, typed.dtype, base, typed.encoder
    )
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("export", total=None)
        lines = export(order, lambda total: bar.update(task, total=total), lambda size: bar.advance(task, size))
    for line in lines:
        print(line)


def _main(call: Call[ExportConfig]) -> None:
    _run(call.config)


PROGRAM = Program("export", __doc__, _main, schema=Schema("export", ExportConfig, (("encoder", None),)), first="run")

if __name__ == "__main__":
    PROGRAM.start()
