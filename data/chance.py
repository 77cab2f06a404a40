"""Random numbers of a sample: a pure function of (seed, purpose, global sample number).

Counter-based (numpy's Philox): the same on every machine and under every layout, and no two samples share them.
"""

from __future__ import annotations

import hashlib

import numpy as np


def philox(seed: int, purpose: str, sample: int) -> np.random.Philox:
    """The bits of one purpose of one sample. Key: hash of (seed, purpose); counter: the sample number on top."""
    key = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:16]
    # The low three words of the 256-bit counter are left for the numbers drawn: samples cannot run into each other.
    counter = np.array([0, 0, 0, sample], dtype=np.uint64)
    return np.random.Philox(key=int.from_bytes(key, "little"), counter=counter)
