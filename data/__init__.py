"""From raw clips to batches: synthesis, decoding, codecs, the shard format, the index and the deterministic stream."""
