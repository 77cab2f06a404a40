"""Measurements of the training side."""
