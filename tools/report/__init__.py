"""A self-contained HTML page about a run: `mova report runs/ID` (see __main__.py)."""
