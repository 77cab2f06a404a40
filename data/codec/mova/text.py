"""Captions -> embeddings [L, 4096] of UMT5, by transformers: cleaned, 512 tokens at most, stored unpadded.

Each caption is encoded by itself and padded to 512 tokens, as Wan and MOVA do; the rows of its own tokens are kept. The
empty prompt is one row, that of the end token.
"""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.codec import CodecError, EncoderConfig, TextCodec
from data.codec.mova import PREFIXES
from data.codec.mova.device import computing, dtype_of
from data.codec.mova.originals import text_names
from data.codec.mova.weights import find_part, fingerprint, hash_state, load_into, read_config, read_state

REVISION = 1  # raised whenever the same weights and words would give other rows
LENGTH = 512
VOCABULARY = ("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SETTINGS = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj",
            "relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon")  # fmt: skip
XXL: dict[str, Any] = {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}  # fmt: skip
COPY = "encoder.embed_tokens.weight"  # the same table as SHARED, which some files hold too, or alone
SHARED = "shared.weight"


class MovaText(TextCodec):
    """path: folder of the encoder, or Wan's original file; vocabulary: folder of the tokenizer."""

    on_device = True
    packages = ("tokenizers", "torch", "transformers")

    def __init__(self, path: Path, vocabulary: Path, config: EncoderConfig, device: str, text_dim: int | None):
        self.path, self.vocabulary, self.device = path, vocabulary, torch.device(device)
        self.precision, self.dtype = config.text_dtype, dtype_of(config.text_dtype, "encoder.text_dtype")
        given = read_config(path) if path.is_dir() else XXL
        self.config = {name: given.get(name, XXL[name]) for name in SETTINGS}
        for name, value in self.config.items():
            usual = XXL[name]
            if not isinstance(value, int | float if isinstance(usual, float) else type(usual)):
                expected = "a text" if isinstance(usual, str) else "a number"
                raise CodecError(f"{path}: {name} is {value!r}, expected {expected}, for example {usual}")
        if text_dim is not None and text_dim != self.dim:
            raise CodecError(f"text of width {text_dim} is asked for, {path} gives {self.dim}")

    @property
    def dim(self) -> int:
        return int(self.config["d_model"])

    @cached_property
    def fingerprint(self) -> str:
        files = [self.vocabulary / name for name in VOCABULARY]
        words = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}
        state = hash_state(self._state())
        return fingerprint(
            PREFIXES["text"], REVISION, self.config, self.precision, LENGTH, words, f"ftfy {version('ftfy')}", state
        )

    def _state(self) -> dict[str, Tensor]:
        """By transformers' names; the table of tokens once, as SHARED."""
        state = read_state(self.path)
        if not self.path.is_dir():
            state = text_names(state)
        copy = state.pop(COPY, None)
        if copy is not None and not torch.equal(state.setdefault(SHARED, copy), copy):
            raise CodecError(f"{self.path}: {SHARED} and {COPY} differ, they are one table in UMT5's encoder")
        if SHARED not in state:
            raise CodecError(f"{self.path} lacks {SHARED}: these are weights of another network")
        return state

    @cached_property
    def _model(self) -> Any:
        from transformers import UMT5Config, UMT5EncoderModel

        with torch.device("meta"):
            model: Any = UMT5EncoderModel(UMT5Config(**self.config))
        state = {name: tensor.to(self.dtype) for name, tensor in self._state().items()}
        load_into(model, state | {COPY: state[SHARED]}, self.path)
        table = model.encoder.embed_tokens.weight
        if not torch.equal(table, state[SHARED]) or not bool(table.any()):
            raise CodecError(f"{self.path}: the encoder does not read the table of tokens of its file ({SHARED})")
        return model.eval().requires_grad_(False)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(self.vocabulary), local_files_only=True)
        except Exception as error:  # each kind of damage has its own class
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CodecError(f"{self.vocabulary} holds no tokenizer ({reason})") from None

    @property
    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self._model.parameters())

    def release(self) -> None:
        if "_model" in self.__dict__:
            self._model.to("cpu")

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        with computing(self.device, self.precision):
            model = self._model.to(self.device)
            return [self._one(model, clean(caption)) for caption in captions]

    def _one(self, model: Any, caption: str) -> Tensor:
        tokens = self._tokenizer(
            caption, padding="max_length", max_length=LENGTH, truncation=True, add_special_tokens=True,
            return_attention_mask=True, return_tensors="pt",
        ).to(self.device)  # fmt: skip
        rows = model(tokens.input_ids, tokens.attention_mask).last_hidden_state[0]
        kept: Tensor = rows[: int(tokens.attention_mask.sum())].float().cpu()
        if not bool(kept.isfinite().all()):
            raise CodecError(f"{self.path} gives NaN or inf for the caption {caption[:80]!r}: its weights are damaged")
        return kept


def clean(caption: str) -> str:
    """As Wan's pipelines do: broken encodings repaired (ftfy), HTML's escapes resolved, white space joined."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(caption))).strip()
    return re.sub(r"\s+", " ", text).strip()


def make(place: str, config: EncoderConfig, device: str, text_dim: int | None) -> MovaText:
    """From a folder with text_encoder and tokenizer, or from Wan's original file beside google/umt5-xxl."""
    path = find_part(place, ("text_encoder",), ("models_t5_umt5-xxl-enc-bf16.pth",), "encoder.text_folder")
    near = path.parent
    folders = [near / "tokenizer", near / "google" / "umt5-xxl", path if path.is_dir() else near]
    for folder in folders:
        if any((folder / name).is_file() for name in VOCABULARY[:2]):
            return MovaText(path, folder, config, device, text_dim)
    raise CodecError(
        f"encoder.text_folder={place}: no tokenizer beside {path} (looked in {', '.join(map(str, folders))})"
    )
