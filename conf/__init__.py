"""Hydra configuration files of all programs; the schema of each is a dataclass beside the code that reads it."""
