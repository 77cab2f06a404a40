"""The schedule of a modality: its shift maps a position u in 0..1 to a noise level sigma = s·u / (1 + (s - 1)·u).

Training draws u and sampling walks it from 1 to 0, so both take the formula from here (arXiv 2602.08794, section 4.3).
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

N = TypeVar("N", float, Tensor)


def shift_sigma(u: N, shift: float) -> N:
    """The noise level at u, both in 0..1."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_sigma(sigma: N, shift: float) -> N:
    """The u that `shift_sigma` maps to sigma."""
    return sigma / (shift - (shift - 1) * sigma)
