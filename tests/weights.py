"""Small checkpoints of the true names, layouts and configs, made by the libraries that publish them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from model.bridge import BridgeConfig
from model.convert import save_mova
from model.joint import JointConfig, JointTransformer
from model.tower import TowerConfig

FILE = "diffusion_pytorch_model.safetensors"
# Heads of 48 and 128 channels: for other widths diffusers splits its positions otherwise. 6 is the text width of the
# tests' datasets.
VIDEO = {"num_attention_heads": 1, "attention_head_dim": 48, "ffn_dim": 64, "freq_dim": 32, "num_layers": 2}


def joint_config(two_experts: bool = True, text_dim: int = 6) -> JointConfig:
    """A model of MOVA's kind whose video experts are of the sizes of VIDEO."""
    shared = {"num_heads": 1, "ffn_dim": 64, "freq_dim": 32, "text_dim": text_dim, "dim": 48}
    return JointConfig(
        TowerConfig(num_layers=2, in_dim=36, out_dim=16, **shared),
        TowerConfig(num_layers=1, in_dim=128, out_dim=128, patch_size=[1], rope="dac", **shared),
        BridgeConfig(head_dim=48),
        two_experts,
    )


def diffusers_model(seed: int, text_dim: int = 6, **more):
    """WanTransformer3DModel of diffusers, every parameter random."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    model = WanTransformer3DModel(**{**VIDEO, "in_channels": 36, "out_channels": 16, "text_dim": text_dim, **more})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model.eval()


def diffusers_folder(root: Path, shard: str = "10GB", **more) -> Path:
    """A Wan 2.2 pipeline's transformers as diffusers saves them; `shard`: the most that a file holds."""
    for seed, name in enumerate(("transformer", "transformer_2")):
        diffusers_model(seed, **more).save_pretrained(root / name, max_shard_size=shard)
    return root


def own_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' tensors under original Wan's names, by the table of its conversion script, read backwards."""
    blocks = {
        "attn1.to_q": "self_attn.q", "attn1.to_k": "self_attn.k", "attn1.to_v": "self_attn.v",
        "attn1.to_out.0": "self_attn.o", "attn1.norm_q": "self_attn.norm_q", "attn1.norm_k": "self_attn.norm_k",
        "attn2.to_q": "cross_attn.q", "attn2.to_k": "cross_attn.k", "attn2.to_v": "cross_attn.v",
        "attn2.to_out.0": "cross_attn.o", "attn2.norm_q": "cross_attn.norm_q", "attn2.norm_k": "cross_attn.norm_k",
        "norm2": "norm3", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
    }  # fmt: skip
    top = {
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "proj_out": "head.head",
    }
    found = {}
    for name, tensor in state.items():
        if name.endswith("scale_shift_table"):
            own = "head.modulation" if name == "scale_shift_table" else name.replace("scale_shift_table", "modulation")
        else:
            stem, leaf = name.rsplit(".", 1)
            start, rest = (
                (".".join(stem.split(".")[:2]) + ".", stem.split(".", 2)[2]) if "blocks" in stem else ("", stem)
            )
            own = start + (blocks if start else top).get(rest, rest) + "." + leaf
        found[own] = tensor.contiguous()
    return found


def original_folder(root: Path, text_dim: int = 6) -> Path:
    """The experts of `diffusers_folder` as original Wan 2.2 has them: two shards with an index, a config without
    patch_size and text_dim."""
    for seed, name in enumerate(("high_noise_model", "low_noise_model")):
        write_original(root / name, own_names(diffusers_model(seed, text_dim).state_dict()), in_dim=36)
    return root


def write_original(folder: Path, tensors: dict[str, torch.Tensor], **config) -> Path:
    """One expert of original Wan in two shards."""
    folder.mkdir(parents=True)
    names = sorted(tensors)
    files = {f"diffusion_pytorch_model-0000{k + 1}-of-00002.safetensors": names[k::2] for k in range(2)}
    for file, keys in files.items():
        save_file({key: tensors[key] for key in keys}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, keys in files.items() for key in keys}}
    (folder / f"{FILE}.index.json").write_text(json.dumps(index))
    written = {
        "_class_name": "WanModel", "_diffusers_version": "0.33.0", "dim": 48, "eps": 1e-6, "ffn_dim": 64,
        "freq_dim": 32, "model_type": "i2v", "num_heads": 1, "num_layers": 2, "out_dim": 16, "text_len": 512, **config,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def mova_folder(root: Path, config: JointConfig | None = None, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A folder as the reference saves it, every parameter random, in bfloat16 as it is released."""
    model = JointTransformer(config or joint_config())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    save_mova(model.to(dtype), root)
    return root


def folder_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder of safetensors files, by the library."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found
