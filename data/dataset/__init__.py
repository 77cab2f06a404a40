"""One finished dataset: the format of its shards, its index, a selection of it."""
