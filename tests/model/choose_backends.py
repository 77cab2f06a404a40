"""Run by test_backends.py: what is chosen with each set of packages, and whether it computes attention.

python -m tests.model.choose_backends FOLDER        # sets.json of that folder -> found.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from model.backends.choice import choose
from model.backends.interface import Backend, Needs
from tests.model import flash_packages


def with_packages(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """One set of packages: what `choose` says, and the largest error of the backend's three functions."""
    needs = Needs("cuda", torch.bfloat16, tuple(case["capability"]), True, case["deterministic"])
    with flash_packages.importable(folder):
        try:
            choice = choose(case["asked"], needs)
            found = {"chosen": choice.backend.name, "said": choice.describe()}
            if choice.backend.name.startswith("flash"):
                found["error"] = largest_error(choice.backend)
                found["deterministic"] = [options["deterministic"] for _, options in flash_packages.CALLS if options]
            return found
        except RuntimeError as error:
            return {"refused": str(error)}


def largest_error(backend: Backend) -> float:
    """Of output, log-sum-exp and gradients, whole and over two blocks of keys, in float64."""
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, n, 3, 8, generator=g).double() for n in (5, 7, 7, 5))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    scores = torch.einsum("bihd,bjhd->bhij", *leaves[:2]) / 8**0.5
    out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), leaves[2])
    true = [out, *torch.autograd.grad(out, leaves, grad)]
    answer = backend(*leaves)
    found = [answer, *torch.autograd.grad(answer, leaves, grad)]
    pairs = list(zip(found, true, strict=True))
    with torch.no_grad():
        whole, lse = backend.with_lse(q, k, v)
        pairs += [(whole, out), (lse, scores.logsumexp(-1))]
        parts = [backend.backward(grad, q, k[:, ends], v[:, ends], whole, lse) for ends in (slice(3), slice(3, 7))]
        pairs += [(parts[0][0] + parts[1][0], true[1])]
        pairs += [(torch.cat([part[i] for part in parts], 1), true[1 + i]) for i in (1, 2)]
    return max((a - b).abs().max().item() for a, b in pairs)


if __name__ == "__main__":
    here = Path(sys.argv[1])
    cases = json.loads((here / "sets.json").read_text())
    results = {name: with_packages(here / name, case) for name, case in cases.items()}
    (here / "found.json").write_text(json.dumps(results))
