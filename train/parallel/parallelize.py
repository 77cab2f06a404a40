"""Applies parallelism to the model from outside, in this order: precision -> sequence -> recomputation -> compile ->
FSDP2.

DeepSpeed ZeRO (train/engine/zero.py) takes FSDP2's place in that order.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from model.init import initial_part
from model.joint import JointConfig, JointTransformer
from model.tower import Tower
from train.parallel.float8 import convert_linears
from train.parallel.mesh import DTYPES, Layout, ParallelConfig
from train.parallel.parts import AHEAD, ALL, forward_order, freeze, in_backward, small_units
from train.parallel.recompute import choose_kinds, recompute_activations, shape_of, units
from train.parallel.sequence.cores import shard_sequence
from train.parallel.workload import Workload

# Graphs of a piece of code: torch's limit of 8 does not hold training and validation, one clip and several, and the
# attentions of all widths, which share their code where ranks share tokens.
RECOMPILE_LIMIT = 64
# Part of a parameter's value: of (name, whole shape, first element, end) in the order of its memory -> [end - first].
Part = Callable[[str, tuple[int, ...], int, int], Tensor]


def build_model(
    config: JointConfig,
    parallel: ParallelConfig,
    layout: Layout,
    seed: int | None,
    workload: Workload | None = None,
    trained: Collection[str] = ALL,
) -> JointTransformer:
    """The FSDP2 model with its starting weights: built on the meta device, then each rank fills its shards.

    `seed`: of the weights; None leaves them unset, for a checkpoint to fill. `workload`: a rank's largest micro-batch,
    for recompute=budget. `trained`: the towers that are not frozen (train/parallel/parts.py).
    """
    with torch.device("meta"):
        model = JointTransformer(config)
    freeze(model, trained)
    model.to(torch.promote_types(layout.compute, torch.float32))  # master weights
    place_model(model, parallel, layout, workload)
    model.to_empty(device=layout.device)
    if seed is not None:
        fill_weights(model, starting_weights(config, seed))
    return model


def starting_weights(config: JointConfig, seed: int) -> Part:
    """The values of model/init.py for a model."""
    depth, bridge = config.video.num_layers, config.bridge
    return lambda name, shape, start, stop: initial_part(name, shape, start, stop, seed, depth, bridge)


def place_model(
    model: JointTransformer, parallel: ParallelConfig, layout: Layout, workload: Workload | None = None
) -> None:
    """All parallelism on a plain model, in place; its parameters become shards where there are other ranks, whatever
    device they are on."""
    prepare_model(model, parallel, layout, workload)
    shard_model(model, parallel, layout)


def prepare_model(
    model: JointTransformer, parallel: ParallelConfig, layout: Layout, workload: Workload | None = None
) -> None:
    """What comes before an engine shards the parameters, in place."""
    if parallel.residual != "compute":
        model.keep_residual(DTYPES[parallel.residual])
    convert_linears(model, parallel.linear)
    model.use_attention(layout.attention.backend)
    if layout.sequence.size > 1:
        shard_sequence(model, layout.sequence, layout.attention.backend)
    compiled = parallel.compile != "none"
    recompute_activations(model, recompute_kinds(model, parallel, layout, workload), compiled)
    if compiled:
        compile_units(model, parallel.compile)


def compile_units(model: JointTransformer, backend: str) -> None:
    """Compile each block and Bridge direction whole, those of a shape from a copy of their code.

    torch keeps what it learns of code by the code: where all shapes share one function, the graphs of all count against
    one limit. What torch cannot compile, and what exceeds the limit, it would run in eager mode, silently; here it is
    an error. Compiled is the forward with its checkpoint in it, and nothing around it: FSDP's hooks stay outside.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    names = {module: name for name, module in model.named_modules()}
    copies: dict[tuple[CodeType, str], CodeType] = {}
    for unit in units(model):
        shape, forward = shape_of(names[unit]), unit.forward
        function = forward.__func__ if isinstance(forward, MethodType) else forward
        code = function.__code__
        own = copies.setdefault((code, shape), code.replace(co_name=f"{shape}_{code.co_name.strip('<>')}"))
        copied = FunctionType(own, function.__globals__, own.co_name, function.__defaults__, function.__closure__)
        bound = MethodType(copied, unit) if isinstance(forward, MethodType) else copied
        unit.forward = torch.compile(bound, backend=backend, fullgraph=True)


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process. One that grows in mid-run means shapes that keep changing."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def eager_units(model: JointTransformer) -> int:
    """How many units would be compiled and have no graph: before the first step all, after it none, unless something
    that torch heeds (TORCHDYNAMO_DISABLE=1, a dispatch mode) turned compilation off, which it reports nowhere."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list, innermost_fn

    return sum(not _debug_get_cache_entry_list(innermost_fn(unit.forward).__code__) for unit in units(model))


def recompute_kinds(
    model: JointTransformer, parallel: ParallelConfig, layout: Layout, workload: Workload | None
) -> list[str]:
    """How each of the model's units is checkpointed under this layout."""
    ranks = layout.sequence.size
    stream = residual_dtype(parallel, layout.compute)
    return choose_kinds(model, parallel.recompute, parallel.recompute_gib, workload, ranks, layout.compute, stream)


def residual_dtype(parallel: ParallelConfig, compute: torch.dtype) -> torch.dtype:
    """Of the hidden states between blocks."""
    return compute if parallel.residual == "compute" else torch.promote_types(compute, DTYPES[parallel.residual])


