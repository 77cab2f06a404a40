"""Checkpoints: writing, reading, uploading, and whether a run may continue from them."""
