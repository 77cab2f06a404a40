"""Faults of FSDP2's units and of what a plan makes of them (tests/plant.py)."""

_UNITS = ["tests/train/engine/test_units.py"]
_PLACE = "train/parallel/parallelize.py"
# What is wrong: file, its text, what stands there instead; the tests that fail.
UNITS = {
    "a unit waits for modules that do not run": (
        _PLACE, "self._awaited.intersection_update(self._running)", "pass", _UNITS,
    ),
    "a unit waits for a forward that was broken off": (
        _PLACE, "self._awaited.clear()  # where the last forward did not come to its end", "pass", _UNITS,
    ),
    "a unit is gathered in backward for what ran last alone": (
        _PLACE, "if self._awaited:  # else FSDP2 has done so", "if False:", _UNITS,
    ),
    "an audio block is a unit of its own": (
        "train/parallel/parts.py", "return [pair + block]", "return [pair, block]", _UNITS,
    ),
    "backward in FSDP2's own order": (
        _PLACE, "set_modules_to_backward_prefetch(following or [unit])", "set_modules_to_backward_prefetch([])", _UNITS,
    ),
    "units are fetched one ahead": ("train/parallel/parts.py", "AHEAD = 2 ", "AHEAD = 1 ", _UNITS),
    "a frozen unit is gathered in backward": (
        "train/parallel/parts.py", "takes_part = any(map(learns, unit.modules)) or", "takes_part = True or", _UNITS,
    ),
    "a plan fetches one unit ahead": (
        "train/plan/timing.py", "stages[place + 1 : place + 1 + AHEAD]", "stages[place + 1 : place + 2]",
        ["tests/train/plan/test_timing.py"],
    ),
    "a plan has no room for the second unit ahead": (
        "train/plan/memory.py", "for one in met[place : place + 1 + AHEAD]", "for one in met[place : place + 2]",
        ["tests/train/plan/test_memory.py", "-k", "whole_program and 64"],
    ),
    "a plan reduces what is frozen": (
        "train/plan/memory.py", "reduced += whole * learns", "reduced += whole",
        ["tests/train/plan/test_memory.py", "-k", "one_unit"],
    ),
}  # fmt: skip
