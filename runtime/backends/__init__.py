"""Implementations of :class:`owl2.runtime.engine.Engine`."""
