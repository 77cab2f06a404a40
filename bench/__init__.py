"""Proofs and measurements of the project itself; their records are in results/."""
