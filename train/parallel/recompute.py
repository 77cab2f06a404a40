"""Activation checkpointing of blocks and Bridge directions: what is kept for backward, and what is recomputed.

- `none`: everything is kept.
- `full`: only a block's inputs are kept; its forward runs twice.
- `attention`: attention outputs are kept too, those of a ring or a merge as one. At 43,000 tokens attention is more
  than half of a block's FLOPs, its output is one tensor of many: this saves most of the memory and avoids most of the
  recomputation.
- `outputs`: attention, and the outputs of linears that are narrower than their inputs: of the feed-forward's second
  one, whose FLOPs for each byte that it writes are the most of a block, and of the Bridge's keys and values of the
  picture.
- `selective`: attention, and what Ulysses exchanges, four tensors a block of the size of its input: nothing is sent
  again.
- `budget`: "none", "full", "attention" or "outputs" for each block, such that a rank keeps at most so many GiB and
  recomputes the fewest FLOPs.

No random number is drawn in a forward, so no generator state is saved or restored.

torch keeps results by dispatch modes, which run Python for every operator. In eager mode only attention cores and those
linears enter them: whatever is kept happens there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from core.errors import RunError
from model.attention import Attention
from model.backends.operator import ATTENTION
from model.block import Block
from model.bridge import Conditioner, ProbeAttention
from model.joint import JointConfig, JointTransformer
from model.rope import Rotary
from model.tower import Tower
from train.parallel.flops import block_flops, block_outputs_flops, bridge_flops, bridge_outputs_flops
from train.parallel.memory import LiveMemory
from train.parallel.sequence.merge import FRAMES, MERGE
from train.parallel.sequence.ring import RING
from train.parallel.sequence.ulysses import EXCHANGES
from train.parallel.workload import Workload

KINDS = ("none", "full", "attention", "outputs", "selective")
_ATEN = torch.ops.aten
ATTENTIONS = [  # every operator that computes attention
    ATTENTION,
    RING,
    MERGE,
    FRAMES,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_fused_attention_overrideable.default,
]
PRODUCTS = {_ATEN.mm.default: 0, _ATEN.addmm.default: 1, _ATEN._scaled_mm.default: 0}  # where their operands begin


def _are_outputs(_: Any, operator: Any, *inputs: Any, **__: Any) -> CheckpointPolicy:
    """Attention and products [N, wide] x [wide, narrow] are saved."""
    kept = operator in ATTENTIONS
    if (place := PRODUCTS.get(operator)) is not None:
        kept = inputs[place].shape[1] > inputs[place + 1].shape[1]
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


KEPT: dict[str, Any] = {  # besides the inputs: operators, or a policy
    "attention": ATTENTIONS,
    "outputs": _are_outputs,
    "selective": [*ATTENTIONS, *EXCHANGES],
}
CHOSEN = ("none", "full", "attention", "outputs")  # by budget, which counts FLOPs: what is sent again costs none
GIB = 2**30


def recompute_activations(model: JointTransformer, kinds: list[str], compiled: bool = False) -> None:
    """Checkpoint each of `units(model)` in its way. Call before compile and FSDP. `compiled`: whether they will be."""
    for module, kind in zip(units(model), kinds, strict=True):
        if kind != "none":
            # The forward is wrapped, not the module: parameters keep their names, and FSDP's hooks stay around it.
            module.forward = checkpointed(module, kind, compiled)


def checkpointed(unit: nn.Module, kind: str, compiled: bool) -> Callable[..., Any]:
    """The unit's forward, checkpointed. What is kept is computed by attention cores and linears, which are wrapped."""
    forward: Callable[..., Any] = unit.forward
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if kind == "none":
        return forward
    if kind in KEPT and compiled:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT[kind])
    elif kind in KEPT:
        options["context_fn"] = partial(_contexts_in_cores, KEPT[kind])
        for module in unit.modules():
            if isinstance(module, Attention | ProbeAttention) and not isinstance(module.core, KeptCore):
                module.core = KeptCore(module.core)  # type: ignore[assignment]  # one of the two kinds
        for linear in narrowing(unit) if kind == "outputs" else ():
            if "forward" not in linear.__dict__:
                linear.forward = partial(KeptCore.within, linear.forward)  # type: ignore[method-assign]
    return lambda *arguments: checkpoint(forward, *arguments, **options)


