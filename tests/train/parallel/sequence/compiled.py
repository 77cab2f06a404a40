"""What the ranks of test_compiled.py do: steps of compiled models, and their gradients beside those of one process."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from data.clip import Bucket
from model.block import Block
from model.joint import JointConfig
from tests.train import cases
from tests.train.parallel import parity
from tools.bench.step import make_batch
from train.objective.noise import Prepared
from train.objective.objective import Objective, loss_share
from train.parallel import parallelize
from train.parallel.mesh import ParallelConfig
from train.parallel.parallelize import compiled_graphs, eager_units
from train.parallel.recompute import shape_of, units
from train.parallel.sequence import ring, ulysses
from train.step import forward_backward

# Latent frames, height, width; steps of sound: 15, 12, 9 video tokens, which two and four ranks do not all divide, in
# frames that their borders cut.
BUCKETS = [(3, 2, 10, 9), (2, 4, 6, 13), (3, 2, 6, 21)]
SLOTS = 4


def counting(ran: Counter[str]) -> None:
    """Make a backend of torch.compile of the name "counting": aot_eager, whose graphs are counted as they run."""

    def compiler(kind: str) -> Any:
        def compile_graph(module: torch.fx.GraphModule, _: Any) -> Any:
            def run(*given: Any) -> Any:
                ran[kind] += 1
                return module.forward(*given)

            return make_boxed_func(run)

        return compile_graph

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backend = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
    torch._dynamo.backends.registry._COMPILER_FNS["counting"] = backend
    torch._dynamo.backends.registry._BACKENDS["counting"] = None


@contextmanager
def calls_counted() -> Iterator[Counter[str]]:
    """Exchanges of Ulysses and rotations of a ring, in eager mode and in a graph."""
    calls: Counter[str] = Counter()
    exchange, rotate = ulysses.dist.all_to_all_single, ring._start_rotation

    def exchanged(*given: Any, **options: Any) -> Any:
        calls["all_to_all"] += 1
        return exchange(*given, **options)

    def rotated(*given: Any) -> Any:
        calls["rotations"] += 1
        return rotate(*given)

    with patch.object(ulysses.dist, "all_to_all_single", exchanged), patch.object(ring, "_start_rotation", rotated):
        yield calls


@contextmanager
def compiled_shapes(shapes: tuple[str, ...]) -> Iterator[None]:
    """While entered, a model is compiled in units of these shapes only."""

    def some(model: Any) -> Any:
        names = {module: name for name, module in model.named_modules()}
        return [unit for unit in units(model) if shape_of(names[unit]) in shapes]

    with patch.object(parallelize, "units", some):
        yield


def a_step_of_each(
    settings: dict[str, int],
    kind: str,
    shapes: tuple[str, ...],
    backend: str = "counting",
    dtype: str = "float64",
    buckets: int = len(BUCKETS),
    heads: int = 3,
) -> dict[str, Any]:
    """One forward and backward of each of the first `buckets`: the largest relative error of a gradient in it against
    one process that computes in float64, that of one process that computes in `dtype` (rounding), and counts.

    made, ran: graphs until then, and in it; calls: of `calls_counted`; eager: units without a graph; blocks: of the
    video tower; active: units of `shapes` that run.
    """
    ran: Counter[str] = Counter()
    counting(ran)
    parallel = ParallelConfig(compute_dtype=dtype, recompute=kind, compile=backend, **settings)
    with compiled_shapes(shapes):
        return _steps(parallel, ran, BUCKETS[:buckets], parity.config_of(heads))


def _steps(
    parallel: ParallelConfig, ran: Counter[str], buckets: list[tuple[int, int, int, int]], config: JointConfig
) -> dict[str, Any]:
    model, layout = cases.sharded_model(config, parallel)
    objective = Objective(parity.OBJECTIVE, config.experts)
    found: dict[str, Any] = {"errors": [], "rounding": [], "made": [], "ran": [], "calls": [], "eager": []}
    for number, (frames, height, width, sound) in enumerate(buckets):
        bucket = Bucket(frames, height, width, sound, 24.0, has_video=True, has_audio=True)
        whole = make_batch(config, SLOTS, number, objective, bucket)
        mine = cases.my_micro_batches(Prepared(whole.batch, cases.convert(whole.draws, layout.compute)), layout, SLOTS)
        ran.clear()
        with calls_counted() as calls:
            forward_backward(model, mine, parity.OBJECTIVE, "high", layout)
        true, rounded = (_of_one_process(config, whole, kind) for kind in (torch.float64, layout.compute))
        held = cases.full({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        found["errors"].append(cases.worst(held, true))
        found["rounding"].append(cases.worst(rounded, true))
        model.zero_grad()
        for key, value in (("made", compiled_graphs()), ("ran", dict(ran)), ("calls", dict(calls))):
            found[key].append(value)
        found["eager"].append(eager_units(model))
    idle = {id(module) for module in model.video_dit_2.modules()}
    found["active"] = sum(id(unit) not in idle for unit in parallelize.units(model))
    found["blocks"] = len(model.video_dit.blocks)
    return found


def _of_one_process(config: JointConfig, whole: Prepared, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Gradients of the plain model, all of it in this dtype."""
    plain = cases.reference_model(config, dtype)
    whole = Prepared(whole.batch, cases.convert(whole.draws, dtype))
    forward_backward(plain, [whole], parity.OBJECTIVE, "high", cases.ONE_PROCESS)
    return {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}


