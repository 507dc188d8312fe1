"""Runtime of owl2: runs a bundle without torch.

Everything public is in :mod:`owl2`; see docs/api.md.
"""

from owl2.runtime.version import __version__

__all__ = ["__version__"]
