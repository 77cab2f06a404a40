"""Faults of the planner, each with its own tests (tests/plant.py)."""

# What is wrong: file, its text, what stands there instead, and the tests that must see it.
_SEARCH = "tests/train/plan/test_search.py"
PLAN = {
    "a rank alone with FSDP2's copies": (
        "train/parallel/parallelize.py", "if layout.alone:", "if False:", ["tests/train/parallel/test_alone.py"],
    ),
    "a kernel that takes no launch": (
        "train/plan/timing.py", ", rates.launch_us * 1e-6)", ", 0.0)", ["tests/train/plan/test_timing.py"],
    ),
    "moments that pass the host's link one way": (
        "train/plan/stages.py", "2 * len(AdamW.KEYS) * 4 * shard", "len(AdamW.KEYS) * 4 * shard",
        [_SEARCH, "-k", "moments"],
    ),
    "fake tensors in the process's tables": (
        "train/plan/count.py", "listed(getattr(module, name).__wrapped__)", "getattr(module, name)",
        ["tests/train/plan/test_count.py", "-k", "tables"],
    ),
    "tables of positions that take no memory": (
        "train/plan/count.py", "tables + max(0,", "max(0,",
        ["tests/train/plan/test_memory.py", "-k", "whole_program and kept"],
    ),
    "a search that leaves memory unused": (
        "train/plan/search.py", "kept + left / (1 + plan.question.assumed.slack) - ROOM_GIB / 2", "kept + 1",
        [_SEARCH, "-k", "tries"],
    ),
    "a launch that does not fit is submitted": (
        "launch/planned.py", "if not plan.fits:", "if False:",
        ["tests/tools/test_plan.py", "-k", "does_not_fit_is_refused"],
    ),
}  # fmt: skip
