"""Names of Wan's original files -> names of diffusers and transformers: one to one, no tensor is changed."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from data.codec import CodecError

LEVELS, RESNETS = 4, 2  # of the VAE: sizes, residual blocks of each when encoding (one more when decoding)
INSIDE = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
          "shortcut": "conv_shortcut"}  # fmt: skip
TOP = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
CODER = {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out", "middle.0": "mid_block.resnets.0",
         "middle.1": "mid_block.attentions.0", "middle.2": "mid_block.resnets.1"}  # fmt: skip
TEXT = {
    "token_embedding": "shared",
    "norm": "encoder.final_layer_norm",
    "norm1": "layer.0.layer_norm",
    "norm2": "layer.1.layer_norm",
    **{f"attn.{one}": f"layer.0.SelfAttention.{one}" for one in "qkvo"},
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def vae_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of Wan2.1_VAE.pth, for AutoencoderKLWan. CodecError for a name that the VAE doesn't have."""
    return {_vae_name(name): tensor for name, tensor in state.items()}


def _vae_name(name: str) -> str:
    stem, _, leaf = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{leaf}"
    side, _, rest = stem.partition(".")
    if side not in ("encoder", "decoder"):
        raise CodecError(f"{name} is not a name of Wan's VAE")
    if rest in CODER:
        return f"{side}.{CODER[rest]}.{leaf}"
    for start in ("middle.0.", "middle.1.", "middle.2."):
        if rest.startswith(start):
            return f"{side}.{CODER[start[:-1]]}.{_inside(rest.removeprefix(start))}.{leaf}"
    match = re.fullmatch(r"(downsamples|upsamples)\.(\d+)\.(.+)", rest)
    if match is None:
        raise CodecError(f"{name} is not a name of Wan's VAE")
    number, inner = int(match[2]), _inside(match[3])
    if side == "encoder":
        return f"encoder.down_blocks.{number}.{inner}.{leaf}"
    block, place = divmod(number, RESNETS + 2)  # three residual blocks and what enlarges
    where = f"upsamplers.{place - RESNETS - 1}" if place == RESNETS + 1 else f"resnets.{place}"
    return f"decoder.up_blocks.{block}.{where}.{inner}.{leaf}"


def _inside(name: str) -> str:
    return INSIDE.get(name, name)


def text_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of models_t5_umt5-xxl-enc-bf16.pth, for UMT5EncoderModel. CodecError for a name that it doesn't have."""
    found = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.weight", name)
        if match is None or match[2] not in TEXT:
            raise CodecError(f"{name} is not a name of Wan's text encoder")
        block = f"encoder.block.{match[1]}." if match[1] is not None else ""
        found[f"{block}{TEXT[match[2]]}.weight"] = tensor
    return found
