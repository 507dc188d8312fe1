"""Command ``owl2``: ask, chat, info, plan, eval, verify."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from owl2.runtime.cli.process import run

if TYPE_CHECKING:
    import click


def _load() -> click.Command:
    from owl2.runtime.cli.commands import cli

    return cli


def main() -> NoReturn:
    """Run the command line and exit, as :func:`run` says."""
    run(_load, "owl2")


if __name__ == "__main__":
    main()
