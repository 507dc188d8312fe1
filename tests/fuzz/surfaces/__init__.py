"""The ways in; every module has ``open_surface(folder, scratch)``."""
