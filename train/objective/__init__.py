"""What is learned: flow matching, its draws, its losses, validation."""
