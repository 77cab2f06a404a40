"""The check of a GPU, rehearsed on the CPU: every part comes to its end, and one that fails is recorded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.bench.gpu import GpuBench, Record, measure
from tools.bench.gpu_parts import PARTS, REHEARSAL, TRUE, ResultRow, attention_forwards

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_all_parts_come_to_their_end_on_the_cpu(tmp_path):
    command = [sys.executable, "-m", "tools.bench.gpu", "rehearse=true", f"output={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    page = (tmp_path / "gpu-rehearsal.md").read_text()
    assert done.returncode == 0, page + done.stderr
    assert "no GPU was measured" in page and "GPU: not measured" in page and "Nothing failed." in page
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert list(dict.fromkeys(row.split(" | ")[0][2:] for row in rows[1:])) == list(PARTS)  # in this order
    assert "losses differ by 0.0e+00" in page
    forwards = {
        kind: row.split(" attention forwards")[0].split()[-1]
        for kind in ("none", "selective", "full")
        for row in rows
        if f"recompute {kind}, compile none" in row
    }
    assert forwards == {"none": "4", "selective": "4", "full": "8"}


def test_without_a_gpu_it_says_what_can_be_done(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench.gpu", f"output={tmp_path}"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 1 and not list(tmp_path.glob("*.md"))
    assert "error: no GPU found; rehearse=true does the same" in done.stderr


def test_a_part_that_fails_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch):
    def breaks(sizes, device):
        yield ResultRow("first", "1")
        raise RuntimeError("out of | memory\nmore")

    def wrong(sizes, device):
        yield ResultRow("second", "far off", False)

    monkeypatch.setitem(PARTS, "breaks", breaks)
    monkeypatch.setitem(PARTS, "wrong", wrong)
    record = Record(tmp_path / "page.md", "title", "command")
    measure(record, ["breaks", "wrong"], REHEARSAL, CPU, 60.0)
    page = (tmp_path / "page.md").read_text()
    assert record.failed == ["breaks: failed", "wrong: second"] and "2 failed." in page
    assert "RuntimeError: out of \\| memory |" in page and "Traceback" in page and "| far off | FAILED |" in page


def test_no_part_begins_when_the_time_is_over(tmp_path):
    record = Record(tmp_path / "page.md", "title", "command")
    measure(record, ["versions", "run"], REHEARSAL, CPU, -1.0)
    assert record.failed == ["versions: failed", "run: failed"]
    assert (tmp_path / "page.md").read_text().count("not run: out of time") == 2


def test_the_true_shapes_are_those_of_the_model():
    shapes = {(queries, keys) for _, queries, keys, _, _ in TRUE.shapes}
    assert {(43_120, 43_120), (5_390, 512), (403, 43_120)} <= shapes
    assert any(queries == 1 for queries, _ in shapes) and any(queries % 2 and keys % 2 for queries, keys in shapes)
    frames, rows, columns = TRUE.grid
    assert frames * rows * columns == 43_120 == 8 * 5_390


def test_forwards_are_counted_where_they_are_computed():
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert attention_forwards(lambda: attend(q, q, q).sum().backward(), compiled=False) == 1
    assert attention_forwards(lambda: attend(q, q, q).sum().backward(), compiled=True) == 1


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="parts=\\['speed'\\]: unknown; choose from versions"):
        GpuBench(parts=["speed"])
