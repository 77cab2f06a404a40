"""The parts of tools/bench/gpu.py, each a function of the sizes that returns rows of its table."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import webdataset
from safetensors.torch import save, save_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from core.jsonl import read_lines
from data.clip import Bucket, EncodedClip
from data.dataset.build import build_index
from model.backends.choice import BACKENDS, make_backend
from model.backends.interface import Backend, Needs
from model.joint import JointTransformer
from model.rope import Rotary
from train import loop
from train.checkpoint.saver import HostCopy
from train.config import compose_train
from train.engine.optim import ShardedOptimizer
from train.engine.optim_config import OptimConfig
from train.parallel.attention import BOUNDS, differences
from train.parallel.flops import block_flops
from train.parallel.mesh import Layout, ParallelConfig, make_layout
from train.parallel.parallelize import prepare_model

GIB = 2**30
REPEATS = 3  # the fastest counts


@dataclass(frozen=True)
class ResultRow:
    """A row of the table. `ok` None: only a number, nothing that could fail."""

    what: str
    value: str
    ok: bool | None = None


@dataclass(frozen=True)
class Sizes:
    """What is measured: on a GPU at true sizes (TRUE), on the CPU at others that take seconds (REHEARSAL)."""

    shapes: tuple[tuple[str, int, int, int, int], ...]  # what, queries, keys, heads, head width
    model: tuple[str, ...]  # overrides of conf/train.yaml for the blocks
    grid: tuple[int, int, int]  # tokens of a clip; the shorter length takes an eighth of them
    compile: tuple[str, ...]
    optimizer: tuple[str, ...]  # overrides for the model whose moments lie on the host
    copy_gib: float
    dtype: torch.dtype


# Half a layer's width of heads where the whole would take a second for every try.
TRUE = Sizes(
    shapes=(
        ("video self-attention, ulysses 8", 43_120, 43_120, 5, 128),
        ("video to text", 5_390, 512, 40, 128),
        ("audio to video", 403, 43_120, 12, 128),
        ("audio to a rank's video", 403, 5_390, 12, 128),
        ("query per frame", 1, 880, 12, 128),
        ("odd lengths", 5_391, 4_097, 13, 128),
    ),
    model=("model=mova_360p", "model.video.num_layers=2", "model.audio.num_layers=1", "model.two_experts=false"),
    grid=(49, 22, 40), compile=("none", "inductor"),
    optimizer=("model=mova_360p", "model.video.num_layers=2", "model.audio.num_layers=1", "model.two_experts=false"),
    copy_gib=4.0, dtype=torch.bfloat16,
)  # fmt: skip
REHEARSAL = Sizes(
    shapes=(("video self-attention", 96, 96, 2, 32), ("query per frame", 1, 12, 2, 32), ("odd lengths", 67, 51, 3, 32)),
    model=("model=tiny", "model.video.num_layers=2", "model.audio.num_layers=1", "model.two_experts=false"),
    grid=(4, 4, 4), compile=("none",), optimizer=("model=tiny",), copy_gib=0.001, dtype=torch.float32,
)  # fmt: skip


def seconds_of(action: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """The fastest of some tries, after one that does not count."""
    action()
    best = float("inf")
    for _ in range(repeats):
        _wait(device)
        begin = time.perf_counter()
        action()
        _wait(device)
        best = min(best, time.perf_counter() - begin)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- versions --------------------------------------------------------------------------------------------------------


def versions(sizes: Sizes, device: torch.device) -> Iterator[ResultRow]:
    """Versions, the device, and the available attention backends."""
    yield ResultRow(
        "torch, CUDA, cuDNN", f"{torch.__version__}, {torch.version.cuda}, {torch.backends.cudnn.version()}"
    )
    capability = (0, 0)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = torch.cuda.get_device_capability(device)
        name = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
        yield ResultRow("device", f"{name}, compute capability {'.'.join(map(str, capability))}")
        yield ResultRow("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    layout = make_layout(ParallelConfig(), device)
    compute = str(layout.compute).removeprefix("torch.")
    yield ResultRow("parallel.compute_dtype=auto", f"{compute} ({layout.compute_reason})")
    yield ResultRow("parallel.attention=auto", layout.attention.describe())
    for name in BACKENDS[1:]:
        obstacle = make_backend(name, False).obstacle(Needs(device.type, sizes.dtype, capability, blocks=True))
        yield ResultRow(f"attention backend {name}", obstacle or "there")


# --- attention -------------------------------------------------------------------------------------------------------


def attention(sizes: Sizes, device: torch.device) -> Iterator[ResultRow]:
    """Every backend against float32: output, log-sum-exp, gradients of the whole and of a block of keys; its speed."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    for name in BACKENDS[1:]:
        backend = make_backend(name, False)
        if backend.obstacle(Needs(device.type, sizes.dtype, capability, blocks=True)):
            continue
        for what, queries, keys, heads, width in sizes.shapes:
            label = f"{name}: {what}, {queries:,} x {keys:,}"
            try:
                errors = differences(backend, (queries, keys, width), sizes.dtype, device, blocks=True)
                speed = _speed(backend, queries, keys, heads, width, sizes.dtype, device)
            except RuntimeError as error:
                yield ResultRow(label, str(error).strip().splitlines()[0], False)
                continue
            worst = max(errors, key=lambda part: errors[part] if errors[part] == errors[part] else float("inf"))
            good = all(error <= BOUNDS[sizes.dtype] for error in errors.values())
            yield ResultRow(label, f"largest relative error {errors[worst]:.1e} ({worst}); {speed}", good)


