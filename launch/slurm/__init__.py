"""A run on a SLURM cluster: batch scripts, and what they call on the nodes."""
