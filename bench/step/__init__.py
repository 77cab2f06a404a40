"""Measurements of one forward and backward."""
