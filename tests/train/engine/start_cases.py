"""What ranks do in test_start.py: engines with their starting weights, and what a start draws."""

from pathlib import Path
from unittest import mock

import torch

import model.init
from tests.train import cases, runs
from tests.train.engine.zero_cases import whole
from train.engine.engine import build_engine
from train.parallel.mesh import ParallelConfig, make_layout

SMALL_BLOCK = 100  # elements: two rows of most of the tiny model's weights, so that shards end within blocks
SEED = 12


def weights(**parallel) -> dict[str, torch.Tensor]:
    """The starting weights of an engine, whole."""
    settings = ParallelConfig(**parallel)
    layout = make_layout(settings, torch.device("cpu"))
    with mock.patch.object(model.init, "BLOCK", SMALL_BLOCK):
        engine = build_engine(cases.tiny_config(), settings, cases.OPTIM, layout, seed=SEED)
    return {key.removeprefix("model."): value for key, value in whole(engine).items() if key.startswith("model.")}


def drawn_by_runs(root: Path, data: Path) -> dict[str, tuple[int, dict]]:
    """Normal numbers that a fresh start, a resumed one and one from other weights draw, and how each ended."""
    first = root / "first"
    found = {}
    for name, run_id, more in (
        ("fresh", "first", ["steps=1"]), ("resumed", "first", ["steps=2"]),
        ("from weights", "other", ["steps=1", f"init.source={first}"]),
        ("zero from weights", "zero", ["steps=1", f"init.source={first}", "parallel=zero2"]),
    ):  # fmt: skip
        real, count = model.init._normals, 0

        def counted(stream, shape, start, stop, real=real):
            nonlocal count
            count += stop - start
            return real(stream, shape, start, stop)

        with mock.patch.object(model.init, "_normals", counted):
            outcome = runs.train(root, data, run_id, "validation.every=0", *more)
        found[name] = (count, outcome)
    return found
