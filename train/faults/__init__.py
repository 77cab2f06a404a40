"""Fault handling of a run: stop requests, bad steps, hangs, slow or corrupt ranks."""
