"""What an attention kernel must do to be a backend of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Needs:
    """What a run asks of its attention.

    `capability`: of the CUDA device, (0, 0) without one; `blocks`: keys lie on several ranks, so partial answers are
    merged; `deterministic`: the same inputs give the same bits.
    """

    device: str
    dtype: torch.dtype
    capability: tuple[int, int] = (0, 0)
    blocks: bool = False
    deterministic: bool = False


class Backend(Protocol):
    """Unmasked softmax attention with scale 1/sqrt(D): q [B, Lq, H, D]; k, v [B, Lk, H, D], of one dtype."""

    name: str

    def obstacle(self, needs: Needs) -> str:
        """Why it cannot run here, in a few words; empty if it can."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, Lq, H, D], differentiable."""

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The same and the log-sum-exp of the scaled scores [B, H, Lq] (at least float32). Neither carries gradients:
        who merges partial answers writes the backward of the merge."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k, v for a block of keys, given output and log-sum-exp over *all* keys of these queries.

        grad, q, out [B, Lq, H, D]; k, v [B, Lk, H, D]; lse [B, H, Lq]. The sum of dq over the blocks is the whole dq:
        P = exp(S - lse) and rowsum(dO·O) are those of the whole row, whatever keys the block holds. This is what a
        ring or a merge over ranks needs (arXiv 2205.14135, appendix B.2).
        """


def needs_cuda(needs: Needs, capabilities: tuple[int, ...]) -> str:
    """The obstacles that all kernels for matrix units of CUDA devices share; `capabilities`: major versions."""
    if needs.device != "cuda":
        return f"needs a CUDA device, not {needs.device}"
    if needs.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {str(needs.dtype).removeprefix('torch.')}"
    if needs.capability[0] not in capabilities:
        built = ", ".join(f"{major}.x" for major in capabilities)
        return f"is built for compute capability {built}, this device has {'.'.join(map(str, needs.capability))}"
    return ""
