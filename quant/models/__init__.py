"""The torch networks, one folder a model family."""
