"""Reading official checkpoints."""
