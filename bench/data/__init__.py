"""Measurements of the data side."""
