"""Exports a run's weights as a folder that other software loads: `mova export` (see __main__.py)."""
