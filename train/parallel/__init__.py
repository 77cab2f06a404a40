"""How ranks share a model: layouts, the parallelism applied to it from outside, and its cost."""