def recomputed_units(
    model: JointTransformer, parallel: ParallelConfig, layout: Layout, workload: Workload | None
) -> Counter[tuple[str, str]]:
    """How many units of each shape ("video", "to_audio", ...) are checkpointed in which way."""
    names = {module: name for name, module in model.named_modules()}
    kinds = recompute_kinds(model, parallel, layout, workload)
    return Counter((shape_of(names[unit]), kind) for unit, kind in zip(units(model), kinds, strict=True))


def shard_model(model: JointTransformer, parallel: ParallelConfig, layout: Layout) -> None:
    """FSDP2 (HSDP with dp_replicate > 1) units in the order in which a step meets them.

    Units are the stem, the time path, each video block, what runs beside it in its layer (both Bridge directions and
    the audio block, unless sound learns beside a frozen Bridge), and each head: the joint model calls these, not whole
    towers, and an expert that is idle is then neither gathered nor reduced. Inputs are never cast by FSDP: timesteps
    must stay exact and tables float32, so modules cast for themselves. The time path computes in float32. A rank alone
    that casts nothing keeps its parameters as they are.

    A unit's weights are gathered, and its gradients reduced, while others compute. The reduction of a video block takes
    longer than a Bridge direction or an audio block computes: together they nearly hide it.
    """
    if layout.alone:
        return
    compute = layout.compute
    reduce = torch.promote_types(compute, torch.float32)
    mixed = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(param_dtype=reduce, reduce_dtype=reduce, cast_forward_inputs=False)
    mesh = layout.mesh if layout.dp_replicate > 1 else layout.mesh["fsdp"]

    def unit(modules: nn.Module | list[nn.Module], policy: MixedPrecisionPolicy = mixed) -> None:
        fully_shard(modules, mesh=mesh, mp_policy=policy)

    for tower in model.children():
        if isinstance(tower, Tower):
            unit([tower.patch_embedding, tower.text_embedding])
            unit([tower.time_embedding, tower.time_projection], exact)
            unit(tower.head)
    for name in model.config.experts:
        for block in model.expert(name).blocks:
            unit(block)
    together = []
    for layer in range(model.config.audio.num_layers):
        for modules in small_units(model, layer):
            unit([*modules])
            together += [_Together(modules)] * (len(modules) > 1)
    unit(model)  # the root: what is left is the Bridge's condition scale, where a config has one
    model.register_forward_pre_hook(partial(_gather_in_order, together), with_kwargs=True)


class _Together:
    """Modules of one unit, of which a forward runs only some where a modality is absent.

    FSDP2 gathers such a unit when the first of its modules runs, and lets go of it when all of them have run. Without a
    picture the Bridge does not run: the unit would stay gathered, and the next forward compute with the old weights.
    In backward it gathers the unit for the gradient of what ran last, and only for that.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._state = _sharded(modules[0])._get_fsdp_state()
        self._awaited = self._state._modules_to_run_forward
        self._running: Collection[nn.Module] = modules
        for module in modules:  # both behind FSDP2's own hooks
            module.register_forward_pre_hook(self._before)
            module.register_forward_hook(self._after)

    def expect(self, running: Collection[nn.Module]) -> None:
        """The coming forward runs no other modules than these."""
        self._running = running
        self._awaited.clear()  # where the last forward did not come to its end

    def _before(self, *_: Any) -> None:
        self._awaited.intersection_update(self._running)

    def _after(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if self._awaited:  # else FSDP2 has done so
            self._state._register_pre_backward_hook(output)


def _gather_in_order(
    together: Sequence[_Together], model: JointTransformer, _: tuple[Any, ...], inputs: dict[str, Any]
) -> None:
    """Let every unit gather the AHEAD units that follow it, in this forward and in its backward.

    A video block is large: its gather takes about as long as the small modules before it compute. Begun two units
    earlier, it hides behind the video block before. The order depends on the expert, on what is given and on what
    trains, so it is set anew each time: FSDP's own order in backward would be one unit ahead, and gather also what no
    gradient passes through.
    """
    given = (inputs.get(modality) is not None for modality in ("video", "audio"))
    order = [*forward_order(model, inputs.get("expert", "high"), *given)]
    running = {module for unit in order for module in unit.modules}
    for modules in together:
        modules.expect(running)
    units = [_sharded(unit.modules[0]) for unit in order]
    for place, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(units[place + 1 : place + 1 + AHEAD])
    met = [unit for unit, passed in zip(units, in_backward(order), strict=True) if passed]
    for place, unit in enumerate(met):
        following = met[max(0, place - AHEAD) : place][::-1]
        unit.set_modules_to_backward_prefetch(following or [unit])  # itself is there: none would mean FSDP's own order


def _sharded(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule)
    return module


@torch.no_grad()
def fill_weights(model: nn.Module, part: Part) -> None:
    """Set every parameter, computing only the rows that this rank holds."""
    for name, parameter in model.named_parameters():
        shape, mine, first = tuple(parameter.shape), parameter.detach(), 0
        if isinstance(mine, DTensor):
            _, offsets = compute_local_shape_and_global_offset(shape, mine.device_mesh, mine.placements)
            mine, first = mine.to_local(), offsets[0] * math.prod(shape[1:])  # split by rows
        if mine.numel():
            mine.copy_(part(name, shape, first, first + mine.numel()).view_as(mine))
