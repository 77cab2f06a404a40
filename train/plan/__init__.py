"""What a run will need, before it is paid for: counted on the real program, timed by a model (docs/planning.md)."""
