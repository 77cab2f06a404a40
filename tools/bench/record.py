"""A measured result as a file: command, hardware, date, and the table."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch


def hardware() -> str:
    """Processor (or GPU), cores and threads, in one line."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"CPU {model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"


def commit() -> str:
    """Short hash of the checkout, or "unknown" outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def write_record(path: Path, title: str, command: str, rows: Sequence[tuple[str, str]], notes: str) -> None:
    """Write one Markdown file with its circumstances and a two-column table, and print the table."""
    lines = [f"# {title}", "", f"- command: `{command}`", f"- hardware: {hardware()}; GPU: not measured"]
    if torch.cuda.is_available():
        lines[-1] = f"- hardware: {hardware()}"
    lines += [f"- commit: {commit()}, torch {torch.__version__}", f"- date: {time.strftime('%Y-%m-%d')}", ""]
    lines += ["| what | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), "", notes, ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))
    print("\n".join(f"{name}: {value}" for name, value in rows) + f"\nwritten to {path}")
