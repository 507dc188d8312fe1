"""Prompts to calibrate on: the user's own or the built-in set."""
