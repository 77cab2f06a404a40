"""Memory and time of a sharded import and of an export, on a folder of more than 4 GB that has MOVA's largest tensor.

    python -m bench.train.weights                  # writes bench/results/weights.md; 14 GB of disk, 12 GB of memory

A MOVA folder of true widths and few blocks (one video expert, float32) is made of random numbers. Then real ranks start
from it under each layout, without a step; the first one's checkpoint is exported by one process, in each dtype. Peaks
are of resident memory (VmHWM), over what the process had before; what they must stay under stands beside them: an
import, what is resident afterwards and the largest tensor in the source's dtype; an export, its largest file and the
largest tensor as the checkpoint holds it.
"""

from __future__ import annotations

import filecmp
import math
import multiprocessing
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from core.compose import Schema
from core.program import Call, Program
from data.loader.state import DataState
from model.bridge import BridgeConfig
from model.joint import JointConfig, JointTransformer
from model.tower import TowerConfig
from model.weights.configs import bridge_config, tower_config
from model.weights.files import open_files
from model.weights.write import write_json, write_weights
from tools.bench.ranks import on_ranks
from tools.bench.record import write_record
from tools.export.folder import export
from tools.export.request import ExportRequest
from train.checkpoint.checkpoint import CheckpointConfig, TrainState
from train.checkpoint.saver import Saver
from train.engine.engine import build_engine
from train.engine.optim import local
from train.engine.optim_config import OptimConfig
from train.objective.objective import ObjectiveConfig
from train.parallel.mesh import ParallelConfig, make_layout
from train.start.config import InitConfig
from train.start.sources import open_sources
from train.start.weights import start_weights

GB = 1e9
# Ranks, layout, whether the source has MOVA's widths: DeepSpeed keeps more of each weight than this machine has.
LAYOUTS: dict[str, tuple[int, dict[str, Any], bool]] = {
    "FSDP2, 4 ranks": (4, {}, True),
    "HSDP, 2 x 2 ranks": (4, {"dp_replicate": 2}, True),
    "ZeRO 2 in bfloat16, 2 ranks": (2, {"engine": "zero2", "compute_dtype": "bfloat16"}, False),
    "ZeRO 3 in bfloat16, 2 ranks": (2, {"engine": "zero3", "compute_dtype": "bfloat16"}, False),
}
FILE = 1_000_000_000  # bytes of a file of the source


@dataclass
class WeightsBench:
    """Where it works.

    folder: for temporary files
    blocks: of the video expert
    output: folder of the record
    """

    folder: str | None = None
    blocks: int = 2
    output: str = "bench/results"


def model_config(blocks: int, part: int = 1) -> JointConfig:
    """MOVA's widths, so that its largest tensors are there, in few blocks; `part`: or a part of its video's width."""
    shared: dict[str, Any] = {"text_dim": 4096, "freq_dim": 256}
    return JointConfig(
        TowerConfig(
            dim=5120 // part, num_heads=40 // part, num_layers=blocks, ffn_dim=13824 // part, in_dim=36, out_dim=16,
            **shared,
        ),
        TowerConfig(
            dim=1536, num_heads=12, num_layers=1, ffn_dim=8960, in_dim=128, out_dim=128, patch_size=[1], rope="dac",
            **shared,
        ),
        BridgeConfig(head_dim=128),
        two_experts=False,
    )  # fmt: skip


def make_folder(root: Path, config: JointConfig) -> dict[str, int]:
    """A MOVA folder of random numbers; {"bytes", "largest"} of its tensors."""
    with torch.device("meta"):
        model = JointTransformer(config)
    configs = {"video_dit": tower_config(config.video), "audio_dit": tower_config(config.audio)}
    configs["dual_tower_bridge"] = bridge_config(config)
    generator = torch.Generator().manual_seed(0)
    sizes: list[int] = []
    for part, written in configs.items():
        shapes = {name: tuple(tensor.shape) for name, tensor in getattr(model, part).state_dict().items()}
        bytes_of = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
        sizes += bytes_of.values()
        (root / part).mkdir(parents=True)
        write_json(root / part / "config.json", written)
        write_weights(root / part, bytes_of, partial(_drawn, generator, shapes), limit=FILE)
    return {"bytes": sum(sizes), "largest": max(sizes)}


def _drawn(generator: torch.Generator, shapes: dict[str, tuple[int, ...]], name: str) -> torch.Tensor:
    return torch.rand(shapes[name], generator=generator)


def reset_peak() -> int:
    """Let the peak begin anew; bytes that are resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def import_on_rank(source: str, parallel: dict[str, Any], run: str | None) -> dict[str, float]:
    """One rank's start from a folder; with `run`, its part of a checkpoint after it."""
    config = ParallelConfig(**parallel)
    layout = make_layout(config, torch.device("cpu"))
    init = InitConfig(source=source)
    model = open_sources(init).model
    assert model is not None
    _warm(config)
    before = reset_peak()
    engine = build_engine(model, config, OptimConfig(), layout, None)
    built, begin, cpu = reset_peak() - before, time.perf_counter(), time.process_time()
    origin = start_weights(engine, init, model, 0)
    seconds, used = time.perf_counter() - begin, time.process_time() - cpu
    peak, kept = _status("VmHWM") - before, _status("VmRSS") - before
    shards = sum(local(tensor).nbytes for tensor in engine.tensors().values())
    if run is not None:
        resolved = {"model": asdict(model), "objective": asdict(ObjectiveConfig()), "data": {}}
        Path(run, "checkpoints").mkdir(parents=True, exist_ok=True)
        saver = Saver(Path(run) / "checkpoints", CheckpointConfig(), resolved, layout.describe())
        saver.begin(TrainState(engine, DataState.start("0" * 8, [1], 0, 1), step=1, origin=origin))
        saver.finish()
    return {"seconds": seconds, "cpu": used, "peak": peak, "kept": kept, "shards": shards, "built": built}


