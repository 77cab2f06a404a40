"""From a config to running processes."""
