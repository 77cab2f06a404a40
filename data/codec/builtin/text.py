"""Captions -> text embeddings [L, D] without weights, the same on every platform.

A row a word: the sum of random signs drawn for the word and for its letter trigrams (so that "ball" and "balls" are
near), plus a sinusoidal position. The signs come from Philox, keyed by SHA-256 of the text; no floating-point random
numbers are involved. Elements have a root mean square of 1.
"""

import hashlib
import math
import re
import unicodedata
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

DIM = 4096
POSITION = 0.5  # weight of the position beside the word, 1
EMPTY = ""  # the word of the empty caption's one row; no real word can be empty
NORM = math.sqrt(1 + POSITION**2 / 2)  # a sine's mean square is 1/2

fingerprint = "hash-text-1"


def encode(caption: str, dim: int = DIM) -> Tensor:
    """float32 [L, dim], a row for each word and punctuation mark; the empty caption gives one fixed row.

    ValueError when dim is odd or below 8.
    """
    if dim < 8 or dim % 2:
        raise ValueError(f"dim is {dim}; expected an even number of at least 8")
    words = split(caption) or [EMPTY]
    rows = torch.stack([_word(word, dim) for word in words])
    return (rows + POSITION * _positions(len(words), dim)) / NORM


def split(caption: str) -> list[str]:
    """Words and punctuation marks, in lower case and one Unicode form."""
    return re.findall(r"\w+|[^\w\s]", unicodedata.normalize("NFKC", caption).lower())


@lru_cache(maxsize=4096)
def _word(word: str, dim: int) -> Tensor:
    """[dim], root mean square 1: half the energy is the word's own, half is shared with words of like spelling."""
    padded = f"<{word}>"
    grams = [padded[i : i + 3] for i in range(len(padded) - 2)] or [padded]
    spelling = np.sum([_signs("gram", gram, dim) for gram in grams], axis=0).astype(np.float64)
    vector = _signs("word", word, dim) + spelling / max(float(np.sqrt(np.mean(spelling**2))), 1e-6)
    return torch.from_numpy(vector / np.sqrt(np.mean(vector**2))).float()


def _signs(kind: str, text: str, dim: int) -> np.ndarray:
    """[dim] int64 of -1 and 1."""
    key = np.frombuffer(hashlib.sha256(f"{kind}:{text}".encode()).digest()[:16], dtype="<u8").astype(np.uint64)
    words = np.random.Philox(key=key).random_raw(-(-dim // 64)).astype("<u8")
    return 2 * np.unpackbits(words.view(np.uint8), bitorder="little")[:dim].astype(np.int64) - 1


def _positions(length: int, dim: int) -> Tensor:
    """[length, dim]: sines in the first half, cosines in the second, wavelengths from 2 pi to 20,000 pi words."""
    rates = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()
