"""Programs besides training."""
