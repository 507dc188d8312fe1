"""Evaluating a bundle on the user's own data, and verifying that a device computes what it should."""
