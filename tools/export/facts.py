"""training.json beside exported weights: facts of their training that sampling needs."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from data.dataset.index import DatasetIndex
from data.errors import DataError
from tools.export.request import ExportRequest
from train.checkpoint.checkpoint import step_of
from train.objective.objective import ObjectiveConfig


def training_facts(run: Path, path: Path, state: dict[str, Any], order: ExportRequest) -> dict[str, Any]:
    """Run and step, encoders and buckets of the data, shifts and boundary of the objective, metrics. Facts from
    the data are left empty if the data cannot be opened here."""
    config = state["config"]
    usual, objective = ObjectiveConfig(), config["objective"]
    encoders, buckets = _of_data(config.get("data") or {})
    return {
        "run": run.name,
        "step": step_of(path),
        "weights": "raw" if order.weights == "raw" or not state.get("averages") else "ema",
        "dtype": order.dtype,
        "encoders": state.get("encoders") or encoders,
        "buckets": buckets,
        "shift_video": objective.get("shift_video", usual.shift_video),
        "shift_audio": objective.get("shift_audio", usual.shift_audio),
        "boundary": objective.get("boundary", usual.boundary),
        "origin": state.get("origin") or {},
        "data": _paths(config.get("data") or {}),
    }


def _paths(data: dict[str, Any]) -> list[str]:
    stages = [data.get("datasets") or [], *(segment.get("datasets") or [] for segment in data.get("segments") or [])]
    paths = [data.get("path"), *(dataset.get("path") for stage in stages for dataset in stage)]
    return [path for path in paths if path]


def _of_data(data: dict[str, Any]) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """(fingerprints of the encoders, buckets) of the datasets that can be opened here; fps stands in each bucket."""
    encoders: dict[str, str] = {}
    buckets: list[dict[str, Any]] = []
    for path in _paths(data):
        try:
            with closing(DatasetIndex.open(Path(path) if "://" not in path else path)) as index:
                encoders |= index.encoders
                buckets += [bucket.to_dict() for bucket in index.buckets if bucket.to_dict() not in buckets]
        except (DataError, OSError):
            continue
    return encoders, buckets
