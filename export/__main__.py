"""Command ``owl2-export``: from an official checkpoint to a bundle, and from a bundle to engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from owl2.runtime.cli.process import run

if TYPE_CHECKING:
    import click


def _load() -> click.Command:
    from owl2.export.cli.commands import cli

    return cli


def main(arguments: Sequence[str] | None = None, name: str = "owl2-export") -> NoReturn:
    """Run the command line and exit, as :func:`run` says."""
    run(_load, name, arguments)


if __name__ == "__main__":
    main()
