"""Host time by recomputation: the rows of the record, and the factor that the planner takes from it."""

import re
from pathlib import Path

from bench.step.host import PLAIN, narrow, table
from train.plan.stages import SELECTIVE_HOST

RECORD = Path(__file__).parents[2] / "bench" / "results" / "host.md"


def test_the_factor_of_a_kernel_is_the_ratio_of_seconds_over_that_of_kernels():
    rows = dict(table({PLAIN: [1.0, 2.0, 1.0], "selective": [3.0, 6.0, 9.0]}, {PLAIN: 100, "selective": 150}))
    assert rows["`selective` over `none`"] == "3.00 (3.00 to 9.00)"
    assert rows["`selective`: host time of a kernel over that of `none`"] == "2.00"
    assert rows["`selective`: kernels, counted"] == "150, 1.50 of `none`"


def test_the_model_is_as_deep_as_asked():
    config = narrow([40, 30])
    assert (config.video.num_layers, config.audio.num_layers, config.experts) == (40, 30, ("high",))


def test_the_planner_takes_what_was_measured():
    found = re.search(r"`selective`: host time of a kernel over that of `none` \| ([\d.]+)", RECORD.read_text())
    assert found and abs(float(found[1]) - SELECTIVE_HOST) < 0.05