class KeptCore:
    """An attention core that enters the dispatch mode of the checkpoint around it, if there is one. Linears use
    `within` alone."""

    modes: ClassVar[list[AbstractContextManager[Any]]] = []  # of the checkpoints that run now, the innermost last

    def __init__(self, core: Callable[..., Tensor]) -> None:
        self.core = core

    def start(self, *inputs: Any, **keys: Any) -> Any:
        """As `AttentionCore.start`."""
        return self.within(self.core.start, *inputs, **keys)  # type: ignore[attr-defined]  # of an Attention's core

    def __call__(self, *inputs: Any) -> Any:
        return self.within(self.core, *inputs)

    @classmethod
    def within(cls, function: Callable[..., Any], *inputs: Any, **keys: Any) -> Any:
        """function(*inputs, **keys) in the mode of the innermost checkpoint."""
        with cls.modes[-1] if cls.modes else nullcontext():
            return function(*inputs, **keys)


class _InCores:
    """A context whose mode is entered in cores and wrapped linears only."""

    def __init__(self, mode: AbstractContextManager[Any]) -> None:
        self.mode = mode

    def __enter__(self) -> None:
        KeptCore.modes.append(self.mode)

    def __exit__(self, *exception: Any) -> None:
        KeptCore.modes.pop()


def _contexts_in_cores(kept: Any) -> tuple[_InCores, _InCores]:
    """Of the forward and of the recomputation, for one checkpoint. `kept`: of KEPT."""
    forward, again = create_selective_checkpoint_contexts(kept)
    return _InCores(forward), _InCores(again)


def narrowing(unit: nn.Module) -> list[nn.Linear]:
    """The linears of a unit whose output is narrower than their input."""
    return [x for x in unit.modules() if isinstance(x, nn.Linear) and x.in_features > x.out_features]


def units(model: JointTransformer) -> list[nn.Module]:
    """Blocks and Bridge directions: what is checkpointed and compiled one by one."""
    blocks = [block for tower in model.children() if isinstance(tower, Tower) for block in tower.blocks]
    bridge = model.dual_tower_bridge
    return [*blocks, *bridge.audio_to_video_conditioners.values(), *bridge.video_to_audio_conditioners.values()]


