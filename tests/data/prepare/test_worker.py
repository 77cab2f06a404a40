"""A worker process computes with one thread, whatever its parent was told: threads don't survive its fork."""

import os
from typing import Any

import psutil
import pytest

from data.prepare.pipeline import PipelineConfig
from data.prepare.worker import THREADS, Worker


def idle(config: PipelineConfig) -> Any:
    """No pipeline: the worker is only looked at."""


def test_workers_are_told_to_use_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    worker = Worker(PipelineConfig.__new__(PipelineConfig), idle)
    try:
        seen = psutil.Process(worker.process.pid).environ()
        assert {name: seen.get(name) for name in THREADS} == dict.fromkeys(THREADS, "1")
        assert os.environ["OMP_NUM_THREADS"] == "7" and "OPENBLAS_NUM_THREADS" not in os.environ
    finally:
        worker.process.kill()
