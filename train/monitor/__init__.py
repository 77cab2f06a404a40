"""Monitoring of a run: metrics, the log, Weights & Biases, profiles, samples."""
