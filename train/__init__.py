"""One training run: mesh, parallelism applied from outside, objective, step loop, checkpoint, monitor, validation."""
