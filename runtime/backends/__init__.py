"""Backends behind :class:`owl2.runtime.engine.Engine`."""