def not_compiled() -> dict[str, Any]:
    """Units without a graph after a step in which torch.compile was turned off, and the error of a unit that torch
    would break into pieces."""
    counting(Counter())
    config, parallel = parity.config_of(3), ParallelConfig(compute_dtype="float64", compile="counting")

    def step() -> Any:
        model, layout = cases.sharded_model(config, parallel)
        batches = parity.micro_batches(0, 1, layout.dp_rank, layout.dp_world, torch.float64)
        forward_backward(model, batches[:1], parity.OBJECTIVE, "high", layout)
        return model

    with torch._dynamo.config.patch(disable=True):
        model = step()
    found = {"eager": eager_units(model), "units": len(units(model)), "error": ""}
    whole = Block.forward

    def in_pieces(block: Block, *given: Any) -> Any:
        torch._dynamo.graph_break()
        return whole(block, *given)

    with patch.object(Block, "forward", in_pieces):
        try:
            step()
        except torch._dynamo.exc.Unsupported as error:
            found["error"] = str(error)
    return found


def many_buckets(settings: dict[str, int], kind: str, shapes: tuple[str, ...]) -> dict[str, Any]:
    """Graphs after each step: ten buckets, of one and of two clips in turn, a visit of validation behind each."""
    geometries = [
        (2, 4, 4, 9), (3, 4, 4, 13), (2, 6, 4, 9), (5, 2, 8, 21), (2, 8, 2, 9), (4, 4, 6, 17), (3, 2, 2, 13),
        (6, 4, 4, 25), (2, 10, 4, 9), (7, 2, 4, 30),
    ]  # fmt: skip
    counting(Counter())
    parallel = ParallelConfig(compute_dtype="float64", recompute=kind, compile="counting", **settings)
    config = parity.config_of(3)
    with compiled_shapes(shapes):
        model, layout = cases.sharded_model(config, parallel)
    objective, graphs = Objective(parity.OBJECTIVE, config.experts), []
    for number, (frames, height, width, sound) in enumerate(geometries * 2):
        bucket = Bucket(frames, height, width, sound, 24.0, has_video=True, has_audio=True)
        batches = [make_batch(config, 1 + number % 2, number, objective, bucket)]
        forward_backward(model, batches, parity.OBJECTIVE, ("high", "low")[number // 2 % 2], layout)
        with torch.no_grad():
            loss_share(model, batches[0].batch, batches[0].draws, parity.OBJECTIVE, "high")
        graphs.append(compiled_graphs())
    return {"graphs": graphs, "buckets": len(geometries)}
