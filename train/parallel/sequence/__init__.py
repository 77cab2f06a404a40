"""Sequence parallelism: ranks that share the tokens of a sample, and attention over such tokens."""
