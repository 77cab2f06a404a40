"""Published training runs as stages of the time model (train/plan/timing.py): what each computes, moves and exchanges.

Every number follows from a geometry, a layout and the kernels that a software stack is known to use; nothing is fitted.
Sources: bench/results/published.md lists them. What no source says is an assumption, and stands where it is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import conf
from data.codec.mova.flops import encode_flops
from train.plan.gpu import GpuConfig, read_sheet
from train.plan.timing import Exchange, Kernel, Links, Stage

MEGATRON, AUTOMODEL, TORCHTITAN, REFERENCE = "Megatron (DFM)", "FSDP2 (Automodel)", "torchtitan", "MOVA's own"
BF16, FLOAT32 = 2, 4
ADAMW = 40  # bytes of a weight in the optimizer, as in train/plan/stages.py

# Bytes that elementwise kernels of one layer read and write in eager mode, in tensors of tokens x width in 16 bits, and
# how many kernels they are: (forward, backward). Of Wan's block counted on this project's own, which computes the same
# (RoPE 48 and 52 of them). Of Llama's by its operators: RMSNorm in float32 twice 36, SwiGLU 18, RoPE 13, sums 6, keys
# and values for all heads 2; backward 61, 32, 13, 15 and 2.
WAN_EAGER, WAN_KERNELS = (87.0, 130.0), (41, 73)
LLAMA_EAGER, LLAMA_KERNELS = (75.0, 122.0), (45, 75)
FUSED = 0.3  # of them where torch.compile or Transformer Engine fuses kernels: assumed, as of this project's block
# TFLOP/s of FlashAttention-2 on an H100, which torch's attention takes there: forward
# https://github.com/Azure/AI-benchmarking-guide (ND H100 v5), backward assumed (huggingface/transformers pull 48163:
# cuDNN is 1.7 to 2.3 times faster). The sheet's rates are those of FlashAttention-3 and cuDNN.
FLASH_2 = {"attention_tflops": [320.0, 328.0, 370.0], "attention_backward_tflops": [270.0, 300.0, 330.0]}

ENCODER_TFLOPS = 300.0  # of the video VAE: assumed, as `mova plan` does


@dataclass(frozen=True)
class TransformerShape:
    """A transformer. kv: width of keys and values; gated: three matrices in the feed-forward part; text: tokens that a
    cross-attention reads (0: none); vocabulary: of the head (0: none); causal: of self-attention."""

    layers: int
    dim: int
    kv: int
    ffn: int
    gated: bool
    text: int = 0
    vocabulary: int = 0
    causal: bool = False

    @property
    def eager(self) -> tuple[tuple[float, float], tuple[int, int]]:
        """(tensors read and written, kernels) of a layer's elementwise operators, forward and backward."""
        return (WAN_EAGER, WAN_KERNELS) if self.text else (LLAMA_EAGER, LLAMA_KERNELS)

    @property
    def layer_weights(self) -> int:
        """Weights of one layer."""
        d = self.dim
        return 2 * d * d + 2 * d * self.kv + 4 * d * d * bool(self.text) + (2 + self.gated) * d * self.ffn

    def products(self, tokens: int, split: int = 1) -> list[Kernel]:
        """Forward products of one layer on a rank that has `tokens`, and of each weight one of `split` parts."""
        d, kv, ffn = self.dim, self.kv, self.ffn
        found = [product(tokens, d, d // split, 2), product(tokens, d, kv // split, 2)]
        if self.text:
            found += [product(tokens, d, d // split, 2), product(self.text, d, d // split, 2)]
        return [*found, product(tokens, d, ffn // split, 2 + self.gated)]

    def attention(self, queries: int, keys: int, split: int = 1) -> list[Kernel]:
        """Forward attention of one layer: `queries` of a rank to all `keys`, one of `split` parts of the heads."""
        width = self.dim // split
        own = attention(queries, keys, width, self.causal)
        return [own, attention(queries, self.text, width, False)] if self.text else [own]


WAN_14B = TransformerShape(layers=40, dim=5120, kv=5120, ffn=13824, gated=False, text=512)
LLAMA_8B = TransformerShape(layers=32, dim=4096, kv=1024, ffn=14336, gated=True, vocabulary=128256, causal=True)
LLAMA_70B = TransformerShape(layers=80, dim=8192, kv=1024, ffn=28672, gated=True, vocabulary=128256, causal=True)
WAN_TOKENS = 37440


def product(rows: int, inputs: int, outputs: int, times: int = 1) -> Kernel:
    """A product in 16 bits."""
    moved = BF16 * (rows * inputs + inputs * outputs + rows * outputs)
    return Kernel("gemm", 2 * rows * inputs * outputs, moved, times)


def attention(queries: int, keys: int, width: int, causal: bool) -> Kernel:
    """Forward attention over all heads, `width` together."""
    return Kernel("attention", 4 * queries * keys * width // (1 + causal), BF16 * 2 * (queries + keys) * width)


def backward_of(kernels: Sequence[Kernel], weights: bool = True) -> list[Kernel]:
    """Backward of products (two each, one without gradients of weights) and of attention (2.5 times its FLOPs)."""
    found = []
    for one in kernels:
        if one.kind == "gemm":
            found.append(one._replace(times=one.times * (1 + weights)))
        else:
            found.append(Kernel("attention_backward", one.flops * 5 // 2, 2 * one.bytes, one.times))
    return found


def elementwise(tensors: float, kernels: int, tokens: int, dim: int) -> Kernel:
    """So many kernels that together read and write so many tensors of tokens x dim."""
    return Kernel("memory", 0, int(tensors * tokens * dim * BF16 / kernels), kernels)


@dataclass(frozen=True)
class Setup:
    """How a run is laid out and computed.

    tokens: of a rank's part of a sample, all its samples of a micro-batch together; keys: of one sample; fused: of
    elementwise kernels; tensor: ranks of tensor parallelism; context: ranks that share a sample's tokens; recomputed:
    layers whose forward is repeated in backward, of which `again` are the shares of products, attention and
    elementwise kernels; gathers: weights are gathered for each use; trains: weights have gradients.
    """

    tokens: int
    keys: int
    fused: bool
    shards: int
    tensor: int = 1
    context: int = 1
    recomputed: int = 0
    again: tuple[float, float, float] = (1.0, 1.0, 1.0)
    gathers: bool = True
    trains: bool = True


@dataclass(frozen=True)
class PublishedRun:
    """A published figure. seconds: of a step, as published or by its FLOPs; hardware: its sheet; gpu: the same with the
    rates of the attention that the stack has; needed: FLOPs of a rank and step by kind, without recomputation; the
    others as `simulate` takes them."""

    name: str
    stack: str
    figure: str
    seconds: float
    hardware: GpuConfig
    gpu: GpuConfig
    forward: list[Stage]
    backward: list[Stage]
    links: Links
    after: list[Kernel]
    micro_batches: int
    reduced_last: bool
    needed: dict[str, float]
    left_out: str = ""
    source: str = field(default="", kw_only=True)


def layer_stages(shape: TransformerShape, setup: Setup) -> tuple[list[Stage], list[Stage]]:
    """(forward, backward) of all layers, in the order in which they run."""
    forward, backward = [], []
    for number in range(shape.layers):
        there, back = _layer(shape, setup, number < setup.recomputed)
        sent, returned = _exchanges(shape, setup, number < setup.recomputed, (_attention(there), _attention(back)))
        weights = shape.layer_weights // setup.tensor
        gathered = BF16 * weights * setup.gathers
        forward.append(Stage(f"layer {number}", there, sent, gathered))
        backward.append(Stage(f"layer {number}", back, returned, gathered, FLOAT32 * weights * setup.trains))
    return forward, backward[::-1]


def _layer(shape: TransformerShape, setup: Setup, again: bool) -> tuple[list[Kernel], list[Kernel]]:
    products = shape.products(setup.tokens, setup.tensor)
    attended = shape.attention(setup.tokens, setup.keys, setup.tensor)
    (before, after), (kernels, kernels_back) = shape.eager
    share = FUSED if setup.fused else 1.0
    fewer = 3 if setup.fused else 1
    rows = setup.tokens // setup.tensor  # elementwise operators share the tokens of a tensor-parallel group
    moved = elementwise(share * before, kernels // fewer, rows, shape.dim)
    moved_back = elementwise(share * after, kernels_back // fewer, rows, shape.dim)
    there = [*products, *attended, moved]
    back = [*backward_of([*products, *attended], setup.trains), moved_back]
    if again:
        shares = dict(zip(("gemm", "attention", "memory"), setup.again, strict=True))
        back = [*(_part(one, shares[one.kind]) for one in there if shares[one.kind]), *back]
    return there, back


def _part(kernel: Kernel, share: float) -> Kernel:
    return kernel._replace(flops=int(kernel.flops * share), bytes=int(kernel.bytes * share))


def _attention(kernels: list[Kernel]) -> list[Kernel]:
    return [one for one in kernels if one.kind.startswith("attention")]


def _exchanges(
    shape: TransformerShape, setup: Setup, again: bool, behind: tuple[list[Kernel], list[Kernel]]
) -> tuple[list[Exchange], list[Exchange]]:
    """Of tensor parallelism with shared tokens (a gather before and a reduction after each of the parts of a layer, the
    gathers once more in backward) and of keys and values that pass around the ranks of a sample, `behind` the attention
    of forward and of backward."""
    there, back = [], []
    if setup.tensor > 1:
        parts = 3 if shape.text else 2
        one = BF16 * setup.tokens * shape.dim * (setup.tensor - 1) / setup.tensor
        there.append(Exchange(2 * parts * one, 2 * parts, setup.tensor))
        back.append(Exchange(3 * parts * one, 3 * parts, setup.tensor))
    if setup.context > 1:
        passed = setup.context - 1
        one = BF16 * 2 * setup.tokens * shape.kv / setup.tensor * passed
        there.append(Exchange(one, passed, setup.context, setup.tensor, behind[0]))
        back.append(Exchange(2 * one, 2 * passed, setup.context, setup.tensor, behind[1]))
        if again:
            back.append(dataclasses.replace(there[-1], behind=behind[1]))
    return there, [*there[: setup.tensor > 1], *back] if again else back


def head_stages(shape: TransformerShape, setup: Setup) -> tuple[list[Stage], list[Stage]]:
    """The head of a language model with its loss in float32: logits written, cast, normalised, and back."""
    logits = setup.tokens * shape.vocabulary
    one = product(setup.tokens, shape.dim, shape.vocabulary)
    weights = shape.dim * shape.vocabulary
    there = Stage("head", [one, Kernel("memory", 0, logits * 11, 2)], (), BF16 * weights)
    back = Stage(
        "head", [*backward_of([one]), Kernel("memory", 0, logits * 7, 2)], (), BF16 * weights, FLOAT32 * weights
    )
    return [there], [back]


def flops_of(stages: Sequence[Stage]) -> dict[str, float]:
    """FLOPs by kind."""
    found: dict[str, float] = {}
    for stage in stages:
        for kernel in stage.kernels:
            found[kernel.kind] = found.get(kernel.kind, 0.0) + float(kernel.flops) * kernel.times
    return found


def needed_flops(shape: TransformerShape, setup: Setup, micro_batches: int) -> dict[str, float]:
    """FLOPs of a rank and step without what is computed again."""
    plain = dataclasses.replace(setup, recomputed=0)
    forward, backward = layer_stages(shape, plain)
    if shape.vocabulary:
        head = head_stages(shape, plain)
        forward, backward = [*forward, *head[0]], [*head[1], *backward]
    return {kind: micro_batches * flops for kind, flops in flops_of([*forward, *backward]).items() if kind != "memory"}


def model_flops(shape: TransformerShape, tokens: int) -> float:
    """Three forwards of one sample, as MFU counts: what published TFLOP/s of Wan are taken to count."""
    kernels = [*shape.products(tokens), *shape.attention(tokens, tokens)]
    return 3.0 * shape.layers * sum(one.flops * one.times for one in kernels)


def sheet(name: str) -> GpuConfig:
    """A sheet of conf/gpu."""
    return read_sheet(Path(conf.__file__).parent / "gpu" / f"{name}.yaml")


def _with(hardware: GpuConfig, rates: Mapping[str, list[float]]) -> GpuConfig:
    changed: dict[str, Any] = dict(rates)
    return dataclasses.replace(hardware, **changed)


def _run(
    name: str, stack: str, figure: str, seconds: float, hardware: GpuConfig, shape: TransformerShape, setup: Setup,
    micro_batches: int = 1, reduced_last: bool = False, kernels: Mapping[str, list[float]] | None = None,
    source: str = "",
) -> PublishedRun:  # fmt: skip
    forward, backward = layer_stages(shape, setup)
    if shape.vocabulary:
        there, back = head_stages(shape, setup)
        forward, backward = [*forward, *there], [*back, *backward]
    weights = shape.layers * shape.layer_weights + 2 * shape.dim * shape.vocabulary
    after = [Kernel("memory", 0, ADAMW * weights // setup.tensor // setup.shards)]
    needed = needed_flops(shape, setup, micro_batches)
    return PublishedRun(
        name, stack, figure, seconds, hardware, _with(hardware, kernels or {}), forward, backward,
        Links(setup.shards, 1), after, micro_batches, reduced_last, needed, source=source,
    )  # fmt: skip


DFM = "https://github.com/NVIDIA-NeMo/DFM (docs/performance-summary.md)"


def wan_runs() -> list[PublishedRun]:
    """Wan 2.1 14B, 37,440 tokens. Megatron: Transformer Engine (cuDNN attention, fused kernels); on H100 two ranks of
    tensor parallelism, four that share a sample, 10 of 40 layers computed again. Automodel: diffusers' eager model,
    torch's attention, every layer computed again (dfm/src/automodel/recipes/train.py)."""
    clip = model_flops(WAN_14B, WAN_TOKENS)

    def seconds(clips: float, tflops: float) -> float:
        return clips * clip / (tflops * 1e12)

    h100 = sheet("h100")
    found = [
        _run(
            "Wan 14B, 128 H100", MEGATRON, "325.77 TFLOP/s", seconds(1, 325.77), h100, WAN_14B,
            Setup(WAN_TOKENS // 4, WAN_TOKENS, True, 64, tensor=2, context=4, recomputed=10, gathers=False),
            micro_batches=8, reduced_last=True, source=DFM,
        )
    ]  # fmt: skip
    for name, tflops, gathers in (("b200", 804.02, True), ("gb200", 899.62, True), ("gb300", 1030.67, False)):
        setup = Setup(WAN_TOKENS // 2, WAN_TOKENS, True, 32, context=2, gathers=gathers)
        found.append(
            _run(f"Wan 14B, 32 {name.upper()}", MEGATRON, f"{tflops:,.2f} TFLOP/s", seconds(2, tflops), sheet(name),
                 WAN_14B, setup, micro_batches=4, reduced_last=not gathers, source=DFM)
        )  # fmt: skip
    for world, tflops in ((8, 175.88), (64, 228.85)):
        setup = Setup(WAN_TOKENS, WAN_TOKENS, False, world, recomputed=40)
        found.append(
            _run(f"Wan 14B, {world} H100", AUTOMODEL, f"{tflops} TFLOP/s", seconds(1, tflops), h100, WAN_14B, setup,
                 kernels=FLASH_2, source=DFM)
        )  # fmt: skip
    return found


def llama_runs() -> list[PublishedRun]:
    """Llama 3.1, 8,192 tokens, FSDP2 with torch's attention. torchtitan: two sequences a rank, of each layer half the
    products and all elementwise operators computed again; its H100s have memory of 2.4 TB/s and 500 W, "between SXM and
    NVL". Automodel: 70B on 32 groups of two ranks that share a sequence, compiled, every layer computed again."""
    found = []
    sxm, nvl = sheet("h100"), sheet("h100_nvl")
    between = {
        key: [(one + other) / 2 for one, other in zip(getattr(sxm, key), getattr(nvl, key), strict=True)]
        for key in ("gemm_tflops", "attention_tflops", "attention_backward_tflops")
    }
    slower = between["gemm_tflops"][1] / sxm.gemm_tflops[1]
    attended = {key: [slower * value for value in values] for key, values in FLASH_2.items()}
    theirs = _with(sxm, between | {"memory_gb_s": [2400 / 3350 * value for value in sxm.memory_gb_s]})
    source = "https://github.com/pytorch/torchtitan (benchmarks/llama3_h100_202412_torchtitan.md)"
    for world, how, rate in (
        (8, "eager", 5762), (8, "compiled", 6667), (128, "eager", 5605), (128, "compiled", 6514),
    ):  # fmt: skip
        setup = Setup(2 * 8192, 8192, how == "compiled", world, recomputed=32, again=(0.5, 0.0, 1.0))
        found.append(
            _run(f"Llama 8B, {world} H100, {how}", TORCHTITAN, f"{rate:,} tokens/s", 2 * 8192 / rate, theirs, LLAMA_8B,
                 setup, kernels=attended, source=source)
        )  # fmt: skip
    source = "https://github.com/NVIDIA-NeMo/Automodel (docs/performance-summary.mdx)"
    setup = Setup(4096, 8192, True, 64, context=2, recomputed=80)
    found.append(
        _run("Llama 70B, 64 H100", AUTOMODEL, "18.90 s", 18.90, sxm, LLAMA_70B, setup, micro_batches=4,
             kernels=FLASH_2, source=source)
    )  # fmt: skip
    return found


def reference_run() -> PublishedRun:
    """MOVA-360p, LoRA, 8 H100: groups of four ranks share a clip of 193 frames; every layer computed again, no
    gradients of weights, eager, FlashAttention-2 over an exchange of heads. Each rank encodes the clip twice by the
    VAE. Counted: the video tower, nine tenths of a step's FLOPs."""
    hardware = sheet("h100")
    tokens = 49 * 22 * 40
    setup = Setup(tokens // 4, tokens, False, 8, recomputed=40, trains=False)
    forward, backward = layer_stages(WAN_14B, setup)
    # Queries, keys, values and outputs exchanged among four, three quarters sent: forward, again, and their gradients.
    exchange = Exchange(4 * BF16 * setup.tokens * WAN_14B.dim * 3 / 4, 4, 4)
    forward = [dataclasses.replace(one, exchanges=[exchange]) for one in forward]
    backward = [dataclasses.replace(one, exchanges=[exchange, exchange]) for one in backward]
    slower = hardware.gemm_tflops[1] / ENCODER_TFLOPS
    encoding = Stage("encoding", [Kernel("gemm", int(2 * slower * encode_flops(193, 352, 640)), 0)])
    return PublishedRun(
        "MOVA-360p LoRA, 8 H100", REFERENCE, "22.2 s", 22.2, hardware, _with(hardware, FLASH_2),
        [encoding, *forward], backward, Links(8, 1), [], 1, False, needed_flops(WAN_14B, setup, 1),
        "copies of offloaded weights, text encoder, audio tower, Bridge, decoding of files",
        source="https://github.com/OpenMOSS/MOVA (README)",
    )  # fmt: skip


def published_runs() -> list[PublishedRun]:
    """All."""
    return [*wan_runs(), *llama_runs(), reference_run()]
