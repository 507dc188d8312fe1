"""``optimum-cli export owl2``: the command ``owl2-export`` as a subcommand of Optimum.

Optimum imports every file of ``optimum/commands/register`` when it starts, so nothing heavy is imported before the
subcommand runs. The wheel puts this file there; without Optimum nobody reads it.
"""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class Owl2ExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """Hands its arguments on."""

    COMMAND = CommandInfo(name="owl2", help="Export a model of the mPLUG-Owl2 family to a bundle for owl2.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Take all arguments as they are, --help included: no argument starts with this character."""
        parser.prefix_chars = "\0"
        parser.add_argument("arguments", nargs="*")

    def run(self) -> None:
        """Run ``owl2-export``; ends the process."""
        from owl2.export.__main__ import main

        main(self.args.arguments, name="optimum-cli export owl2")


REGISTER_COMMANDS = [(Owl2ExportCommand, ExportCommand)]