def _speed(
    backend: Backend, queries: int, keys: int, heads: int, width: int, dtype: torch.dtype, device: torch.device
) -> str:
    q, k, v = (
        torch.randn(1, length, heads, width, device=device, dtype=dtype, requires_grad=True)
        for length in (queries, keys, keys)
    )
    grad = torch.randn_like(q)
    forward = seconds_of(lambda: backend(q, k, v), device)
    both = seconds_of(lambda: torch.autograd.grad(backend(q, k, v), (q, k, v), grad), device)
    flops = 4 * queries * keys * heads * width
    back = max(both - forward, 1e-9)
    return (
        f"forward {1e3 * forward:.2f} ms ({flops / forward / 1e12:.0f} TFLOP/s), backward {1e3 * back:.2f} ms "
        f"({2.5 * flops / back / 1e12:.0f} TFLOP/s)"
    )


# --- a run -----------------------------------------------------------------------------------------------------------


def run(sizes: Sizes, device: torch.device) -> Iterator[ResultRow]:
    """20 steps in one go, and stopped after 10 and resumed; steps 5 to 14 may not wait for the device."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _write_clips(root / "clips")
        begin = time.perf_counter()
        for name, steps in (("whole", 20), ("parts", 10), ("parts", 20)):
            with _no_waiting(device, range(5, 15)):
                _train(root, name, steps, device)
        seconds = time.perf_counter() - begin
        whole, parts = (_losses(root / "runs" / name) for name in ("whole", "parts"))
    yield ResultRow(
        "20 steps, no host sync in steps 5 to 14", f"loss {whole[0]:.4f} to {whole[-1]:.4f}", len(whole) == 20
    )
    apart = max(abs(a - b) / abs(a) for a, b in zip(whole, parts, strict=True))
    exact = device.type == "cpu"
    yield ResultRow(
        "saved after 10, resumed", f"losses differ by {apart:.1e} at most (relative)", apart <= (0 if exact else 2e-2)
    )
    yield ResultRow("40 steps and 4 saves, with what starts them", f"{seconds:.1f} s")


@contextmanager
def _no_waiting(device: torch.device, steps: range) -> Iterator[None]:
    """In these steps of a run, what waits for the device is an error."""
    plain = loop.Training._step

    def step(training: loop.Training, number: int) -> Any:
        if device.type == "cuda" and number in steps:
            torch.cuda.set_sync_debug_mode("error")
        try:
            return plain(training, number)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")

    with patch.object(loop.Training, "_step", step):
        yield


def _train(root: Path, name: str, steps: int, device: torch.device) -> None:
    compute = "bfloat16" if device.type == "cuda" else "float32"
    arguments = [
        f"run.root={root / 'runs'}", f"run.id={name}", f"data.path={root / 'clips'}", f"steps={steps}", "model=tiny",
        "objective=phase2", "data.batch_size=4", "data.micro_batch=2", "optim.warmup=2", "optim.lr_tower=1e-3",
        "checkpoint.every=10", "monitor.wandb=disabled", f"parallel.compute_dtype={compute}",
    ]  # fmt: skip
    config, resolved = compose_train(arguments)
    loop.run(config, resolved, make_layout(config.parallel, device))


def _losses(run_dir: Path) -> list[float]:
    lines = read_lines(run_dir / "metrics.jsonl")
    return [line["train/loss"] for line in lines if "train/loss" in line]


def _write_clips(root: Path) -> None:
    """One shard of random latents, as small as clips can be."""
    root.mkdir()
    bucket = Bucket(frames=3, height=8, width=8, audio_steps=20, fps=24.0, has_video=True, has_audio=True)
    rng = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).bfloat16()

    save_file({"text": values(3, 256)}, root / "empty-text.safetensors")
    with (
        webdataset.TarWriter(str(root / "av-000000.tar")) as av,
        webdataset.TarWriter(str(root / "text-plain-000000.tar")) as text,
    ):
        for number in range(16):
            key, grid = f"{number:024x}", (16, 3, 8, 8)
            clip = EncodedClip(key, values(*grid), values(20, 128), values(*grid), {"bucket": bucket.to_dict()})
            latents, meta = clip.to_members()
            av.write({"__key__": key, "safetensors": latents, "json": meta})
            text.write({"__key__": key, "safetensors": save({"text": values(4, 256)}), "json": b'{"caption": ""}'})
    build_index(root).close()


# --- blocks ----------------------------------------------------------------------------------------------------------


def blocks(sizes: Sizes, device: torch.device) -> Iterator[ResultRow]:
    """Two video blocks, forward and backward, by length, recomputation and compilation."""
    attentions = {"none": 4, "selective": 4, "full": 8}  # forwards of two blocks with two attentions each
    for compiled in sizes.compile:
        for parts in (8, 1):
            for recompute, expected in attentions.items():
                tokens = sizes.grid[0] * sizes.grid[1] * sizes.grid[2] // parts
                label = f"two blocks, {tokens:,} tokens, recompute {recompute}, compile {compiled}"
                try:
                    value, found = _two_blocks(sizes, device, parts, recompute, compiled)
                except RuntimeError as error:
                    yield ResultRow(label, str(error).strip().splitlines()[0], False)
                    continue
                text = f"{value}, {found} attention forwards" + ("" if found == expected else f", not {expected}")
                yield ResultRow(label, text, found == expected)


def _two_blocks(sizes: Sizes, device: torch.device, parts: int, recompute: str, compiled: str) -> tuple[str, int]:
    torch._dynamo.reset()
    model, layout = _build(sizes, sizes.model, device, recompute=recompute, compile=compiled)
    tower, config = model.video_dit, model.config.video
    rotary = tower.rotary(sizes.grid, device)
    tokens = rotary.cos.shape[0] // parts
    rotary = Rotary(rotary.cos[:tokens].clone(), rotary.sin[:tokens].clone(), rotary.interleaved)
    x = torch.randn(1, tokens, config.dim, device=device, dtype=sizes.dtype, requires_grad=True)
    context = torch.randn(1, model.config.text_length, config.dim, device=device, dtype=sizes.dtype)
    modulation = torch.randn(1, 6, config.dim, device=device)

    def both() -> None:
        y = x
        for block in tower.blocks:
            y = block(y, context, modulation, rotary)
        y.backward(torch.ones_like(y))

    both()  # gradients are there from here on, and what is compiled
    forwards = attention_forwards(both, compiled != "none")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = seconds_of(both, device)
    products, attended = block_flops(config, tokens, tokens, model.config.text_length)
    rate = 3 * 2 * (products + attended) / seconds / 1e12
    peak = f"{torch.cuda.max_memory_allocated(device) / GIB:.1f} GiB" if device.type == "cuda" else "not measured"
    return f"{1e3 * seconds:.1f} ms, {rate:.3g} TFLOP/s of the model, peak {peak}", forwards


def attention_forwards(action: Callable[[], object], compiled: bool) -> int:
    """How often a forward of attention is computed in an action."""
    if not compiled:  # a profile would count what selective checkpointing looks up as well
        with _Forwards() as seen:  # type: ignore[no-untyped-call]
            action()
        number: int = seen.count
        return number
    with profile(activities=[ProfilerActivity.CPU]) as found:  # compiled code runs beside any mode
        action()
    return sum(event.count for event in found.key_averages() if _is_forward(event.key))


class _Forwards(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += _is_forward(func.name())
        return func(*args, **(kwargs or {}))


def _is_forward(operator: str) -> bool:
    """Whether an operator is the forward of an attention kernel: of torch, or of a flash-attn package, which is one
    of ours (model/backends/operator.py)."""
    return bool(re.match(r"aten::_scaled_dot_product_|mova::attention", operator)) and "backward" not in operator


def _build(
    sizes: Sizes, overrides: tuple[str, ...], device: torch.device, **settings: Any
) -> tuple[JointTransformer, Layout]:
    """A model of this process alone with random weights."""
    config = compose_train([*overrides, "run.id=x", "data.path=x"])[0].model
    compute = str(sizes.dtype).removeprefix("torch.")
    parallel = replace(ParallelConfig(compute_dtype=compute), **settings)
    layout = make_layout(parallel, device)
    with torch.device("meta"):
        model = JointTransformer(config)
    prepare_model(model.to(sizes.dtype), parallel, layout)
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
    return model, layout


# --- host memory -----------------------------------------------------------------------------------------------------


def host_optimizer(sizes: Sizes, device: torch.device) -> Iterator[ResultRow]:
    """An update with moments on the host against one with moments on the device."""
    wide = replace(sizes, dtype=torch.float32)
    for where, on_host in (("device", False), ("host", True)):
        model, _ = _build(wide, sizes.optimizer, device)
        optimizer = ShardedOptimizer(model, OptimConfig(), None, on_host)
        numbers = sum(parameter.numel() for parameter in model.parameters())
        gradients = {name: torch.full_like(p, 1e-3) for name, p in model.named_parameters()}

        def update(model: Any = model, optimizer: Any = optimizer, gradients: Any = gradients) -> None:
            for name, parameter in model.named_parameters():
                parameter.grad = gradients[name].clone()
            optimizer.step(1.0, optimizer.global_norm())

        update()  # makes the moments
        seconds = seconds_of(update, device)
        moved = f", {16 * numbers / seconds / 1e9:.1f} GB/s of moments there and back" if on_host else ""
        yield ResultRow(
            f"update of {numbers / 1e6:,.0f} M parameters, moments on the {where}", f"{seconds:.3f} s{moved}"
        )
        del model, optimizer, gradients, update


def host_copy(sizes: Sizes, device: torch.device) -> Iterator[ResultRow]:
    """The copy to host memory for which training pauses during a save."""
    count = max(1, round(sizes.copy_gib * GIB / 64 / 4))
    tensors: dict[str, Tensor] = {f"{n}": torch.full((count,), float(n), device=device) for n in range(64)}
    copy = HostCopy()
    begin = time.perf_counter()
    found = copy.take(tensors)
    first = time.perf_counter() - begin
    seconds = seconds_of(lambda: copy.take(tensors), device)
    same = all(torch.equal(found[key], tensor.cpu()) for key, tensor in tensors.items())
    size = 64 * count * 4
    yield ResultRow("HostCopy, the first of a run", f"{size / GIB:.3g} GiB in {first:.2f} s, memory taken")
    yield ResultRow("HostCopy", f"{size / seconds / 1e9:.1f} GB/s; the copy is the original: {same}", same)


Part = Callable[[Sizes, torch.device], Iterator[ResultRow]]
PARTS: dict[str, Part] = {
    "versions": versions,
    "attention": attention,
    "run": run,
    "blocks": blocks,
    "moments on the host": host_optimizer,
    "copy to the host": host_copy,
}


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone, unless there is one."""
    mine = not dist.is_initialized()
    if mine:
        from train.parallel.mesh import start_process_group

        start_process_group()
    try:
        yield
    finally:
        if mine:
            dist.destroy_process_group()
