"""Export: from an official PyTorch checkpoint to a bundle."""
