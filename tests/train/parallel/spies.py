"""What the ranks of test_attention_choice.py do: models whose attention is watched, or that of a stand-in package."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.backends.choice import Choice
from model.backends.flash import FlashPackage
from model.backends.sdpa import Sdpa
from model.sampler import SamplerConfig, sample
from tests.model import flash_packages
from tests.train import cases
from tests.train.parallel import parity
from train.generate import WholeField
from train.objective.objective import loss_share
from train.parallel import mesh
from train.parallel.mesh import ParallelConfig
from train.parallel.sequence.operators import BODIES, run_body


class Spy(Sdpa):
    """Computes as torch does and counts; `inside` while it does."""

    def __init__(self) -> None:
        super().__init__("sdpa")
        self.calls = {"whole": 0, "part": 0, "backward of a part": 0}
        self.inside = 0

    def __call__(self, q: Any, k: Any, v: Any) -> Any:
        return self._count("whole", super().__call__, q, k, v)

    def with_lse(self, q: Any, k: Any, v: Any) -> Any:
        return self._count("part", super().with_lse, q, k, v)

    def backward(self, *given: Any) -> Any:
        return self._count("backward of a part", super().backward, *given)

    def _count(self, what: str, function: Any, *given: Any) -> Any:
        self.calls[what] += 1
        self.inside += 1
        try:
            return function(*given)
        finally:
            self.inside -= 1


class Elsewhere(TorchDispatchMode):
    """Counts kernels of attention that run outside of the spy. Autograd calls the backward of what the spy did."""

    def __init__(self, spy: Spy) -> None:
        super().__init__()
        self.spy, self.forwards, self.backwards = spy, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in BODIES:
            return run_body(self, func, args, kwargs)
        name = func.overloadpacket.__name__
        if ("attention" in name or name == "_softmax") and not self.spy.inside:
            self.backwards += "backward" in name
            self.forwards += "backward" not in name
        return func(*args, **kwargs or {})


def watched(parallel: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Calls of the spy, and of kernels elsewhere, in a training step, a validation and two steps of the sampler."""
    spy = Spy()
    with patch.object(mesh, "choose", lambda *_: Choice(spy)):
        model, layout = cases.sharded_model(cases.tiny_config(2, pooled_adaln=True), ParallelConfig(**parallel))
    prepared = cases.my_micro_batches(cases.global_batch(0, torch.float32), layout, 4)[0]
    batch, draws = prepared.batch, prepared.draws
    size = layout.sequence.size

    def validation() -> None:
        with torch.no_grad():
            loss_share(model, batch, draws, cases.OBJECTIVE, "high", size)

    def sampler() -> None:
        config = SamplerConfig(2, "euler", 5.0, 5.0, boundary=900.0)
        sample(
            WholeField(model, layout), config, draws.noise_video, draws.noise_audio,
            batch.condition.float(), batch.text.float(), batch.empty_text.float(),
        )  # fmt: skip

    found = {}
    for name, work in (
        ("training", lambda: cases.backward(model, [prepared], 0, layout)), ("validation", validation),
        ("sampler", sampler),
    ):  # fmt: skip
        spy.calls = dict.fromkeys(spy.calls, 0)
        with Elsewhere(spy) as elsewhere:
            work()
        found[name] = {**spy.calls, "forwards": elsewhere.forwards, "backwards": elsewhere.backwards}
    return found


def with_package(folder: Path, package: str, case: parity.Case) -> dict[str, Any]:
    """`parity.compare` with a stand-in package as the backend; "calls" of it, and how many "forwards"."""
    backend = FlashPackage(package.split()[-1], deterministic=True)
    place = flash_packages.write(folder / package, package)
    with flash_packages.importable(place), patch.object(mesh, "choose", lambda *_: Choice(backend)):
        result = parity.compare(folder, case)
    calls = [*flash_packages.CALLS]
    asked = {options["deterministic"] for _, options in calls}
    kinds = [kind for kind, _ in calls]
    return result | {"calls": {*kinds}, "forwards": kinds.count("forward"), "deterministic": asked}
