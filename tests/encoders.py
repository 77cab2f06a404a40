"""Tiny encoders of the true classes and formats, as a MOVA folder: all names and strides of the published weights.

    python -m tests.encoders FOLDER [SEED]     # under a CPU minute

`tiny_encoders` makes them once and keeps them beside the other temporary files of this machine.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from data.codec.mova.dac import Dac, DacConfig

TEXT = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
DAC = {"encoder_dim": 8, "decoder_dim": 64, "latent_dim": 128}
WORDS = "a the red blue green small large ball box drop rises falls hits floor tone click hum bright dark".split()  # noqa: SIM905


def make_encoders(folder: Path, seed: int = 0) -> None:
    """Write video_vae, audio_vae, text_encoder and tokenizer. Other seeds have other weights, of the same sizes."""
    _tokenizer(folder / "tokenizer")
    _text(folder / "text_encoder", folder / "tokenizer", seed)
    _video(folder / "video_vae", seed)
    _audio(folder / "audio_vae", seed)


def tiny_encoders(seed: int = 0) -> Path:
    """The folder of `make_encoders`; made by the first who asks."""
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"mova-tiny-encoders-{source}-{seed}"
    with open(f"{folder}.lock", "a") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            make_encoders(partial, seed)
            os.rename(partial, folder)
    return folder


def _tokenizer(folder: Path) -> None:
    import sentencepiece

    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    lines = [" ".join(random.choice(WORDS, random.integers(4, 12))) + "." for _ in range(500)]
    (folder / "lines.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "lines.txt"), model_prefix=str(folder / "spiece"), vocab_size=120, hard_vocab_limit=False,
        model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    for name in ("lines.txt", "spiece.vocab"):
        (folder / name).unlink()
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "pad_token": "<pad>", "eos_token": "</s>",
                "unk_token": "<unk>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _text(folder: Path, tokenizer: Path, seed: int) -> None:
    from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    vocabulary = len(AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True))
    model = UMT5EncoderModel(UMT5Config(vocab_size=vocabulary, **TEXT))
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))  # as published
    save_file({"shared.weight": model.shared.weight.detach().clone()} | {
        name: tensor.clone() for name, tensor in model.state_dict().items() if "embed_tokens" not in name
    }, folder / "model.safetensors", {"format": "pt"})  # fmt: skip


def _video(folder: Path, seed: int) -> None:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(seed)
    model = AutoencoderKLWan(base_dim=8)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(_unit_gain(name, tensor))
    model.save_pretrained(folder)


def _unit_gain(name: str, tensor: Tensor) -> Tensor:
    """Signals keep their size, so that latents have about unit variance and all layers matter."""
    if name.endswith("gamma"):
        return 1 + 0.1 * torch.randn_like(tensor)
    if tensor.ndim < 2:
        return 0.02 * torch.randn_like(tensor)
    return torch.randn_like(tensor) / tensor[0].numel() ** 0.5


def _audio(folder: Path, seed: int) -> None:
    """With weight norm by the old names, as published, and alphas that are not 1."""
    torch.manual_seed(seed)
    model = Dac(DacConfig(**DAC))  # type: ignore[arg-type]
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("alpha"):
            state[name] = 0.5 + torch.rand_like(tensor)
        elif name.endswith("weight") and not name.startswith(("quant_conv", "post_quant_conv")):
            state[f"{name}_v"] = torch.randn_like(tensor) / tensor[0].numel() ** 0.5
            norm = state[f"{name}_v"].flatten(1).norm(dim=1).view(-1, 1, 1)
            inner = 0.3 if re.search(r"\.block\.\d+\.block\.3\.weight", name) else 1.0  # residual units add little
            state[f"{name}_g"] = inner * norm * (0.9 + 0.2 * torch.rand_like(norm))
        else:
            state[name] = torch.randn_like(tensor) / max(1, tensor[0].numel()) ** 0.5 * (0.1 if tensor.ndim < 2 else 1)
    folder.mkdir(parents=True)
    save_file(state, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    config = {"_class_name": "DAC", "continuous": True, "use_weight_norm": True, "sample_rate": 48000, **DAC,
              "encoder_rates": [2, 3, 4, 5, 8], "decoder_rates": [8, 5, 4, 3, 2], "n_codebooks": 9}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    make_encoders(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
