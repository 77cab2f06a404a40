"""Checks that the chosen attention backend agrees with the definition of attention, at this run's shapes.

Kernels depend on device, driver and package version, and a wrong one goes unnoticed in training. So before a run on
GPUs starts, its backend is compared with plain float32 products at the run's lengths and head widths, on two heads:
output, log-sum-exp, and the gradients of q, k and v by every way in which the run will ask for them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from core.errors import RunError
from model.backends.interface import Backend
from model.joint import JointConfig
from train.parallel.collectives import gather
from train.parallel.mesh import Layout
from train.parallel.sequence.cores import shares
from train.parallel.workload import Workload

# Relative L2 error. Rounding alone gives about 3e-3 in bfloat16.
BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 1e-2, torch.float32: 1e-3, torch.float64: 1e-8}
HEADS, ROWS = 2, 256  # heads that are compared, and queries that the definition takes at a time
Shape = tuple[int, int, int]  # queries, keys, head width


def check_attention(config: JointConfig, layout: Layout, workload: Workload) -> None:
    """Compare the layout's backend with the definition. RunError, on all ranks, if it differs on any. All ranks
    call."""
    backend, blocks = layout.attention.backend, layout.sequence.size > 1
    found: list[str] = []
    for shape in attention_shapes(config, layout, workload):
        try:
            errors = differences(backend, shape, layout.compute, layout.device, blocks)
        except RuntimeError as error:
            found.append(f"{shape}: {str(error).strip().splitlines()[0]}")
            continue
        bad = {what: error for what, error in errors.items() if not error <= BOUNDS[layout.compute]}
        found += [f"{shape}: " + ", ".join(f"{what} {error:.1e}" for what, error in bad.items())] if bad else []
    wrong = gather(found)
    if wrong:
        raise RunError(
            f"attention backend {backend.name} gives wrong results here: at (queries, keys, head width) = {wrong[0]} "
            f"(relative error; up to {BOUNDS[layout.compute]:.0e} is rounding); set another parallel.attention (sdpa "
            "runs on every device), or install another version"
        )


def attention_shapes(config: JointConfig, layout: Layout, workload: Workload) -> list[Shape]:
    """The shapes of one rank's attentions, except the audio tower's: video self-attention, text, Bridge."""
    group, video = layout.sequence, config.video
    lengths = shares(workload.video_tokens(config), group.size)
    mine = lengths[group.position]
    row = group.position // group.ulysses
    in_row = sum(lengths[row * group.ulysses : (row + 1) * group.ulysses])
    width, bridge = video.dim // video.num_heads, config.bridge.head_dim
    sound = workload.audio_tokens(config)
    shapes = [(in_row, in_row, width), (mine, config.text_length, width), (mine, sound, bridge), (sound, mine, bridge)]
    if config.bridge.pooled_adaln:
        frame, heads = sum(lengths) // workload.frames(config), config.audio.dim // bridge
        shapes.append((1, min(frame, mine), video.dim // heads))
    return shapes


def differences(
    backend: Backend, shape: Shape, dtype: torch.dtype, device: torch.device, blocks: bool
) -> dict[str, float]:
    """Relative L2 errors of the backend at one shape, by what is computed; `blocks`: also of its log-sum-exp and of the
    gradients that it gives for a block of keys."""
    queries, keys, width = shape
    generator = torch.Generator().manual_seed(queries + keys)
    q, k, v, grad = (
        torch.randn(1, length, HEADS, width, generator=generator).to(device, dtype)
        for length in (queries, keys, keys, queries)
    )
    true = definition(q, k, v, grad)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        out = backend(*leaves)
        found = {"output": out.detach()}
        found |= dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, grad), strict=True))
    if blocks:
        with torch.no_grad():
            part, lse = backend.with_lse(q, k, v)
            found |= {"part": part, "lse": lse}
            parts = backend.backward(grad, q, k, v, part, lse)
            found |= dict(zip(("dq of a part", "dk of a part", "dv of a part"), parts, strict=True))
    return {what: _relative(value, true[what.split(" of ")[0]]) for what, value in found.items()}


@torch.no_grad()
def definition(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Attention by its definition in at least float32, over a few queries at a time: output, log-sum-exp, gradients."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v, grad = (x.transpose(1, 2).to(wide) for x in (q, k, v, grad))  # [B, H, L, D]
    scale = 1 / math.sqrt(q.shape[-1])
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for queries, grads in zip(q.split(ROWS, 2), grad.split(ROWS, 2), strict=True):
        scores = queries @ k.mT * scale
        lse = scores.logsumexp(-1, keepdim=True)
        weights = (scores - lse).exp()
        out = weights @ v
        dv += weights.mT @ grads
        inner = weights * (grads @ v.mT - (grads * out).sum(-1, keepdim=True))
        dk += inner.mT @ queries * scale
        rows.append((out, lse.squeeze(-1), inner @ k * scale))
    out, lse, dq = (torch.cat(parts, dim=2) for parts in zip(*rows, strict=True))
    whole = {"output": out, "part": out, "dq": dq, "dk": dk, "dv": dv}
    return {what: value.transpose(1, 2) for what, value in whole.items()} | {"lse": lse}


def _relative(found: Tensor, true: Tensor) -> float:
    number: float = ((found.to(true.dtype) - true).norm() / true.norm()).item()
    return number
