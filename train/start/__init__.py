"""The weights that a run starts from: their sources, part by part, and loading them into the shards of every rank."""