def choose_kinds(
    model: JointTransformer,
    kind: str,
    gib: float | None,
    workload: Workload | None,
    sequence: int,
    compute: torch.dtype,
    stream: torch.dtype | None = None,
) -> list[str]:
    """A kind for each of `units(model)`.

    "budget" begins with full checkpointing everywhere and relaxes, where a byte saves the most FLOPs first, as many
    units as fit into `gib`. `workload`: the largest micro-batch, whose video tokens `sequence` ranks share; `stream`:
    dtype of the hidden states between units (None: `compute`). Only the
    active expert counts, and both experts are treated alike. RunError when full checkpointing does not fit either.
    """
    modules = units(model)
    if kind != "budget":
        return [kind] * len(modules)
    assert gib is not None and workload is not None
    names = {module: name for name, module in model.named_modules()}
    shapes = [shape_of(names[module]) for module in modules]
    experts = {shape: len(model.config.experts) if shape == "video" else 1 for shape in set(shapes)}
    counts = {shape: shapes.count(shape) // experts[shape] for shape in experts}  # that run in a step
    costs = {
        (shape, k): unit_cost(model.config, shape, k, workload, sequence, compute, stream)
        for shape in counts
        for k in CHOSEN
    }
    left = gib * GIB - sum(count * costs[shape, "full"].kept for shape, count in counts.items())
    if left < 0:
        raise RunError(
            f"parallel.recompute_gib={gib}: even with full checkpointing {gib - left / GIB:.1f} GiB are kept for "
            "backward; allow more, or share the tokens of a sample among more ranks (parallel.ulysses, parallel.ring)"
        )
    chosen = {shape: ["full"] * count for shape, count in counts.items()}
    while True:
        moves = []
        for shape, kinds_now in chosen.items():
            for now in set(kinds_now):
                for better in CHOSEN:
                    added = costs[shape, better].kept - costs[shape, now].kept
                    saved = costs[shape, now].again - costs[shape, better].again
                    if saved > 0 and added <= left:
                        moves.append((saved / max(added, 1), shape, now, better, added))
        if not moves:
            break
        _, shape, now, better, added = max(moves)
        chosen[shape][chosen[shape].index(now)] = better
        left -= added
    turn = dict.fromkeys(counts, 0)
    kinds = []
    for shape in shapes:
        kinds.append(chosen[shape][turn[shape] % counts[shape]])
        turn[shape] += 1
    return kinds


def recomputed(kind: str, products: int, attention: int, outputs: int) -> int:
    """FLOPs that backward computes again, of those of a unit's forward. outputs: of its products, those of `narrowing`
    linears."""
    return {
        "none": 0, "full": products + attention, "attention": products, "outputs": products - outputs,
        "selective": products,
    }[kind]  # fmt: skip


@dataclass(frozen=True)
class UnitCost:
    """The cost of one unit in one step: bytes kept from forward to backward, FLOPs that backward recomputes."""

    kept: int
    again: int


def unit_cost(
    config: JointConfig,
    shape: str,
    kind: str,
    workload: Workload,
    sequence: int,
    compute: torch.dtype,
    stream: torch.dtype | None = None,
) -> UnitCost:
    """What a unit ("video", "audio", "to_video", "to_audio") costs when checkpointed in one of the ways of CHOSEN.

    The bytes are measured, by running the unit on fake tensors over the tokens of one rank. Under sequence parallelism
    the exchanged tensors that attention keeps are as large as those they were made of.
    """
    clips, all_tokens, steps = workload.clips, workload.video_tokens(config), workload.audio_tokens(config)
    tokens = -(-all_tokens // sequence)
    inputs: tuple[Any, ...]
    with FakeTensorMode(), torch.device("cpu"):
        video = torch.zeros(clips, tokens, config.video.dim, dtype=stream or compute, requires_grad=True)
        audio = torch.zeros(clips, steps, config.audio.dim, dtype=stream or compute, requires_grad=True)
        if shape in ("video", "audio"):
            tower, x = (config.video, video) if shape == "video" else (config.audio, audio)
            unit: nn.Module = Block(tower.dim, tower.num_heads, tower.ffn_dim, tower.eps)
            table = torch.zeros(x.shape[1], tower.dim // tower.num_heads // 2)
            text = torch.zeros(clips, config.text_length, tower.dim, dtype=compute)
            inputs = x, text, torch.zeros(clips, 6, tower.dim), Rotary(table, table, interleaved=True)
            every = all_tokens if shape == "video" else steps
            products, attended = block_flops(tower, x.shape[1], every, config.text_length)
            outputs = block_outputs_flops(tower, x.shape[1])
        else:
            x, y = (video, audio) if shape == "to_video" else (audio, video)
            pooled = config.bridge.pooled_adaln and shape == "to_audio"
            unit = Conditioner(x.shape[2], y.shape[2], x.shape[2] // config.bridge.head_dim, pooled)
            tables = [torch.zeros(z.shape[1], config.bridge.head_dim // 2) for z in (x, y)]
            rotaries = [Rotary(table, table, interleaved=False) for table in tables]
            inputs = x, y, *rotaries, 1
            products, attended = bridge_flops(x.shape[1], x.shape[2], y.shape[1], y.shape[2])
            outputs = bridge_outputs_flops(x.shape[2], y.shape[1], y.shape[2])
        for module in unit.modules():  # Module.to cannot replace fake parameters
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=compute)))
        recompute = recomputed(kind, products, attended, outputs)
        forward = checkpointed(unit, kind, compiled=False)
        with LiveMemory() as memory:
            out = forward(*inputs)
        # A unit keeps its input, which was made before; its output is counted where it is an input.
        kept = memory.live - out.untyped_storage().nbytes() + x.untyped_storage().nbytes()
    return UnitCost(kept, clips * recompute)


def shape_of(name: str) -> str:
    """The shape of a unit, by its name in the model."""
    if name.startswith("dual_tower_bridge"):
        return "to_video" if "audio_to_video" in name else "to_audio"
    return "audio" if name.startswith("audio_dit") else "video"
