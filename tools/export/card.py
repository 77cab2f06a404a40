"""The model card of an export: README.md with the front matter that model hubs read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from core.jsonl import read_lines
from core.run_dir import RunDir
from model.joint import JointConfig
from tools.export.request import ExportRequest
from train.start.weights import told

FILL_IN = "TO FILL IN"
LOSS = re.compile(r"(train|valid)/loss(_video|_audio)?")
LOADING = {
    "mova": """\
    from model.convert import load_mova
    model = load_mova("FOLDER", dtype=torch.bfloat16)

With the encoders beside the four parts (`base=`), upstream's `MOVA.from_pretrained("FOLDER")` loads it too.
""",
    "diffusers": """\
    from diffusers import WanTransformer3DModel
    high = WanTransformer3DModel.from_pretrained("FOLDER", subfolder="transformer")       # noise above the boundary
    low = WanTransformer3DModel.from_pretrained("FOLDER", subfolder="transformer_2")

Audio tower and Bridge lie beside them in MOVA's layout.
""",
    "safetensors": """\
    mova sample model=FOLDER prompt="..." out=sample.mp4
    python -m train init.source=FOLDER ...
""",
}


def card(facts: dict[str, Any], model: JointConfig, order: ExportRequest) -> str:
    """README.md of an export. `facts`: its training.json. Licence fields are for a person to fill in."""
    front = {
        "license": FILL_IN, "license_link": FILL_IN, "library_name": "mova", "tags": ["text-to-video", "text-to-audio"],
        "base_model": sorted({one["source"] for one in facts["origin"].values() if "taken" in one}),
    }  # fmt: skip
    video, audio = model.video, model.audio
    rows = [
        ("run", f"{facts['run']}, step {facts['step']:,}"),
        ("weights", f"{facts['weights']}, {facts['dtype']}"),
        ("video", f"{len(model.experts)} expert(s), {video.num_layers} blocks of {video.dim}"),
        ("audio", f"{audio.num_layers} blocks of {audio.dim}"),
        ("experts part at", f"t = {facts['boundary']:g} of 1000"),
        ("shifts", f"video {facts['shift_video']:g}, audio {facts['shift_audio']:g}"),
        ("data", ", ".join(facts["data"]) or "not recorded"),
        *(("start of " + part, words) for part, words in told(facts["origin"])),
        *_metrics(order.run, facts["step"]),
    ]
    table = "\n".join(f"| {name} | {words} |" for name, words in rows)
    loading = LOADING[order.format].replace("FOLDER", order.out.name)
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {facts['run']}\n\nMOVA, a joint video-audio diffusion "
        f"transformer.\n\n| | |\n|---|---|\n{table}\n\n## Loading\n\n{loading}\n## Licence\n\n{FILL_IN}: the licences "
        "of the data and of the weights that training started from apply.\n"
    )


def _metrics(run: Path, step: int) -> list[tuple[str, str]]:
    """The last losses up to a step, as metrics.jsonl has them."""
    last: dict[str, float] = {}
    for record in read_lines(RunDir(run).metrics):
        if record.get("step", 0) <= step:
            last |= {name: value for name, value in record.items() if LOSS.fullmatch(name)}
    return [(name, f"{value:.4g}") for name, value in sorted(last.items()) if isinstance(value, float)]
