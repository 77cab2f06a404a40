"""The sheet of one kind of GPU: memory, rates of kernels and links, each with its source (conf/gpu/NAME.yaml).

A rate is [low, middle, high]: what public measurements span. `mova bench matmul`, `attention` and `exchange` with
`sheet=PATH` measure the machine that they run on and write such a sheet together; `read_sheet` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.errors import UserError
from core.keys import nearest
from core.ranges import bounded, to_object

RATES = ("low", "middle", "high")


@dataclass
class GpuConfig:
    """One kind of GPU, or the CPU of a machine that was measured, with the links of its node.

    Rates are [low, middle, high], from the slowest to the fastest: what was measured, never a peak. A node is what the
    fast links connect: 8 GPUs of a host, a pair under one bridge, or the 72 GPUs of a rack of many hosts.

    device: "cuda", or "cpu": the kernels that torch runs there are counted
    title: its name, as torch.cuda.get_device_name gives it
    memory_gib: GiB that a process can allocate
    peak_tflops: peak of dense bfloat16 products, TFLOP/s, by which MFU is counted
    float8_tflops: peak of dense float8 products, TFLOP/s (null: has none)
    gemm_tflops: large bfloat16 products, TFLOP/s
    float8_gemm_tflops: large products with parallel.linear=float8, the casts of their operands included, TFLOP/s (null:
        unknown)
    attention_tflops: forward of attention over thousands of tokens, head width 128, not causal, TFLOP/s
    attention_backward_tflops: its backward
    memory_gb_s: memory-bound kernels, reads and writes together, GB/s
    launch_us: least time of a kernel on the device, microseconds
    host_us: host time of one operator run eagerly, microseconds
    node_gpus: GPUs of a node that the fast links connect
    node_gb_s: one GPU to the others of its node, one direction, GB/s
    network_gb_s: a node to other nodes, one direction, all its adapters together, GB/s
    latency_us: of one collective, microseconds
    host_gb_s: one GPU to or from page-locked memory of its host, one direction, while the others of the node copy too,
        GB/s
    host_gib: host memory of a node, GiB
    sources: {key: where its value comes from; "assumed: why" where nobody has published one}

    ValueError for a rate that is not three values from the slowest to the fastest, and for the source of a key that
    there is not.
    """

    device: str = "cuda"
    title: str = MISSING
    memory_gib: float = bounded(MISSING, "(0, inf)")
    peak_tflops: float = bounded(MISSING, "(0, inf)")
    float8_tflops: float | None = bounded(None, "(0, inf)")
    gemm_tflops: list[float] = bounded(MISSING, "(0, inf)")
    float8_gemm_tflops: list[float] | None = bounded(None, "(0, inf)")
    attention_tflops: list[float] = bounded(MISSING, "(0, inf)")
    attention_backward_tflops: list[float] = bounded(MISSING, "(0, inf)")
    memory_gb_s: list[float] = bounded(MISSING, "(0, inf)")
    launch_us: list[float] = bounded(MISSING, "(0, inf)")
    host_us: list[float] = bounded(MISSING, "(0, inf)")
    node_gpus: int = bounded(MISSING, "[1, inf)")
    node_gb_s: list[float] = bounded(MISSING, "(0, inf)")
    network_gb_s: list[float] = bounded(MISSING, "(0, inf)")
    latency_us: list[float] = bounded(MISSING, "(0, inf)")
    host_gb_s: list[float] = bounded(MISSING, "(0, inf)")
    host_gib: float = bounded(MISSING, "(0, inf)")
    sources: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.device not in ("cuda", "cpu"):
            raise ValueError(f"device {self.device!r} is neither cuda nor cpu")
        for name in Rates.__dataclass_fields__:
            if (given := getattr(self, name)) is None:
                continue
            values = [float(value) for value in given]
            if len(values) != len(RATES) or values != sorted(values, reverse=is_time(name)):
                raise ValueError(
                    f"{name} is {values}; give [low, middle, high], from the slowest to the fastest"
                    f"{', so from the longest time to the shortest' if is_time(name) else ''}"
                )
        known = {one.name for one in fields(self)}
        for name in self.sources:
            if name not in known:
                raise ValueError(f"sources.{name}: there is no key {name}{nearest(name, sorted(known))}")

    @staticmethod
    def rate_names() -> list[str]:
        """The keys that hold [low, middle, high]."""
        return list(Rates.__dataclass_fields__)

    def at(self, rate: str) -> Rates:
        """The rates at "low", "middle" or "high"."""
        place = RATES.index(rate)
        found: dict[str, Any] = {}
        for name in Rates.__dataclass_fields__:
            values = getattr(self, name)
            found[name] = None if values is None else float(values[place])
        return Rates(**found)


@dataclass(frozen=True)
class Rates:
    """One value of each rate; units as of GpuConfig."""

    gemm_tflops: float
    float8_gemm_tflops: float | None
    attention_tflops: float
    attention_backward_tflops: float
    memory_gb_s: float
    launch_us: float
    host_us: float
    node_gb_s: float
    network_gb_s: float
    latency_us: float
    host_gb_s: float


MEASURED_BY = {  # the program of `mova bench` that writes a key
    "title": "matmul", "memory_gib": "matmul", "peak_tflops": "matmul", "gemm_tflops": "matmul",
    "memory_gb_s": "matmul", "launch_us": "matmul", "host_us": "matmul", "host_gib": "matmul",
    "host_gb_s": "matmul",
    "attention_tflops": "attention", "attention_backward_tflops": "attention",
    "node_gpus": "exchange", "node_gb_s": "exchange", "network_gb_s": "exchange", "latency_us": "exchange",
}  # fmt: skip


def is_time(rate: str) -> bool:
    """Whether a rate is a time, of which the lowest is the fastest."""
    return rate.endswith("_us")


def read_sheet(path: Path) -> GpuConfig:
    """The sheet in a YAML file of the keys of GpuConfig. OSError where it can't be read; UserError, one line with file
    and key, for what is no YAML, an unknown or missing key, a wrong type, a number outside of its range."""
    plain = read_plain(path)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(GpuConfig), plain)
        assert isinstance(merged, DictConfig)
        sheet: GpuConfig = to_object(merged)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise UserError(f"{path}: {_said(error)}") from None
    return sheet


def read_plain(path: Path) -> dict[str, Any]:
    """The keys of a sheet that may lack some. Errors as of read_sheet, but for missing keys, types and ranges."""
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{place}: this is no YAML; a sheet looks like the files of conf/gpu") from None
    if not isinstance(plain, dict):
        raise UserError(f"{path}: a sheet is `key: value` lines, as the files of conf/gpu")
    known = [one.name for one in fields(GpuConfig)]
    for key in plain:
        if key not in known:
            raise UserError(f"{path}: there is no key {key}{nearest(str(key), known)}")
    return plain


def _said(error: Exception) -> str:
    """What is wrong with a sheet, in one line, with the remedy for a key that has not been measured yet."""
    key = str(getattr(error, "full_key", None) or "")
    if isinstance(error, OmegaConfBaseException) and "issing mandatory" in str(error):
        program = MEASURED_BY.get(key)
        return f"{key} is missing; " + (f"mova bench {program} sheet=... measures it" if program else "give it")
    first = str(error).splitlines()[0]
    return first if not key or key in first else f"{key}: {first}"
