"""Speed of MOVA's VAEs on this machine: seconds, FLOPs by formula, rate, memory of the device.

    python -m bench.data.encoders frames=5 height=64 width=64 seconds=1        # a CPU: random weights of the true sizes
    python -m bench.data.encoders folder=MOVA-360p device=cuda frames=193 height=352 width=640 seconds=8.05
    python -m bench.data.encoders variants=true name=variants      # channels-last weights and torch.compile beside it

On a CPU processor time of one thread is counted, on a GPU the wall time of the second run. Writes
bench/results/encoders.md (with `name`, encoders-NAME.md).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from core.compose import Schema
from core.program import Call, Program
from core.ranges import bounded
from data.codec import Codecs, EncoderConfig
from data.codec.mova.dac import Dac, DacConfig
from data.codec.mova.flops import condition_flops, decode_flops, encode_flops
from data.codec.mova.video import MovaVideo
from tools.bench.record import write_record


@dataclass
class EncodersBench:
    """The clip, the weights and the device of the measurement.

    folder: of the weights; "": random ones of the true sizes (2 GB, for the time of the measurement)
    device: cpu or cuda
    dtype: of the video VAE, as encoder.video_dtype
    frames: of the clip, 1 + 4k
    height: pixels
    width: pixels
    seconds: of sound
    variants: also encode the pictures with channels-last weights, and compiled; the rest is left out
    hours: of clips, for the estimate
    assumed: TFLOP/s of a GPU, for the estimate
    name: of the record; "": none
    output: folder of the record
    """

    folder: str = ""
    device: str = "cpu"
    dtype: str = "float32"
    frames: int = bounded(5, "[1, inf)")
    height: int = bounded(64, "[8, inf)")
    width: int = bounded(64, "[8, inf)")
    seconds: float = bounded(1.0, "(0, inf)")
    variants: bool = False
    hours: float = bounded(61500.0, "(0, inf)")
    assumed: float = bounded(300.0, "(0, inf)")
    name: str = ""
    output: str = "bench/results"


def random_weights(folder: Path) -> None:
    """Video and audio VAE of the released sizes, as a MOVA folder (2 GB)."""
    from diffusers import AutoencoderKLWan

    kind: Any = AutoencoderKLWan
    model = kind()
    model.save_pretrained(folder / "video_vae")
    (folder / "audio_vae").mkdir()
    dac = Dac(DacConfig())
    save_file(dac.state_dict(), folder / "audio_vae" / "diffusion_pytorch_model.safetensors")
    (folder / "audio_vae" / "config.json").write_text(json.dumps({"continuous": True, **asdict(dac.config)}))


def timed(call: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    """(seconds, result) of a call."""
    if device == "cpu":
        begin = time.process_time()
        found = call()
        return time.process_time() - begin, found
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    found = call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin, found


def measure(bench: EncodersBench, folder: Path) -> list[tuple[str, str]]:
    """The rows of the table."""
    encoder = EncoderConfig("mova", "mova", "builtin", str(folder), video_dtype=bench.dtype)
    codecs = Codecs(encoder, bench.device)
    size = (bench.frames, bench.height, bench.width)
    pixels = torch.rand(1, 3, *size) * 2 - 1
    wave = torch.randn(1, round(bench.seconds * codecs.audio.sample_rate)) * 0.1
    codecs.video.encode(pixels[:, :, :1])  # reads the weights
    codecs.audio.encode(wave[:, :960])
    rows: list[tuple[str, str]] = []
    memory = codecs.video.memory
    latents = sound = torch.zeros(0)

    def row(what: str, call: Callable[[], Tensor], flops: float | None) -> Tensor:
        seconds, found = timed(call, bench.device)
        text = f"{seconds:.2f} s"
        if flops is not None:
            text += f"; {flops / 1e12:,.3f} TFLOP by formula, {flops / seconds / 1e12:,.3f} TFLOP/s"
        rows.append((what, text))
        return found

    clip = f"{bench.frames} frames of {bench.height} x {bench.width}"
    latents = row(f"encode {clip}", lambda: codecs.video.encode(pixels), encode_flops(*size))
    row("their condition", lambda: codecs.video.encode_condition(pixels[:, :, 0], bench.frames),
        condition_flops(*size, memory))  # fmt: skip
    row("decode them", lambda: codecs.video.decode(latents), decode_flops(*size))
    sound = row(f"encode {bench.seconds:g} s of sound", lambda: codecs.audio.encode(wave), None)
    row("decode it", lambda: codecs.audio.decode(sound), None)
    if bench.device != "cpu":
        rows.append(("memory of the device at most", f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"))
    rows += counted(193, 352, 640)
    full = encode_flops(193, 352, 640) + condition_flops(193, 352, 640, memory)
    clips = bench.hours * 3600 / (193 / 24)
    hours = clips * full / (bench.assumed * 1e12) / 3600
    rows.append((
        f"predicted: {bench.hours:,.0f} hours of clips of 193 frames at 352 x 640, picture and condition",
        f"{clips * full:.2e} FLOP, {hours:,.0f} GPU-hours at an assumed {bench.assumed:g} TFLOP/s",
    ))  # fmt: skip
    return rows


def counted(frames: int, height: int, width: int) -> list[tuple[str, str]]:
    """Rows: FLOPs that torch counts on tensors without memory, beside the formula's, and those of the clip's sound."""
    from diffusers import AutoencoderKLWan

    kind: Any = AutoencoderKLWan
    with torch.device("meta"), torch.no_grad():
        vae, dac = kind(), Dac(DacConfig())
        pixels = torch.empty(1, 3, frames, height, width)
        latents = torch.empty(1, 16, 1 + (frames - 1) // 4, height // 8, width // 8)
        wave = torch.empty(1, 48000 * frames // 24)
        calls = (
            ("encode", lambda: vae.encode(pixels), encode_flops(frames, height, width)),
            ("decode", lambda: vae.decode(latents), decode_flops(frames, height, width)),
            ("encode the sound", lambda: dac.encode(wave), None),
        )
        rows = []
        for what, call, formula in calls:
            with FlopCounterMode(display=False) as counter:
                call()
            text = f"{counter.get_total_flops() / 1e12:,.3f} TFLOP"
            text += f"; {formula / 1e12:,.3f} by formula" if formula is not None else ""
            rows.append((f"counted: {what}, {frames} frames of {height} x {width}", text))
    return rows


def compare(bench: EncodersBench, folder: Path) -> list[tuple[str, str]]:
    """Rows: what the video VAE encodes with plain weights, with channels-last ones and compiled, and how far apart."""
    codec = Codecs(EncoderConfig("mova", folder=str(folder), video_dtype=bench.dtype), bench.device).video
    assert isinstance(codec, MovaVideo)
    pixels = torch.rand(1, 3, bench.frames, bench.height, bench.width) * 2 - 1
    flops = encode_flops(bench.frames, bench.height, bench.width)
    rows: list[tuple[str, str]] = []

    def row(what: str) -> Tensor:
        begin = time.perf_counter()
        first = codec.encode(pixels)  # reads the weights, or compiles
        before = time.perf_counter() - begin
        seconds, found = timed(lambda: codec.encode(pixels), bench.device)
        plain = found if not rows else expected
        error = float((first - plain).norm() / plain.norm())
        rows.append((what, f"{seconds:.2f} s, {flops / seconds / 1e12:,.3f} TFLOP/s; first call {before:.0f} s (wall); "
                           f"relative difference {error:.1e}"))  # fmt: skip
        return found

    expected = row(f"encode {bench.frames} frames of {bench.height} x {bench.width}")
    model = codec._model
    convolutions = [one for one in model.parameters() if one.ndim == 5]
    for one in convolutions:
        one.data = one.data.to(memory_format=torch.channels_last_3d)
    row("with channels-last weights")
    for one in convolutions:
        one.data = one.data.contiguous()
    model.encoder.compile()
    row("with torch.compile")
    return rows


def run(call: Call[EncodersBench]) -> None:
    """Measure and write the record."""
    bench = call.config
    torch.set_num_threads(1)
    with nullcontext(bench.folder) if bench.folder else tempfile.TemporaryDirectory() as folder:
        if not bench.folder:
            random_weights(Path(folder))
        rows = (compare if bench.variants else measure)(bench, Path(folder))
    path = Path(bench.output) / f"encoders{'-' if bench.name else ''}{bench.name}.md"
    weights = f"weights of {bench.folder}" if bench.folder else "random weights of the true sizes"
    notes = (
        f"Precision {bench.dtype}; {weights}. "
        + ("Processor seconds of one thread. " if bench.device == "cpu" else "Wall seconds of the second call. ")
        + ("" if bench.variants else "The last row is predicted, at a rate that is assumed. ")
        + ("" if bench.variants else "UMT5-XXL (11 GB) is not measured.")
    )
    write_record(path, "MOVA's encoders: what a clip costs", call.command, rows, notes)


PROGRAM = Program(
    "encoders",
    __doc__,
    run,
    schema=Schema("bench_encoders", EncodersBench, ()),
    command="python -m bench.data.encoders",
)

if __name__ == "__main__":
    PROGRAM.start()
