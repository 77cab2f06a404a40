"""Benchmarks, which write their results to `bench/` with hardware, commit, command and date."""
