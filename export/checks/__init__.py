"""Checks that an export runs on its own result."""
