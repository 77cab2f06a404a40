"""The deterministic stream: the order of samples, mixtures, reading ahead, and its state."""
