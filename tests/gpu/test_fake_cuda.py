"""Every part of a run on a GPU that is not there (tests/gpu/fakecuda.py): nothing waits for the device, moves between
host and device, or mixes both, but for what tests/gpu/accepted.yaml lists with a reason.

A finding that is new: mend it, or list it there. `python -m tests.gpu.cases out.json` shows all, with every operator.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from tests.child import run_child
from tests.gpu.cases import CASES

ROOT = Path(__file__).parents[2]
ACCEPTED = Path(__file__).parent / "accepted.yaml"
PLANTED = [name for name in CASES if name.startswith("planted")]
PARTS = [name for name in CASES if name not in (*PLANTED, "choices")]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Of all cases, in a process of their own: what they replace in torch stays there."""
    path = tmp_path_factory.mktemp("gpu") / "reports.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.gpu.cases", path]
    run_child(command, cwd=ROOT, env=environment)
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def accepted():
    entries = yaml.safe_load(ACCEPTED.read_text())
    assert all(entry["why"] for entry in entries)
    return {
        (entry["kind"], entry.get("what", ""), entry["where"]): entry.get("most", float("inf")) for entry in entries
    }


def unknown(report: dict, accepted: dict) -> list[str]:
    """What a case found that is not accepted, or more often than it is."""
    assert "error" not in report, report["error"]
    times: dict[tuple, int] = {}
    lines: dict[tuple, set[str]] = {}
    for kind, what, where, line, count in [*report["found"], *report["once"]]:
        key = (kind, what, where)
        times[key] = max(times.get(key, 0), count) if kind == "float64" else times.get(key, 0) + count
        lines.setdefault(key, set()).add(line)
    return [
        f"{' '.join(key)}: {count}, accepted {accepted.get(key, 0)}: {' | '.join(sorted(lines[key]))}"
        for key, count in times.items()
        if count > accepted.get(key, 0)
    ]


@pytest.mark.parametrize("name", PARTS)
def test_nothing_new_waits_for_the_device_or_moves_between_the_two(reports, accepted, name):
    assert unknown(reports[name], accepted) == []


def test_what_is_accepted_is_still_there(reports, accepted):
    found = {tuple(f[:3]) for name in PARTS for part in ("found", "once") for f in reports[name][part]}
    assert accepted.keys() - found == set()


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        ("item", ("sync", "_local_scalar_dense", "model/tower.py:Tower.project")),
        ("cpu", ("copy", "cuda to cpu, waiting", "model/tower.py:Tower.project")),
        ("mixed", ("mixed", "aten.add.Tensor", "model/tower.py:Tower.project")),
        ("float64", ("float64", "", "model/tower.py:Tower.project")),
    ],
)
def test_a_fault_in_the_forward_is_seen(reports, accepted, fault, seen):
    found = unknown(reports[f"planted {fault}"], accepted)
    assert any(text.startswith(" ".join(seen) + ": ") for text in found)
    assert len(found) == 1 or fault == "float64"  # which backward has as well


def test_backwards_are_really_called(reports):
    def of(operator: str) -> str:
        return f"GeneratedBackwardFor_mova_sequence_{operator}_defaultBackward"

    exchanges = {of("send_heads"), of("receive_heads"), of("tokens_for_heads"), of("merge")}
    expected = {
        "step, ulysses and replicas": exchanges,
        "step, more ranks than heads": exchanges,
        "step, ring and pooled frames": exchanges | {of("ring"), of("frames")},
        "step, recomputed": exchanges,
        "step": {"ScaledDotProductCudnnAttentionBackward0"},
        "step in float32": {"ScaledDotProductEfficientAttentionBackward0"},
    }
    for name, functions in expected.items():
        assert functions <= reports[name]["calls"].keys(), name


def test_a_step_uses_few_operators_for_the_averages_and_the_update(reports):
    """Their number follows from the parts of the model, not from its parameters."""
    plain, averaged = reports["step"]["ops"], reports["step, ulysses and replicas"]["ops"]
    assert plain["aten._fused_adamw_.default"] <= 2
    foreach = [f"aten._foreach_{name}" for name in ("sub.List", "mul_.Tensor", "add_.List")]
    assert all(1 <= averaged[name] <= 4 for name in foreach)
    assert "aten.lerp_.Tensor" not in averaged


def test_compute_is_what_all_gpus_have(reports):
    found = reports["choices"]["choices"]
    assert found["H100"] == "torch.bfloat16 (auto: every GPU has compute capability 8.0 or more)" == found["A100"]
    assert found["T4"] == "torch.float32 (auto: a GPU has a compute capability below 8.0)"
    assert found["asked"] == "torch.float32 ()"
    for name, dtype, size in (("ring", "float32", 2), ("float64", "float64", 2), ("T4, tokens shared", "float32", 2)):
        assert found[name].startswith(
            f"error: parallel.compute_dtype={dtype} with parallel.ring x parallel.ulysses = {size} "
        )
        assert "set parallel.compute_dtype=bfloat16" in found[name] and "\n" not in found[name]
