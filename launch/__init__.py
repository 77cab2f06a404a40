"""Starts the processes of a run from its config."""
