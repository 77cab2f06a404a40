"""Maps the tensor names of a tower to those of diffusers, and back. Original Wan and MOVA use the model's own.

Shapes are the same in all layouts, nothing is transposed, split or fused. A trap: what diffusers calls norm2 is norm3
here (its own norm3 has no weights).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

TOP = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
BLOCK = {
    **{
        f"{ours}.{mine}": f"{theirs}.{its}"
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for mine, its in (
            ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"), ("norm_k", "norm_k")
        )
    },
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}  # fmt: skip
IN_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")
# Of Wan 2.1's image-to-video model, which is told the first frame by CLIP too; MOVA's towers lack these.
CLIP = re.compile(
    r"img_emb\.|.*\.(norm_)?[kv]_img\.|condition_embedder\.image_embedder\.|.*attn2\.(norm_)?add(ed)?_[kv]"
)


def to_diffusers(name: str) -> str:
    """A tower's own name in diffusers' WanTransformer3DModel. KeyError for one that it does not have."""
    return _translated(name, TOP, BLOCK)


def from_diffusers(name: str) -> str | None:
    """The tower's own name of a tensor of WanTransformer3DModel, or None for one that no tower of MOVA has."""
    try:
        return _translated(name, {v: k for k, v in TOP.items()}, {v: k for k, v in BLOCK.items()})
    except KeyError:
        return None


def are_diffusers(names: Iterable[str]) -> bool:
    """Whether a tower's tensors are named as in diffusers."""
    return any(name.startswith(("condition_embedder.", "proj_out.")) for name in names)


def clip_names(names: Iterable[str]) -> list[str]:
    """The names of tensors that feed CLIP features into the network."""
    return [name for name in names if CLIP.match(name)]


def _translated(name: str, top: dict[str, str], block: dict[str, str]) -> str:
    match = IN_BLOCK.fullmatch(name)
    before, rest, table = (match[1], match[2], block) if match else ("", name, top)
    if rest in table:
        return before + table[rest]
    module, _, leaf = rest.rpartition(".")
    if leaf not in ("weight", "bias"):
        raise KeyError(name)
    return f"{before}{table[module]}.{leaf}"
