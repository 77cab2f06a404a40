"""Optimizers, one file each; protocol.py defines what the engines require of them."""
