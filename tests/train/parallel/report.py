"""Every layout against one process, as a table for people.

python -m tests.train.parallel.report                            # writes bench/results/layouts.md
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.distributed import run_cases
from tests.train import cases
from tests.train.parallel import parity
from tests.train.parallel.test_layouts import FOUR, PLANTED, ROUNDED, TWO
from tools.bench.record import write_record


def main() -> None:
    """Run the tables of test_layouts and write what they measured."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for heads, asked in {(c.heads, c.asked) for t in (TWO, FOUR, ROUNDED, PLANTED) for c in t.values()}:
            parity.expected(folder, heads, asked)
        for dtype in (torch.float32, torch.bfloat16):
            parity.expected(folder, 5, "all", dtype)
        one = {
            name: parity.rounding(folder, 5, getattr(torch, c.parallel["compute_dtype"]), 2)
            for name, c in ROUNDED.items()
        }
        for ranks, table in ((2, TWO), (4, FOUR)):
            results = run_cases(ranks, {name: (parity.parity, (folder, case)) for name, case in table.items()})
            rows += [(f"{ranks} ranks: {name}", exact(outcomes)) for name, outcomes in results.items()]
        more = {
            **{name: (parity.parity, (folder, case)) for name, case in ROUNDED.items()},
            **{f"planted: {fault}": (parity.parity, (folder, case, fault)) for fault, case in PLANTED.items()},
            "adamw64": (cases.adamw_parity, ("float64", 0)),
            **{f"adamw32 {seed}": (cases.adamw_parity, ("float32", seed)) for seed in range(5)},
        }
        results = run_cases(2, more)
    for name in ROUNDED:
        values = [*map(largest, results[name]), largest(one[name])]
        text = "; ".join(f"{max(found):.0e} ({rounding:.0e})" for *found, rounding in zip(*values, strict=True))
        rows.append((f"2 ranks: {name}: loss; gradients of a part; moved (one process)", text))
    rows += [(name, exact(results[name])) for name in more if name.startswith("planted")]
    rows.append(("2 ranks: what 3 clipped AdamW steps moved, float64", f"{max(results['adamw64']):.0e}"))
    spread = sorted(max(results[f"adamw32 {seed}"]) for seed in range(5))
    rows.append(("the same in float32, five batches", ", ".join(f"{value:.0e}" for value in spread)))
    path = Path("bench/results/layouts.md")
    title = "Layouts against one process, float64: loss; global norm; worst gradient; worst parameter at the end"
    write_record(path, title, "python -m tests.train.parallel.report", rows, NOTES)
    print(path.read_text())


def worst(outcomes: list[dict[str, Any]], key: str) -> float:
    """The largest of the ranks' differences."""
    return max(o[key][0] if isinstance(o[key], tuple) else o[key] for o in outcomes)


def largest(outcome: dict[str, Any]) -> tuple[float, float, float]:
    """Errors in another dtype: of the loss, of the gradients of the worst part, of what was moved."""
    return outcome["loss"], max(outcome["gradients"].values()), outcome["moved"]


def exact(outcomes: list[dict[str, Any]]) -> str:
    """One row's differences."""
    return "; ".join(f"{worst(outcomes, key):.0e}" for key in ("loss", "norm", "gradient", "parameters"))


NOTES = (
    "Relative differences, the worst of all ranks. Model of 3 video blocks, 2 of which meet sound, heads of 8, pooled "
    "AdaLN and a trained condition scale with 3 and 5 heads; 15 video tokens, 403 of sound; of 4 samples one without "
    "sound, one without video, one of weight 0. Two to five clipped SGD steps, both experts in turn. given: other text "
    "for the sound and a Bridge factor for each sample; mute, blind: the forward without sound, without video. Rows "
    "that begin with planted have a fault in them, which must be seen. AdamW in float32 turns rounding into a whole "
    "step where a gradient is as good as zero, so a batch in which that happens to single elements passes 1e-4."
)


if __name__ == "__main__":
    main()
