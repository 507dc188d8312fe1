"""Scores of images: how likely a model says each of a few words next."""
