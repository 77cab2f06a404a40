"""One HTML page about a run, complete in itself: `python -m tools.report runs/ID` (see __main__.py)."""
