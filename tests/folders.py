"""Contents of a folder."""

from pathlib import Path


def names(folder: Path) -> list[str]:
    """Names of everything in it, sorted."""
    return sorted(path.name for path in folder.iterdir())
