"""The bench of finishing puts together what units leave today, at a small size."""

from bench.data.finish import FinishBench, measure


def test_units_of_the_bench_are_those_that_finishing_takes(tmp_path) -> None:
    rows = dict(measure(FinishBench(units=3, shards=2, samples=5, place=str(tmp_path))))
    assert rows["units, shards, samples"] == "3, 6, 27"  # 4 and 5 samples a shard in turn
    assert not list(tmp_path.iterdir())
