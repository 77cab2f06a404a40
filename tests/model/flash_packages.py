"""Stand-ins for the flash-attn packages, with the signatures and return values that their versions have.

They compute attention by its definition, so what passes through them can be compared, and write down how they were
called (`CALLS`). `write(folder, *names)` puts packages where Python finds them.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from model.backends import flash

CALLS: list[tuple[str, dict[str, Any]]] = []


def forward(q, k, v, **options):
    """(out, log-sum-exp), differentiable. Called by the packages."""
    CALLS.append(("forward", options))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v), scores.logsumexp(-1)


def backward(dout, q, k, v, out, lse, **options):
    """(dq, dk, dv) of a block of keys. Called by the packages."""
    CALLS.append(("backward", options))
    scale = q.shape[-1] ** -0.5
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) * scale - lse.unsqueeze(-1)).exp()
    inner = torch.einsum("bihd,bjhd->bhij", dout, v) - (dout * out).sum(-1).transpose(1, 2).unsqueeze(-1)
    inner = inner * weights * scale
    dq, dk = torch.einsum("bhij,bjhd->bihd", inner, k), torch.einsum("bhij,bihd->bjhd", inner, q)
    return dq, dk, torch.einsum("bhij,bihd->bjhd", weights, dout)


HEAD = """
from typing import Optional
import torch
from torch import Tensor
from tests.model import flash_packages as stub
"""
# name of the package: {file: text}
FLASH2_FUNC = (
    HEAD
    + """
def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                    alibi_slopes=None, deterministic=False, return_attn_probs=False):
    out, lse = stub.forward(q, k, v, deterministic=deterministic)
    return (out, lse, None) if return_attn_probs else out
"""
)
FLASH2_BACKWARD = (
    HEAD
    + """
@torch.library.custom_op("flash_attn_stub::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
        dq: Optional[Tensor], dk: Optional[Tensor], dv: Optional[Tensor], dropout_p: float, softmax_scale: float,
        causal: bool, window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Optional[Tensor],
        deterministic: bool, rng_state: Optional[Tensor] = None) -> Tensor:
    assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
    found = stub.backward(dout, q, k, v, out, softmax_lse, deterministic=deterministic)
    for target, value in zip((dq, dk, dv), found):
        target.copy_(value)
    return softmax_lse.clone()
"""
)
FLASH3_NEW = (
    HEAD
    + """
def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
                    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None,
                    deterministic=False, sm_margin=0, return_attn_probs=False):
    out, lse = stub.forward(q, k, v, deterministic=deterministic)
    return (out, lse) if return_attn_probs else out

@torch.library.custom_op("flash_attn_3_stub::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
        cu_seqlens_q: Optional[Tensor] = None, cu_seqlens_k: Optional[Tensor] = None,
        max_seqlen_q: Optional[int] = None, max_seqlen_k: Optional[int] = None, dq: Optional[Tensor] = None,
        dk: Optional[Tensor] = None, dv: Optional[Tensor] = None, softmax_scale: Optional[float] = None,
        is_causal: bool = False, window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
        deterministic: bool = False, sm_margin: int = 0) -> Tensor:
    found = stub.backward(dout, q, k, v, out, softmax_lse, deterministic=deterministic)
    for target, value in zip((dq, dk, dv), found):
        target.copy_(value)
    return softmax_lse.clone()
"""
)
FLASH3_OLD = (
    HEAD
    + """
def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False):
    return stub.forward(q, k, v, deterministic=deterministic)

def _flash_attn_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q,
                         max_seqlen_k, dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0,
                         deterministic=False, sm_margin=0):
    assert (cu_seqlens_q, sequed_k, max_seqlen_q, causal) == (None, None, None, False)
    found = stub.backward(dout, q, k, v, out, softmax_lse, deterministic=deterministic)
    for target, value in zip((dq, dk, dv), found):
        target.copy_(value)
    return dq, dk, dv, softmax_lse
"""
)
FLASH4_INTERFACE = (
    HEAD
    + """
def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
                    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, mask_mod=None, return_lse=False):
    out, lse = stub.forward(q, k, v, deterministic=deterministic)
    return out, lse if return_lse or q.requires_grad else None

def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
                    window_size_right=None, m_block_size=64, deterministic=False):
    return stub.backward(dout, q, k, v, out, lse, deterministic=deterministic)
"""
)
CUTE = "from .interface import flash_attn_func\n"
PACKAGES: dict[str, dict[str, str]] = {
    "flash2": {"flash_attn/__init__.py": FLASH2_FUNC, "flash_attn/flash_attn_interface.py": FLASH2_BACKWARD},
    # What flash-attn 2.8 installs beside itself: flash 4's sources, without what they need.
    "a cute folder that cannot be imported": {"flash_attn/cute/__init__.py": "import cutlass_of_nobody\n"},
    "flash3": {"flash_attn_interface.py": FLASH3_NEW},
    "old flash3": {"flash_attn_interface.py": FLASH3_OLD},
    "flash4": {"flash_attn/cute/__init__.py": CUTE, "flash_attn/cute/interface.py": FLASH4_INTERFACE},
    "flash4 without deterministic": {
        "flash_attn/cute/__init__.py": CUTE,
        "flash_attn/cute/interface.py": FLASH4_INTERFACE.replace("64, deterministic=False", "64").replace(
            "lse, deterministic=deterministic)", "lse)"
        ),
    },
    "flash2 without its function": {
        "flash_attn/__init__.py": "", "flash_attn/flash_attn_interface.py": FLASH2_BACKWARD,
    },
    "flash3 without its backward": {"flash_attn_interface.py": FLASH3_NEW.replace("def _flash_attn_b", "def _b")},
    "flash2 whose library does not load": {
        "flash_attn/__init__.py": "raise OSError('flash_attn_2_cuda.so: undefined symbol: _ZN3c105Error')\n",
    },
    "flash3 that asserts": {"flash_attn_interface.py": "raise RuntimeError('only sm_90a\\nsecond line')\n"},
    "flash3 that wants more": {
        "flash_attn_interface.py": FLASH3_OLD.replace("scale, causal, w", "scale, causal, block_mask, w")
    },
    "flash3 that wants more of q": {
        "flash_attn_interface.py": FLASH3_OLD.replace("func(q, k, v, soft", "func(q, k, v, descale, soft")
    },
    "flash3 with another log-sum-exp": {
        "flash_attn_interface.py": FLASH3_NEW.replace("(out, lse) if", "(out, lse.transpose(1, 2)) if")
    },
    "flash3 that never gives it": {"flash_attn_interface.py": FLASH3_NEW.replace("(out, lse) if", "out if")},
}  # fmt: skip


def write(folder: Path, *names: str) -> Path:
    """A folder with these packages of PACKAGES."""
    for name in names:
        for file, text in PACKAGES[name].items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return folder


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """While entered, the packages of this folder are the ones that Python finds, and nothing was imported yet."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("flash_attn", "flash_attn_interface")]:
        del sys.modules[name]
    flash._load.cache_clear()
    CALLS.clear()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
