"""Every layout against one process, as a table for people.

python -m tests.train.report                            # writes bench/layouts.md
"""

from pathlib import Path

from tests.distributed import run_cases
from tests.train import cases
from tests.train.test_layouts import FOUR, TWO
from tools.bench.record import write_record


def main() -> None:
    """Run the table of test_layouts and write what it measured."""
    rows = []
    for ranks, table in ((2, TWO), (4, FOUR)):
        results = run_cases(ranks, {name: (cases.gradient_parity, case) for name, case in table.items()})
        for name, outcomes in results.items():
            gradient = max(outcome["gradient"] for outcome in outcomes)
            norm = max(outcome["norm"] for outcome in outcomes)
            loss = max(outcome["sums"] for outcome in outcomes)
            rows.append((f"{ranks} ranks: {name}", f"{gradient[0]:.1e} ({gradient[1]}); {norm:.0e}; {loss:.0e}"))
    more = {
        "sgd": (cases.sgd_parity, ({},)),
        "adamw64": (cases.adamw_parity, ("float64", 0)),
        **{f"adamw32 {seed}": (cases.adamw_parity, ("float32", seed)) for seed in range(5)},
    }
    results = run_cases(2, more)
    rows.append(("2 ranks: parameters after 3 SGD steps, float64", f"{max(results['sgd'])[0]:.1e}"))
    rows.append(("2 ranks: what 3 clipped AdamW steps moved, float64", f"{max(results['adamw64']):.1e}"))
    rounded = sorted(max(results[f"adamw32 {seed}"]) for seed in range(5))
    rows.append(("the same in float32, five batches", ", ".join(f"{value:.0e}" for value in rounded)))
    path = Path("bench") / "layouts.md"
    title = "Layouts against one process: worst parameter's gradient; global norm; loss (relative, float64)"
    write_record(path, title, "python -m tests.train.report", rows, NOTES)
    print(path.read_text())


NOTES = (
    "Model of 2 video blocks with a Bridge, pooled AdaLN and a trained condition scale; 18 video tokens, which 4 ranks "
    "do not divide; one sample without sound, one of weight 0. AdamW in float32 turns rounding into a whole step where "
    "a gradient is as good as zero, so a batch in which that happens to single elements passes 1e-4."
)


if __name__ == "__main__":
    main()
