"""Faults of the planner, each with its own tests (tests/plant.py)."""

# What is wrong: file, its text, what stands there instead, and the tests that must see it.
_SEARCH, _COMPILED = "tests/train/plan/test_search.py", "tests/train/plan/test_compiled.py"
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
    "fused kernels that are not counted": (
        "train/plan/compiled.py", "for one in schedule.fused:", "for one in schedule.fused[:0]:", [_COMPILED],
    ),
    "calls that are taken for kernels of inductor": (
        "train/plan/compiled.py", "return packet in flop_registry or name in ATTENTION or ", "return ",
        [_COMPILED, "-k", "call"],
    ),
    "what a compiled backward computes again is not told": (
        "train/plan/compiled.py", '"again" if node.name in before else phase', "phase", [_COMPILED, "-k", "less"],
    ),
    "buffers of a compiled pass that are never freed": (
        "train/plan/compiled.py", "if last >= 0 and (not name or name in saved):", "if False:",
        [_COMPILED, "-k", "backward"],
    ),
    "weights that a compiled backward frees": (
        "train/parallel/memory.py", "self._sizes.get(id(tensor.untyped_storage()), 0) > 0",
        "id(tensor.untyped_storage()) in self._sizes", [_COMPILED, "-k", "frees"],
    ),
    "buffers within a call of a compiled block are free": (
        "train/plan/compiled.py", " + runner.workspace)", ")", [_COMPILED, "-k", "holds"],
    ),
    "exchanges of a compiled block that are not sent": (
        "train/plan/count.py", "with self.memory, self._sent:", "with self.memory:", [_COMPILED, "-k", "sent"],
    ),
    "a joined tensor that is written wide": (
        "model/fused.py", "(a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype)",
        "(a * cos - b * sin), (a * sin + b * cos)", ["tests/model/test_fused.py"],
    ),
    "a launch that does not fit is submitted": (
        "launch/planned.py", "if not plan.fits:", "if False:",
        ["tests/tools/test_plan.py", "-k", "does_not_fit_is_refused"],
    ),
}  # fmt: skip