def _warm(config: ParallelConfig) -> None:
    """Load the engine's library, whose own memory is no weights."""
    if config.engine != "fsdp2":
        import deepspeed  # noqa: F401


def export_alone(run: str, out: str, dtype: str, queue: Any) -> None:
    """An export, in a process of its own."""
    torch.set_num_threads(1)
    before, begin, cpu = reset_peak(), time.perf_counter(), time.process_time()
    export(ExportRequest(Path(run), Path(out), None, "mova", None, dtype, None))
    queue.put(
        {
            "seconds": time.perf_counter() - begin,
            "cpu": time.process_time() - cpu,
            "peak": _status("VmHWM") - before,
        }
    )


def same(one: Path, other: Path) -> bool:
    """Whether every file of the four parts has the same tensors, by bytes read in pieces."""
    for part in ("video_dit", "audio_dit", "dual_tower_bridge"):
        mine, theirs = open_files(one / part), open_files(other / part)
        if set(mine.names()) != set(theirs.names()):
            return False
        for name in mine.names():
            count = math.prod(mine.shape(name))
            if not torch.equal(mine.read(name, 0, count), theirs.read(name, 0, count)):
                return False
        if not filecmp.cmp(one / part / "config.json", other / part / "config.json", shallow=False):
            return False
    return True


def measured(root: Path, blocks: int) -> list[tuple[str, str]]:
    """All rows of the record; `root` is emptied as it goes."""
    source, less, run = root / "mova", root / "less", root / "run"
    size, fewer = make_folder(source, model_config(blocks)), make_folder(less, model_config(1, 2))
    rows = [("source", f"{size['bytes'] / GB:.2f} GB in float32, largest tensor {size['largest'] / GB:.3f} GB")]
    for number, (name, (world, parallel, whole)) in enumerate(LAYOUTS.items()):
        at = str(source if whole else less)
        found = on_ranks(world, import_on_rank, at, parallel, str(run) if number == 0 else None)
        worst = max(found, key=lambda one: one["peak"] - one["kept"])
        bound = worst["kept"] + (size if whole else fewer)["largest"]
        rows.append(
            (
                f"import, {name}" + ("" if whole else f", of {fewer['bytes'] / GB:.2f} GB, half as wide"),
                f"peak {worst['peak'] / GB:.2f} GB a rank, bound {bound / GB:.2f} (resident afterwards "
                f"{worst['kept'] / GB:.2f}, of that float32 shards {worst['shards'] / GB:.2f}, + largest tensor); "
                f"{max(one['seconds'] for one in found):.1f} s, "
                f"{max(one['cpu'] for one in found):.1f} CPU s a rank",
            )
        )
        print(*rows[-1], sep=": ", flush=True)
    context = multiprocessing.get_context("spawn")
    for dtype in ("source", "float32", "bfloat16"):
        queue, out = context.SimpleQueue(), root / dtype
        process = context.Process(target=export_alone, args=(str(run), str(out), dtype, queue))
        process.start()
        process.join()
        took = queue.get()
        largest = max(path.stat().st_size for path in out.rglob("*.safetensors"))
        told = ", every tensor and config as in the source" if dtype == "source" and same(source, out) else ""
        rows.append(
            (
                f"export, one process, dtype={dtype}",
                f"peak {took['peak'] / GB:.2f} GB, bound {(largest + size['largest']) / GB:.2f} (largest file "
                f"{largest / GB:.2f} + largest tensor); {took['seconds']:.1f} s, {took['cpu']:.1f} CPU s{told}",
            )
        )
        print(*rows[-1], sep=": ", flush=True)
        shutil.rmtree(out)
    return rows


def run(call: Call[WeightsBench]) -> None:
    """Measure and write the record."""
    bench = call.config
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        rows = measured(Path(folder), bench.blocks)
    write_record(
        Path(bench.output) / "weights.md",
        "Weights in and out: memory and time",
        call.command,
        rows,
        NOTES,
    )


NOTES = (
    "Peaks are of resident memory over what the process had before (libraries, process group), from VmHWM. Files lie "
    "in the page cache, partly or wholly. An import reads headers and configs, builds the engine without drawing "
    "anything, and reads each rank's ranges (timed). What ZeRO holds beside its float32 shards is "
    "DeepSpeed's own (weights that compute, buffers for gradients). An export reads a checkpoint of four ranks."
)

PROGRAM = Program(
    "weights", __doc__, run, schema=Schema("bench_weights", WeightsBench, ()), command="python -m bench.train.weights"
)

if __name__ == "__main__":
    PROGRAM.start()
